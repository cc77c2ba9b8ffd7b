"""``procession run [-m] SCRIPT [ARGS...]``: run an unmodified program that imports multiprocessing on procession.

The program runs as ``__main__`` as ``python SCRIPT`` or ``python -m MODULE`` would run it: `sys.argv`, ``sys.path[0]``,
``__file__`` and ``__spec__``, exit status and tracebacks are the same. That is also what makes its spawned children
able to import its main module again.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import os
import pkgutil
import runpy
import sys
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from procession.install import install

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["add_parser", "main"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommand's arguments."""
    parser = subparsers.add_parser(
        "run",
        help="run a program that imports multiprocessing on procession",
        description="Run an unmodified Python program; `import multiprocessing` gives it procession, in its child "
        "processes too.",
        usage="procession run [-h] [-m] SCRIPT [ARGS ...]",
    )
    parser.add_argument(
        "-m", dest="module", action="store_true", help="SCRIPT is the name of a module, as in python -m"
    )
    parser.add_argument("script", metavar="SCRIPT", help="a Python file, a directory or zip file with a __main__.py")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="the program's own arguments")


def main(args: argparse.Namespace) -> int:
    """Run the program; whatever it raises goes on to the interpreter, as if it were the main program."""
    install()
    if args.module:
        sys.argv[:] = ["-m", *args.args]
        _set_first_path(os.getcwd())
        _run(lambda: _run_as_main(args.script, alter_argv=True))
    else:
        sys.argv[:] = [args.script, *args.args]
        _run(lambda: _run_script(args.script))
    return 0


def _run(program: Callable[[], Any]) -> None:
    try:
        program()
    except SystemExit:
        raise
    except BaseException:
        # Not handled here: the interpreter knows what to do (excepthook, exit status, SIGINT for KeyboardInterrupt).
        # Only our own frames are to be left out of what it shows.
        _hide_frames()
        raise


def _hide_frames() -> None:
    """Leave everything above the program's own first frame out of the traceback of the exception to come."""
    hook = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        shown = trace
        while shown is not None and shown.tb_frame.f_code is not _run.__code__:
            shown = shown.tb_next
        while shown is not None and shown.tb_frame.f_code.co_filename == __file__:
            shown = shown.tb_next
        # None after a SyntaxError of the program: it has no frame yet.
        return hook(kind, error.with_traceback(shown), shown)

    sys.excepthook = excepthook


def _run_script(script: str) -> None:
    if pkgutil.get_importer(script) is not None:
        # A directory or a zip file: what python does with these.
        _set_first_path(os.path.abspath(script))
        _run_as_main("__main__", alter_argv=False)
        return
    try:
        # Before anything is changed: a script that is not there is an error of the command line.
        with open(script, "rb"):
            pass
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {os.path.join(os.getcwd(), script)!r}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    _set_first_path(os.path.dirname(os.path.realpath(script)))
    # As the interpreter makes __file__: absolute, not normalised. sys.argv[0] stays as it was given.
    script = os.path.join(os.getcwd(), script)
    main = _new_main()
    loader: Any
    if script.endswith(".pyc"):
        loader = importlib.machinery.SourcelessFileLoader("__main__", script)
    else:
        loader = importlib.machinery.SourceFileLoader("__main__", script)
    main.__dict__.update(__file__=script, __cached__=None, __loader__=loader, __builtins__=sys.modules["builtins"])
    if script.endswith(".pyc"):
        code = loader.get_code("__main__")
    else:
        code = compile(loader.get_data(script), script, "exec", dont_inherit=True)
    _run_code(code, main.__dict__)


def _run_as_main(name: str, *, alter_argv: bool) -> None:
    _new_main()
    # What `python -m` itself calls; runpy's public functions put the old __main__ back before the program's threads
    # and exit handlers have ended.
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _run_code(code: Any, namespace: dict[str, Any]) -> None:
    exec(code, namespace)


def _new_main() -> ModuleType:
    """Put an empty module in the place of ``__main__``."""
    main = ModuleType("__main__")
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    return main


def _set_first_path(directory: str) -> None:
    """Put `directory` where this command's own is; with -P or -I, where there is none, leave the path alone."""
    if not getattr(sys.flags, "safe_path", bool(sys.flags.isolated)):
        sys.path[0] = directory
