"""How a command ends that was given something missing or bad: in one line, as those of `flux_mlx` do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TypeVar

Status = TypeVar("Status")
Main = Callable[[Sequence[str] | None], Status]


def ends_in_one_line(build_parser: Callable[[], argparse.ArgumentParser]) -> Callable[[Main], Main]:
    """Decorate `main(argv=None)`: from a console, bad input ends in one line on stderr and status 2.

    A console entry is called without arguments. A caller that gives them gets the exception: OSError or ValueError.

    Args:
        build_parser: Makes the parser of the command, whose name begins the line.
    """

    def decorate(main: Main) -> Main:
        @wraps(main)
        def entry(argv: Sequence[str] | None = None) -> Status:
            if argv is not None:
                return main(argv)
            try:
                return main(None)
            except (OSError, ValueError) as error:
                parser = build_parser()
                parser.exit(2, f"{parser.prog}: {error}\n")

        return entry

    return decorate
