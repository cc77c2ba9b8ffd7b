"""The project's tasks: ``nox -l`` lists them, ``nox -s lint`` runs one. See CONTRIBUTING.md."""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2024.10"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).parent
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
METHODS = ["fork", "spawn", "forkserver"]
CPP = ["native/include/procession/*.hpp", "native/bind/*.[ch]pp", "native/tests/**/*.[ch]pp"]


def _find_interpreters() -> None:
    """Put the interpreters of pyenv on the path, in place of its shims, which fail for those that are not selected."""
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    path = [d for d in os.environ["PATH"].split(os.pathsep) if Path(d) != home / "shims"]

    def version(directory: Path) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", directory.name)]

    newest_first = sorted(home.glob("versions/3.*"), key=version, reverse=True)
    os.environ["PATH"] = os.pathsep.join([*path, *(str(d / "bin") for d in newest_first)])


_find_interpreters()


def _pinned(*names: str) -> list[str]:
    """The versions of these tools that pyproject.toml names."""
    dev = nox.project.load_toml("pyproject.toml")["project"]["optional-dependencies"]["dev"]
    return [spec for spec in dev if re.split(r"[^\w-]", spec)[0] in names]


@nox.session
def lint(session: nox.Session) -> None:
    """Rules, format and layers: ruff, import-linter, clang-format. With ``-- --fix`` mends what can be mended."""
    session.install(*_pinned("ruff", "import-linter", "clang-format"), "cloudpickle")
    fix = "--fix" in session.posargs
    cpp = sorted({str(path) for pattern in CPP for path in ROOT.glob(pattern)})
    session.run("ruff", "check", *(["--fix"] if fix else []), ".")
    session.run("ruff", "format", *([] if fix else ["--check"]), ".")
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "-Werror"]), *cpp, silent=fix)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """The types of the package and of the extension's stub: mypy --strict."""
    session.install(*_pinned("mypy"), "cloudpickle", "numpy")
    session.run("mypy", *session.posargs)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole suite on each interpreter, against the installed package. Arguments after ``--`` go to pytest."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("method", METHODS)
def stdlib(session: nox.Session, method: str) -> None:
    """CPython's own suite: each interpreter, each start method."""
    session.install(".[test]")
    session.run("pytest", "tests/stdlib", f"--stdlib-methods={method}", *session.posargs)


@nox.session
def guests(session: nox.Session) -> None:
    """The programs that the executor and the joblib backend are made for: joblib, scikit-learn, dask; torch where it is small."""
    session.install(".[test]", "joblib", "scikit-learn", "dask")
    session.run("pytest", "tests/pool/test_joblib.py", "tests/pool/test_dask.py", *session.posargs)
    try:  # the build for CPUs, which not all indexes have; the one for GPUs comes with gigabytes
        session.install("torch==2.13.0+cpu", silent=True)
    except CommandFailed:
        session.skip(
            "torch's tests: no build for CPUs in this package index (PIP_EXTRA_INDEX_URL, with uv UV_EXTRA_INDEX_URL: "
            "https://download.pytorch.org/whl/cpu)"
        )
    session.run("pytest", "tests/pool/test_torch.py", *session.posargs)


@nox.session
def native(session: nox.Session) -> None:
    """The C++ tests, without Python: units, the model, and again under the sanitizers."""
    script = ROOT / "native" / "tests" / "run.sh"
    if not script.exists():
        session.skip("native/tests/run.sh is not there")
    session.run("bash", str(script), *session.posargs, external=True)


@nox.session
def storms(session: nox.Session) -> None:
    """What takes long: 10,000 kills of the core, 100,000 tasks of a pool whose workers are killed, the standard library wedged."""
    session.install(".[test]")
    session.run("pytest", "--slow", "-m", "slow", "-o", "faulthandler_timeout=2100", *session.posargs)


@nox.session
@nox.parametrize("which", ["asan", "tsan"])
def sanitizers(session: nox.Session, which: str) -> None:
    """The Python tests on an extension built with a sanitizer (default: tests/unit)."""
    session.install(".[test]")
    session.run("pip", "uninstall", "-y", "-q", "procession", silent=True)
    out = session.run("bash", "native/build.sh", f"--{which}", _python(session), external=True, silent=True)
    use = re.search(r"^use: (.*?) \S+ \.\.\.$", str(out), re.MULTILINE)
    if use is None:
        session.error(f"native/build.sh --{which} did not say how to use what it built:\n{out}")
    env = dict(word.split("=", 1) for word in use[1].split())
    session.run("python", "-m", "pytest", *(session.posargs or ["tests/unit"]), env=env)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, beside the rivals where they can be installed. Arguments after ``--`` go to benchmarks/run.py."""
    session.install(".")
    queues = ("cloudtoid-interprocess", "faster-fifo", "iceoryx2", "py-sharedmemory", "torch==2.13.0+cpu")
    pools = ("loky", "joblib", "mpire", "pebble", "billiard", "distributed", "dask", "ray")
    for rival in (*queues, *pools):
        session.install(rival, success_codes=[0, 1])
    session.run("python", "benchmarks/run.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, every warning an error."""
    if not (ROOT / "docs" / "conf.py").exists():
        session.skip("docs/conf.py is not there")
    session.install(".", "-r", "docs/requirements.txt")
    session.run("sphinx-build", "-E", "-W", "-n", "--keep-going", "docs", "docs/_build/html", *session.posargs)


@nox.session
def dist(session: nox.Session) -> None:
    """The sdist, and a wheel made from it alone, which must hold one extension and the marker of its types."""
    out = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(out, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(out), str(ROOT), silent=True)
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    extensions = [name for name in names if name.endswith(".so")]
    if len(extensions) != 1 or "procession/py.typed" not in names or "procession/_native.pyi" not in names:
        session.error(f"{wheel.name} holds {names}")
    session.install(str(wheel))
    with session.chdir(out):
        session.run("python", "-c", "import procession; procession.Lock()")
    session.log(", ".join(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB" for path in sorted(out.iterdir())))


@nox.session
def changelog(session: nox.Session) -> None:
    """Show what changelog.d/ would add to CHANGELOG.md; ``-- --yes`` writes it."""
    session.install(*_pinned("towncrier"))
    session.run("towncrier", "build", *(session.posargs or ["--draft"]))


def _python(session: nox.Session) -> str:
    return str(Path(session.bin) / "python") if session.bin else sys.executable
