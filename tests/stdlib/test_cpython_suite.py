"""Every test of CPython's multiprocessing suite that the standard library passes on this machine passes here.

One test of ours runs one test class of theirs, in a process of its own, for one start method. ``--stdlib-methods`` names
the start methods (``fork`` by default; ``fork,spawn,forkserver`` for all, ``none`` for none). Which tests do not count,
and why, is in ``known.txt``; what the standard library scores is in ``baseline/``.

A test that does not do what the baseline says is run again alone, then against multiprocessing itself: where that does
not pass it here and now either, it is the machine and not us. Both are named at the end of the run.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.conftest import NOTES
from tests.stdlib._conf import suite, watchdog

_HERE = Path(__file__).parent

# Longest silence of one test. Their own longest takes 5 s; a loaded machine is slower.
_SILENCE_S = 60

# The class may have several tests that hang, each broken off after the silence above.
pytestmark = pytest.mark.timeout(480)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a start method and class of this interpreter's own suite."""
    if "their_class" not in metafunc.fixturenames:
        return
    scratch = tempfile.mkdtemp(prefix="cpy")
    methods = [m for m in metafunc.config.getoption("stdlib_methods").split(",") if m not in ("", "none")]
    cases = []
    try:
        if methods:
            copy = suite.Copy("multiprocessing", scratch)
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


@pytest.fixture(scope="module")
def copies():
    """The suite for procession and for multiprocessing, each made when first asked for."""
    scratch = Path(tempfile.mkdtemp(prefix="cpy"))
    made: dict[str, suite.Copy] = {}

    def copy(module: str) -> suite.Copy:
        if module not in made:
            made[module] = suite.Copy(module, scratch / module[0])
        return made[module]

    yield copy
    shutil.rmtree(scratch, ignore_errors=True)


def test_what_the_standard_library_passes_passes(method, their_class, copies, request):
    """Compare outcomes; the text of a failure is their traceback."""
    ours = copies("procession")
    name = their_class[0].split(".")[0]
    known = suite.read_known(suite.KNOWN, method, ours.version)
    categories = {i: suite.category_of(i, known)[0] for i in their_class}
    counted = [i for i, c in categories.items() if suite.group_of(c, ours.meta["own_submodules"]) == "counted"]
    if not counted:
        pytest.skip("known.txt counts none of them")
    baseline = _baseline(ours.version, method)

    group = ours.run(method, name, their_class, timeout=_SILENCE_S)

    failures, notes = [], []
    for i in counted:
        result = group.results[i]
        if result["outcome"] not in ("pass", baseline.get(i)):
            failed, text = _second_opinion(method, i, result, copies, flaky=categories[i] == "flaky")
            (failures if failed else notes).append(text)
    for where, result in group.fixtures.items():
        theirs = copies("multiprocessing").run(method, name, their_class, timeout=_SILENCE_S)
        if where in theirs.fixtures:
            notes.append(f"{method} {name} {where}: {result['outcome']}; the same with multiprocessing")
        else:
            failures.append(f"{result['outcome']} {name} {where}\n{_indent(result['text'])}")
    request.config.stash.setdefault(NOTES, []).extend(notes)
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    if all(group.results[i]["outcome"] == "skip" for i in counted):
        pytest.skip(f"CPython skips them: {group.results[counted[0]]['text'][:100]}")


def _second_opinion(method, test, result, copies, *, flaky):
    """Whether a test that is not as in the baseline counts as failed, and what to say about it."""
    outcome, name = result["outcome"], test.split(".")[0]
    if outcome in watchdog.BAD:
        again = copies("procession").run(method, name, [test], timeout=_SILENCE_S).results[test]["outcome"]
        if again == "pass" or flaky:
            return False, f"{method} {test}: {outcome}, then {again} when run alone"
    theirs = copies("multiprocessing").run(method, name, [test], timeout=_SILENCE_S).results[test]["outcome"]
    if theirs == "pass":
        return True, f"{outcome} {test} (multiprocessing passes it here)\n{_indent(result['text'])}"
    return False, f"{method} {test}: {outcome}; multiprocessing here: {theirs}"


def test_every_line_of_known_gives_a_reason():
    """A test that is not counted says why."""
    for method in ("fork", "spawn", "forkserver"):
        for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
            for pattern, category, reason in suite.read_known(suite.KNOWN, method, python):
                assert category.partition(":")[0] in {"impl", "design", "stdlib", "flaky", "count"}, pattern
                assert reason, pattern


def _baseline(version: str, method: str) -> dict[str, str]:
    path = _HERE / "baseline" / f"cpython-{version}-{method}.json"
    return json.loads(path.read_text(encoding="utf-8"))["tests"] if path.exists() else {}


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.strip().splitlines())
