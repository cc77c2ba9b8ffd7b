"""`procession run`: as `python` would run it, with multiprocessing replaced, in the children too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import zipfile

import pytest

PLAIN = [sys.executable, "-X", "dev"]
OURS = [*PLAIN, "-m", "procession", "run"]


def run(command: list[str], cwd, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL, **options
    )


def same(cwd, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run with python and with procession run; assert that nobody can tell the difference."""
    expected, actual = run([*PLAIN, *arguments], cwd), run([*OURS, *arguments], cwd)
    assert (expected.returncode, expected.stdout, expected.stderr) == (
        actual.returncode,
        actual.stdout,
        actual.stderr,
    )
    return actual


@pytest.fixture
def program(tmp_path):
    def write(code: str, name: str = "program.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))
        return path

    return write


SHOW = """
import sys
print(sys.argv, sys.path[0], __name__, __file__, __package__, __spec__ and __spec__.name, __doc__)
print(sys.modules["__main__"].__dict__ is globals())
"""


@pytest.mark.parametrize("arguments", [("program.py",), ("program.py", "-m", "--x", "y"), ("./sub/other.py", "1")])
def test_a_script_sees_what_python_shows_it(program, tmp_path, arguments) -> None:
    program(SHOW)
    program(SHOW, "sub/other.py")
    same(tmp_path, *arguments)


def test_a_module_a_package_a_directory_and_a_zip_file_run(program, tmp_path) -> None:
    program(SHOW)
    program("", "pkg/__init__.py")
    program(SHOW, "pkg/__main__.py")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SHOW)
    same(tmp_path, "-m", "program", "-x", "1")
    same(tmp_path, "-m", "pkg", "1")
    same(tmp_path, "pkg", "1")
    same(tmp_path, "archive.zip", "1")


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(3)",
        "import sys; sys.exit('text')",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "def f():\n    raise ValueError(1)\ntry:\n    f()\nexcept ValueError as e:\n    raise KeyError(2) from e",
        "this is no Python",
        "import sys\nsys.excepthook = lambda *a: print('hook', a[0])\n1/0",
        "import atexit, threading\natexit.register(print, 'exit', __name__)\nthreading.Thread(target=print).start()",
        "import runpy\nrunpy.run_path('nope.py')",
    ],
)
def test_exit_status_and_tracebacks_are_pythons(program, tmp_path, code) -> None:
    program(code)
    same(tmp_path, "program.py")


def test_what_is_not_there_is_said_as_python_says_it(tmp_path) -> None:
    same(tmp_path, "nope.py")
    same(tmp_path, "-m", "nope")


PROGRAM = """
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pool, Process, Queue

def work(q):
    q.put((type(q).__module__, type(multiprocessing.current_process()).__mro__[1].__module__, sys.argv[1:]))

def square(x):
    return x * x

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    q = Queue()
    p = Process(target=work, args=(q,))
    p.start()
    print(q.get(timeout=60))
    p.join()
    with Pool(2) as pool:
        print(pool.map(square, range(4)))
        pool.close()
        pool.join()
    with ProcessPoolExecutor(1) as executor:
        print(list(executor.map(square, range(3))))
"""


@pytest.mark.parametrize("how", ["script", "module"])
def test_an_unmodified_program_runs_on_procession_in_its_children_too(program, tmp_path, start_method, how) -> None:
    program(PROGRAM)
    arguments = ["-m", "program"] if how == "module" else ["program.py"]
    # The kernel still counts a thread of the pool that has been joined, when the executor forks: Python 3.12 warns of that.
    quiet = [*PLAIN, "-W", "ignore:This process:DeprecationWarning", *OURS[len(PLAIN) :]]
    result = run([*quiet, *arguments, start_method], tmp_path)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("('procession.")
    assert "'procession._proc.process'" in lines[0]
    assert lines[1:] == ["[0, 1, 4, 9]", "[0, 1, 4]"]


def test_no_command_shows_help_and_no_script_is_a_usage_error(tmp_path) -> None:
    bare = run([*PLAIN, "-m", "procession"], tmp_path)
    assert bare.returncode == 2
    assert "run" in bare.stdout
    assert "doctor" in bare.stdout
    assert run(OURS, tmp_path).returncode == 2
    version = run([*PLAIN, "-m", "procession", "--version"], tmp_path)
    assert version.stdout.startswith("procession ")


def test_safe_path_is_respected(program, tmp_path) -> None:
    if not hasattr(sys.flags, "safe_path"):
        pytest.skip("-P is new in Python 3.11")
    path = program("import sys; print(sys.path[0])")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    expected = run([*PLAIN, "-P", str(path)], tmp_path, env=environment)
    actual = run([*PLAIN, "-P", "-m", "procession", "run", str(path)], tmp_path, env=environment)
    assert expected.stdout == actual.stdout
