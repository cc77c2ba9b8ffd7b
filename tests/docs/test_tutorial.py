"""The tutorial's programs and its notebook do what the tutorial says, under each start method."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests._notebook import own_environment, processes_in

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "examples" / "tutorial"
NOTEBOOK = TUTORIAL / "tutorial.ipynb"
PROGRAMS = ("1_cpu_count", "2_process", "3_queue", "4_process_queue_lock", "5_pool")

LAUNCH = """
import runpy, sys, {library} as mp
if __name__ == "__main__":
    mp.set_start_method("{method}")
    runpy.run_path({path!r}, run_name="__main__")
"""

#: Runs the cells as a kernel does: in __main__, which has no file. The driver's own names stay out of the way.
KERNEL = """
import json, sys
def _run_cells():
    import procession
    procession.set_start_method(sys.argv[2])
    space = sys.modules["__main__"].__dict__
    with open(sys.argv[1], encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"<cell {number}>", "exec"), space)
_run_cells()
"""

#: In a process of its own, for the kernel's client leaves sockets and threads to the garbage collector. A cell's error is raised.
REAL_KERNEL = """
import sys, tempfile
import nbclient, nbformat, traitlets.config
notebook = nbformat.read(sys.argv[1], as_version=4)
first = f"import procession; procession.set_start_method({sys.argv[2]!r})"
notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
# Not TCP, where somebody else may take the port between its choice and its use.
with tempfile.TemporaryDirectory() as directory:
    local = traitlets.config.Config(KernelManager={"transport": "ipc", "ip": directory + "/kernel"})
    nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3", config=local).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", ()):
        sys.stdout.write(output.get("text", ""))
"""


def run(code: str, *arguments: str) -> list[str]:
    # Without PYTHONUNBUFFERED: with it, print() writes a line in pieces, and those of several processes mix.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "TUTORIAL_SPEED": "50"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def run_program(name: str, method: str, library: str = "procession") -> list[str]:
    return run(LAUNCH.format(library=library, method=method, path=str(TUTORIAL / f"{name}.py")))


def test_1_says_how_many_cpus_can_be_used(start_method: str) -> None:
    from procession._proc.limits import cpu_count

    assert run_program("1_cpu_count", start_method) == [f"Number of cpu : {cpu_count()}"]


def test_2_prints_the_default_and_the_three_names(start_method: str) -> None:
    expected = {f"The name of continent is : {name}" for name in ("Asia", "America", "Europe", "Africa")}
    lines = run_program("2_process", start_method)
    assert (4, expected) == (len(lines), set(lines))


@pytest.mark.parametrize("attempt", range(5))
def test_3_pops_every_colour_every_time(start_method: str, attempt: int) -> None:
    """With the standard library's empty() about half of the runs lose some."""
    lines = run_program("3_queue", start_method)
    popped = lines[lines.index("popping items from queue:") + 1 :]
    assert ["item no: 0 red", "item no: 1 green", "item no: 2 blue", "item no: 3 black"] == popped


def test_4_does_all_ten_tasks_once_each_and_says_who(start_method: str) -> None:
    lines = run_program("4_process_queue_lock", start_method)
    done = [match for line in lines if (match := re.fullmatch(r"(Task no \d) is done by (\S+)", line))]
    tasks = [f"Task no {number}" for number in range(10)]
    assert tasks == sorted(match[1] for match in done)
    assert {match[2] for match in done} <= {f"Process-{number}" for number in range(1, 5)}
    # What the workers printed under the lock: ten whole lines.
    assert Counter(tasks) == Counter(line for line in lines if "done" not in line)


def test_4_with_the_misplaced_return_does_one_task_a_worker(tmp_path: Path, start_method: str) -> None:
    """What docs/tutorial says of the version that is copied most: six of the ten tasks are never done."""
    text = (TUTORIAL / "4_process_queue_lock.py").read_text()
    flawed = text.replace("time.sleep(PAUSE)\n    return True", "time.sleep(PAUSE)\n        return True")
    assert flawed != text
    script = tmp_path / "flawed.py"
    script.write_text(flawed)
    lines = run(LAUNCH.format(library="procession", method=start_method, path=str(script)))
    assert len([line for line in lines if "is done by" in line]) == 4


def test_5_finishes_four_jobs(start_method: str) -> None:
    lines = run_program("5_pool", start_method)
    assert [f"Process {name} Finished." for name in "ABCD"] == sorted(line for line in lines if "Finished" in line)
    assert len(lines) == 8


def test_programs_are_unchanged_but_for_the_import() -> None:
    """Each runs with the standard library as well: nothing in them is procession's own."""
    for name in PROGRAMS:
        text = (TUTORIAL / f"{name}.py").read_text()
        assert len(re.findall(r"^(?:import procession as mp|from procession import .*)$", text, re.MULTILINE)) == 1
        assert text.count("procession") == 1


@pytest.mark.parametrize("name", ["1_cpu_count", "2_process", "5_pool"])
def test_programs_run_with_the_standard_library(name: str, tmp_path: Path) -> None:
    """3 and 4 do as well, most of the time; which is what the pages are about."""
    script = tmp_path / f"{name}.py"
    script.write_text((TUTORIAL / f"{name}.py").read_text().replace("procession", "multiprocessing"))
    assert run(LAUNCH.format(library="multiprocessing", method="fork", path=str(script)))


def check_notebook(text: str) -> None:
    assert "[0, 0, 0, 0]" in text
    assert re.search(r"^10$", text, re.MULTILINE)
    assert "['red', 'green', 'blue', 'black']" in text
    assert "10 tasks, 10 different ones" in text
    assert str([f"Process {name} Finished." for name in "ABCD"]) in text


def test_notebook_cells_run_as_in_a_kernel(start_method: str) -> None:
    """Functions of __main__ without a file: under forkserver and spawn the standard library cannot send them."""
    lines = run(KERNEL, str(NOTEBOOK), start_method)
    check_notebook("\n".join(lines))
    assert len([line for line in lines if line.startswith("The name of continent")]) == 4


def test_notebook_runs_in_a_real_kernel(start_method: str, wait_until) -> None:
    with own_environment() as environment:
        done = subprocess.run(
            [sys.executable, "-c", REAL_KERNEL, str(NOTEBOOK), start_method],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            env={**environment, "TUTORIAL_SPEED": "50"},
        )
        assert 0 == done.returncode
        check_notebook(done.stdout)
        wait_until(lambda: not processes_in(environment), "the end of the kernel and of all that it has started")


def test_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_pages_show_the_programs_code() -> None:
    """Each page's blocks compile; the worker on page 4 is the program's."""
    pages = sorted((ROOT / "docs" / "tutorial").glob("*_*.md"))
    assert [page.stem for page in pages] == list(PROGRAMS)
    for page in pages:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if not block.startswith(" "):  # the flawed lines of page 4 are a part of a function
                compile(block, page.name, "exec")


@pytest.mark.parametrize("page", ["1_cpu_count", "2_process", "3_queue"])
def test_every_block_of_a_page_runs(page: str, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "tutorial" / f"{page}.md").read_text()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)):
        script = tmp_path / f"block{number}.py"
        script.write_text(block)
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), block
        assert done.stdout
