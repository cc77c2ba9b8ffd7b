"""Every program on docs/pool.md and docs/arrays.md runs, and prints what is written below it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import procession
from procession._pool.pool import Pool

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in ("pool.md", "arrays.md")}
PAGE = PAGES["pool.md"]
EXAMPLES = {
    f"{name}-{number}": example
    for name, page in PAGES.items()
    for number, example in enumerate(
        re.findall(r"^```python\n(.*?)^```\n```text\n(.*?)^```", page, re.MULTILINE | re.DOTALL), 1
    )
}


def test_every_program_has_its_output() -> None:
    assert sum(page.count("```python") for page in PAGES.values()) == len(EXAMPLES)


@pytest.mark.parametrize(("code", "expected"), EXAMPLES.values(), ids=EXAMPLES)
def test_a_program_prints_what_the_page_says(code: str, expected: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=100, env=environment
    )
    assert (0, "") == (done.returncode, done.stderr), done.stdout + done.stderr
    # The worker's name says how it was started, which is another way from 3.14 on.
    pattern = re.escape(expected.replace("ForkPoolWorker", "…PoolWorker")).replace("…", ".*")
    assert re.fullmatch(pattern, done.stdout), done.stdout


def test_the_page_names_every_option() -> None:
    options = {name for name, one in inspect.signature(Pool).parameters.items() if one.kind is one.KEYWORD_ONLY}
    assert set() == {name for name in options if f"`{name}`" not in PAGE}


def test_every_error_it_names_is_there() -> None:
    for name in set(re.findall(r"`(\w+Error)`", PAGE)) - {
        "MaybeEncodingError",
        "MemoryError",
        "RuntimeError",
        "TimeoutError",
    }:
        assert issubclass(getattr(procession, name), Exception)
