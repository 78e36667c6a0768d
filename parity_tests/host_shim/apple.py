"""On a Mac: every kernel variant through `xcrun metal`, and through its self-test on the device.

`python -m parity_tests.host_shim.apple --compile --self-test --at-least N` fails if fewer than N variants passed: a
suite that skips must not look green.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from flux_mlx import doctor, kernel_policy
from parity_tests.host_shim import text
from parity_tests.host_shim.variants import ALL

STANDARDS = ("metal3.1", "metal3.2")  # MLX compiles at its system's: 3.1 is the first with bfloat, 3.2 macOS 15's
PREAMBLE = "mlx/backend/metal/kernels/utils.h"  # what MLX puts before every kernel


def compile_variants() -> list[str]:
    """Variants that Apple's compiler takes, at each of STANDARDS. Raises CalledProcessError at the first it refuses."""
    include = Path(mx.__file__).parent / "include"
    command = ["xcrun", "-sdk", "macosx", "metal", "-c", f"-I{include}", "-x", "metal"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (launch, inputs) in ALL.items():
            source = Path(folder) / f"{name}.metal"
            source.write_text(f'#include "{PREAMBLE}"\n{text.generated_text(launch, inputs)}')
            for standard in STANDARDS:
                target = source.with_suffix(f".{standard}.air")
                subprocess.run([*command, f"-std={standard}", str(source), "-o", str(target)], check=True)
    return [f"{name} {standard}" for name in ALL for standard in STANDARDS]


def self_test_variants() -> list[str]:
    """Variants that agree with the specification on this device. Raises RuntimeError at the first that does not."""
    variants = doctor.all_variants()
    for variant in variants:
        problem = kernel_policy.self_test(variant)
        if problem:
            raise RuntimeError(f"{variant}: {problem}")
    return [str(variant) for variant in variants]


def main() -> int:
    """Exit code 1 if too few variants passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--self-test", action="store_true")
    parser.add_argument("--at-least", type=int, required=True, metavar="N")
    options = parser.parse_args()
    passed = compile_variants() if options.compile else []
    passed += self_test_variants() if options.self_test else []
    sys.stdout.write(f"{len(passed)} kernel variants passed, {options.at_least} expected at least\n")
    return int(len(passed) < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
