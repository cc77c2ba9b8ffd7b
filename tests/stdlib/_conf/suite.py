"""A copy of CPython's multiprocessing tests for one module, and what known.txt says about each test."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

from . import watchdog
from .build_cpython import NOT_HERE

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
WORKER = os.path.join(HERE, "cpython_worker.py")


def known(tests):
    """Where it says which of these tests do not count, and why."""
    return Path(ROOT) / ("known.txt" if tests == "multiprocessing" else f"known_{tests}.txt")


def baseline(tests, version, method):
    """Where it says what the standard library scores."""
    name = "cpython" if tests == "multiprocessing" else tests
    return Path(ROOT) / "baseline" / f"{name}-{version}-{method}.json"


class NotHereError(Exception):
    """This interpreter does not ship the tests."""


class Copy:
    """The tests of interpreter `python`, with `module` in the place of multiprocessing, in folder `scratch`.

    `tests` is multiprocessing or concurrent_futures: whose tests.
    """

    def __init__(self, module, scratch, *, tests="multiprocessing", python=sys.executable, path=(), helpers="auto"):
        self.tests = tests
        self.python = python
        self.scratch = os.path.abspath(scratch)
        build = os.path.join(self.scratch, "suite")
        os.makedirs(build, exist_ok=True)
        # The tests' own temporary files: what a killed one leaves goes away with the scratch folder. A short name,
        # since addresses of Unix sockets are made from it.
        temporary = os.path.join(self.scratch, "t")
        os.makedirs(temporary, exist_ok=True)
        paths = [os.path.abspath(d) for d in path]
        if os.environ.get("PYTHONPATH"):
            # Their processes have directories of their own.
            paths += [os.path.abspath(d) for d in os.environ["PYTHONPATH"].split(os.pathsep) if d]
        env = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        made = subprocess.run(
            [
                python,
                os.path.join(HERE, "build_cpython.py"),
                *("--module", module, "--out", build, "--helpers", helpers, "--tests", tests),
            ],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if made.stderr.startswith(NOT_HERE):
            raise NotHereError(made.stderr.removeprefix(NOT_HERE).strip())
        if made.returncode:
            raise SystemExit(f"the copy could not be made:\n{made.stderr}")
        self.meta = json.loads(made.stdout)
        self.env = dict(
            env,
            PYTHONPATH=os.pathsep.join([build, *paths]),
            PYTHONFAULTHANDLER="1",
            TMPDIR=temporary,
        )
        self.env.pop("PYTHONWARNINGS", None)
        self._groups = 0

    @property
    def version(self):
        """Of the interpreter, as 3.13."""
        return ".".join(self.meta["python"].split(".")[:2])

    def _command(self, method):
        suite = f"conf_test_{method}"

        def command(ids_file, events_file, mode="run"):
            return [self.python, WORKER, mode, suite, ids_file, events_file]

        return command

    def ids(self, method):
        """Every test, as Class.test."""
        listed = os.path.join(self.scratch, f"{method}.ids")
        command = self._command(method)(listed, "-", "list")
        subprocess.run(command, env=self.env, check=True, cwd=self.scratch)
        with open(listed) as f:
            return json.load(f)

    def run(self, method, name, members, *, timeout):
        """Run these tests of one class in one process; the watchdog's Group with the results."""
        self._groups += 1
        workdir = os.path.join(self.scratch, "run", f"{self._groups:04d}-{name}")
        return watchdog.Group(name, members, self._command(method), self.env, workdir, timeout=timeout).run()


def read_known(path, method, python):
    """known*.txt: pattern | methods | pythons | category | reason."""
    entries = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            parts = [p.strip() for p in text.split("|", 4)]
            if len(parts) != 5:
                raise SystemExit(f"{path}:{n}: five fields wanted")
            pattern, methods, pythons, category, reason = parts
            if methods != "*" and method not in methods.split():
                continue
            if pythons != "*" and python not in pythons.split():
                continue
            entries.append((pattern, category, reason))
    return entries


def category_of(test, entries):
    """The first entry that names the test decides."""
    for pattern, category, reason in entries:
        if fnmatch.fnmatchcase(test, pattern):
            return category, reason
    return "", ""


def group_of(category, own_submodules):
    """What a test of this category is counted under: counted, impl, design, changed or stdlib."""
    where, _, helper = category.partition(":")
    return "counted" if where not in ("impl", "design", "changed", "stdlib") or helper in own_submodules else where


def kind(test):
    """What the class of the test is for: processes, manager, threads or misc."""
    for k in ("Processes", "Manager", "Threads"):
        if test.startswith("With" + k):
            return k.lower()
    return "misc"


def by_class(ids):
    """Class -> its tests, in order."""
    classes = {}
    for i in ids:
        classes.setdefault(i.split(".")[0], []).append(i)
    return classes
