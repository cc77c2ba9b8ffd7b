"""The README's code runs, its commands are there, and what docs/behaviour.md says comes out is what comes out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import procession

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BEHAVIOUR = (ROOT / "docs" / "behaviour.md").read_text(encoding="utf-8")

#: "$ python examples/before_after.py LIBRARY NAME" and the line below it.
EXPERIMENTS = re.findall(r"^\$ python (examples/before_after\.py) (\w+) (\S+)\n(.+)$", BEHAVIOUR, re.MULTILINE)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **more}
    )


def test_readme_has_exactly_these_two_commands() -> None:
    assert "\n$ pip install . && procession demo\n" in README
    assert '\n$ pip install ".[test]" && pytest\n' in README


def test_readme_ten_lines_survive_a_kill(tmp_path: Path) -> None:
    [block] = code_blocks(README)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    script = tmp_path / "readme.py"
    script.write_text(block)
    done = run([str(script)])
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "LockOwnerDied" in done.stderr


def test_the_same_lines_lose_the_lock_with_the_standard_library(tmp_path: Path) -> None:
    """What the README says of multiprocessing must be true as well."""
    [block] = code_blocks(README)
    script = tmp_path / "readme.py"
    script.write_text(block.replace("procession", "multiprocessing").replace("timeout=5", "timeout=1"))
    assert run([str(script)]).stdout == "False\n"


def test_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []


def test_every_row_of_the_table_has_its_experiment() -> None:
    rows = re.findall(r"^\| (R\d+) \|", README, re.MULTILINE)
    assert [f"R{number}" for number in range(1, 11)] == rows
    for library in ("multiprocessing", "procession"):
        assert set(rows) <= {name for _, of, name, _ in EXPERIMENTS if of == library}


@pytest.mark.parametrize(("script", "library", "name", "expected"), EXPERIMENTS, ids=lambda value: str(value)[:16])
def test_experiment_comes_out_as_documented(script: str, library: str, name: str, expected: str) -> None:
    # Who hangs, hangs as well after one second; who has an answer gets the time that a busy machine may need.
    hangs = library == "multiprocessing"
    done = run([script, library, name], FOR_EVER="1" if hangs else "60")
    assert done.returncode == 0, done.stderr
    actual = " ".join(done.stdout.splitlines()[1:]).strip()
    actual = re.sub(r"\s+", " ", actual)
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), actual)


@pytest.mark.parametrize("name", ["R3", "R4", "R5", "R10"])
def test_experiment_has_the_same_outcome_under_every_start_method(name: str, start_method: str) -> None:
    [expected] = [text for _, library, of, text in EXPERIMENTS if (library, of) == ("procession", name)]
    done = run(["examples/before_after.py", "procession", name, "--start-method", start_method], FOR_EVER="60")
    actual = re.sub(r"\s+", " ", " ".join(done.stdout.splitlines()[1:])).strip()
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), actual), done.stderr


class TwoArgumentsError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def raise_two_arguments() -> None:
    raise TwoArgumentsError("one", "two")


def test_r7_of_a_process_is_a_remote_error(ctx) -> None:
    """The half of R7 that is true today: an exception that cannot be unpickled is no hang."""
    with ctx.Process(target=raise_two_arguments) as process, pytest.raises(procession.RemoteError) as caught:
        process.result(timeout=60)
    assert "TwoArgumentsError" in caught.value.type_name
    assert caught.value.message == "one and two"
    assert "raise_two_arguments" in caught.value.traceback
