"""The command ``procession``.

Each subcommand is a module beside this one with ``add_parser(subparsers)`` and ``main(args) -> int``. Only the one
that was asked for is imported: ``procession run`` must cost the user's script next to nothing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

_COMMANDS = ("run", "doctor", "demo", "stack")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Args:
        argv: The arguments without the program's name; None for those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    wanted = arguments[:1] if arguments[:1] and arguments[0] in _COMMANDS else _COMMANDS
    parser = argparse.ArgumentParser(
        prog="procession",
        description="multiprocessing that survives its processes: run programs on it, and see what limits them.",
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in wanted:
        importlib.import_module(f"{__name__}.{name}").add_parser(subparsers)
    args = parser.parse_args(arguments)
    if args.version:
        from procession._version import __version__

        print(f"procession {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    status: int = importlib.import_module(f"{__name__}.{args.command}").main(args)
    return status
