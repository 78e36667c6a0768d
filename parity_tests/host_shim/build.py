"""Compiles translation units, once for each content: the cache is keyed by text, shim, compiler and flags."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

SHIM = Path(__file__).parent
_LANGUAGE = ("-std=c++17", "-w", f"-I{SHIM}", f"-I{SHIM}/include")
_FLAGS = (*_LANGUAGE, "-O1", "-march=native", "-ffp-contract=on")
_SANITIZE = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class BuildError(RuntimeError):
    """The compiler refused the text; the message is the compiler's."""


@cache
def compiler() -> str:
    """The C++ compiler: $CXX, else g++ or clang++. Raises RuntimeError if there is none."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("[host_shim] expected g++ or clang++ on the PATH (apt-get install g++), got neither.")


@cache
def address_space_compiler() -> str | None:
    """A clang++ of version 18 or newer, whose __bf16 computes; None if there is none."""
    for name in ("clang++-19", "clang++-20", "clang++-18", "clang++"):
        if not shutil.which(name):
            continue
        version = subprocess.run([name, "-dumpversion"], capture_output=True, text=True, check=True).stdout
        if int(version.split(".")[0]) >= 18:
            return name
    return None


@cache
def _shim_key() -> bytes:
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    model = [line for line in cpu.read_bytes().splitlines() if line.startswith((b"model name", b"flags"))][:2]
    headers = [path.read_bytes() for path in sorted(SHIM.glob("*.h"))]
    return hashlib.sha256(b"\0".join([version, *model, *headers])).digest()


def cache_folder() -> Path:
    """Where executables are kept: $FLUX_SHIM_CACHE, else .cache/host_shim of the repository."""
    return Path(os.environ.get("FLUX_SHIM_CACHE", SHIM.parents[1] / ".cache" / "host_shim"))


def executable(source: str, *, sanitize: bool = False) -> Path:
    """The program compiled from `source`; taken from the cache if it was compiled before.

    Raises:
        BuildError: The compiler refused the source.
    """
    flags = _FLAGS + (_SANITIZE if sanitize else ())
    key = hashlib.sha256(_shim_key() + " ".join(flags).encode() + b"\0" + source.encode()).hexdigest()[:32]
    target = cache_folder() / key
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{key}.{os.getpid()}")
        command = [compiler(), *flags, "-x", "c++", "-", "-o", str(partial)]
        done = subprocess.run(command, input=source, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(done.stderr)
        partial.replace(target)
    return target


def may_skip_address_spaces() -> bool:
    """Whether there is no such clang++, and $FLUX_REQUIRE_CLANG does not ask for one."""
    return address_space_compiler() is None and not os.environ.get("FLUX_REQUIRE_CLANG")


def check_address_spaces(source: str) -> str:
    """clang's errors for `source` with device, constant and threadgroup as real address spaces; "" if it has none.

    Raises:
        RuntimeError: There is no clang++ 18 or newer.
    """
    clang = address_space_compiler()
    if clang is None:
        raise RuntimeError("[host_shim] expected clang++ 18 or newer on the PATH (apt-get install clang-19), got none.")
    command = [clang, *_LANGUAGE, "-fsyntax-only", "-DFLUX_ADDRESS_SPACES"]
    done = subprocess.run([*command, "-x", "c++", "-"], input=source, capture_output=True, text=True)
    return done.stderr if done.returncode else ""
