"""``procession stack``: where a program and all that it has started are, line by line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from procession._proc.stacks import stacks

if TYPE_CHECKING:
    import argparse

__all__ = ["add_parser", "main"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to the command line."""
    parser = subparsers.add_parser(
        "stack",
        help="print the Python stacks of a process and of all below it",
        description="Print the Python stacks of a process and of all that it has started. Nothing is changed or stopped by it.",
    )
    parser.add_argument("pid", type=int, metavar="PID", help="a program that uses procession")


def main(args: argparse.Namespace) -> int:
    """Run the subcommand and return the exit status."""
    try:
        for text in stacks(args.pid):
            print(text)
    except ProcessLookupError as error:
        print(f"procession stack: {error}", file=sys.stderr)
        return 1
    return 0
