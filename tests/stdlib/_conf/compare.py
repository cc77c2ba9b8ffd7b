"""One test of ours runs one test class of theirs, and compares: for test_cpython_suite.py and its like."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import NOTES, START_METHODS

from . import suite, watchdog

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CATEGORIES = {"impl", "design", "changed", "stdlib", "flaky", "count"}

# Longest silence of one test. Their own longest takes 6 s; a loaded machine is slower.
SILENCE_S = 60


def parametrize(metafunc, tests):
    """One test a start method and class of this interpreter's own suite."""
    if "their_class" not in metafunc.fixturenames:
        return
    scratch = tempfile.mkdtemp(prefix="cpy")
    methods = [m for m in metafunc.config.getoption("stdlib_methods").split(",") if m not in ("", "none")]
    cases = []
    try:
        if methods:
            copy = suite.Copy("multiprocessing", scratch, tests=tests)
            for method in methods:
                ids = [i for i in copy.ids(method) if suite.kind(i) != "threads"]
                cases += [
                    pytest.param(method, members, id=f"{method}-{name}")
                    for name, members in suite.by_class(ids).items()
                ]
    except suite.NotHereError as e:
        cases = [pytest.param("", [], marks=pytest.mark.skip(reason=str(e)), id="absent")]
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not cases:
        cases = [pytest.param("", [], marks=pytest.mark.skip(reason="--stdlib-methods=none"), id="none")]
    metafunc.parametrize(("method", "their_class"), cases)


@contextlib.contextmanager
def copies(tests):
    """A function that gives the suite for a module: made when first asked for."""
    scratch = Path(tempfile.mkdtemp(prefix="cpy"))
    made: dict[str, suite.Copy] = {}

    def copy(module):
        if module not in made:
            made[module] = suite.Copy(module, scratch / module[0], tests=tests)
        return made[module]

    try:
        yield copy
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check(config, method, their_class, copies):
    """Compare outcomes; the text of a failure is their traceback."""
    ours = copies("procession")
    name = their_class[0].split(".")[0]
    known = suite.read_known(suite.known(ours.tests), method, ours.version)
    categories = {i: suite.category_of(i, known)[0] for i in their_class}
    counted = [i for i, c in categories.items() if suite.group_of(c, ours.meta["own_submodules"]) == "counted"]
    if not counted:
        pytest.skip(f"{suite.known(ours.tests).name} counts none of them")
    path = suite.baseline(ours.tests, ours.version, method)
    baseline = json.loads(path.read_text(encoding="utf-8"))["tests"] if path.exists() else {}
    group = ours.run(method, name, their_class, timeout=SILENCE_S)

    failures, notes = [], []
    for i in counted:
        result = group.results[i]
        if result["outcome"] not in ("pass", baseline.get(i)):
            failed, text = _second_opinion(method, i, result, copies, flaky=categories[i] == "flaky")
            (failures if failed else notes).append(text)
    for where, result in group.fixtures.items():
        theirs = copies("multiprocessing").run(method, name, their_class, timeout=SILENCE_S)
        if where in theirs.fixtures:
            notes.append(f"{method} {name} {where}: {result['outcome']}; the same with multiprocessing")
        else:
            failures.append(f"{result['outcome']} {name} {where}\n{_indent(result['text'])}")
    config.stash.setdefault(NOTES, []).extend(notes)
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    if all(group.results[i]["outcome"] == "skip" for i in counted):
        pytest.skip(f"CPython skips them: {group.results[counted[0]]['text'][:100]}")


def _second_opinion(method, test, result, copies, *, flaky):
    """Whether a test that is not as in the baseline counts as failed, and what to say about it."""
    outcome, name = result["outcome"], test.split(".")[0]
    if outcome in watchdog.BAD:
        again = copies("procession").run(method, name, [test], timeout=SILENCE_S).results[test]["outcome"]
        if again == "pass" or flaky:
            return False, f"{method} {test}: {outcome}, then {again} when run alone"
    theirs = copies("multiprocessing").run(method, name, [test], timeout=SILENCE_S).results[test]["outcome"]
    if theirs == "pass":
        return True, f"{outcome} {test} (the standard library passes it here)\n{_indent(result['text'])}"
    return False, f"{method} {test}: {outcome}; the standard library here: {theirs}"


def check_known(tests):
    """A test that is not counted says why."""
    for method in START_METHODS:
        for python in PYTHONS:
            for pattern, category, reason in suite.read_known(suite.known(tests), method, python):
                assert category.partition(":")[0] in CATEGORIES, pattern
                assert reason, pattern


def _indent(text):
    return "\n".join("    " + line for line in text.strip().splitlines())
