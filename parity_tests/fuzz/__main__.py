"""Fuzz the loaders: `python -m parity_tests.fuzz --count 2000 [--target config] [--seed 1]`. Status 1: a failure."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

from parity_tests.fuzz.guided import fuzz
from parity_tests.fuzz.targets import make_targets


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="parity_tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="mutants of each target (default: %(default)s)")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in make_targets(Path(folder)):
            if args.target in (None, target.name):
                result = fuzz(target, args.count, args.seed)
                print(
                    f"{target.name}: {result.count} mutants, {len(result.lines)} lines reached, "
                    f"{len(result.parents) - 1} parents, {len(result.failures)} kinds of failure",
                    flush=True,
                )
                for failure in result.failures:
                    print(f"  {failure}")
                failed += len(result.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
