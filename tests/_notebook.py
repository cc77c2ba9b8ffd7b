"""A notebook with a real kernel: cells are run, the stop button pressed, and whatever the kernel says is kept.

The kernel's client lives in a process of its own (``python -m tests._notebook``), for it leaves sockets and threads to the
garbage collector. What the test asks of it is a line of JSON on its stdin, the answer one on its stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]

# How long a cell may take before it counts as hanging; long, because a loaded machine is slow.
_PATIENCE_S = 60.0


@contextlib.contextmanager
def own_environment() -> Iterator[dict[str, str]]:
    """The environment of a kernel and its client whose files are all in a directory of their own, which is removed.

    Its name is short, for the address of a fork server's socket is in it. A fork server's files stay when its kernel is
    killed; and killed it is where there is a resource tracker, for whose end ipykernel waits, and which ignores SIGTERM.
    """
    directory = tempfile.mkdtemp(prefix="nb")
    # In pytest a kernel would not look at what is written to its descriptors, as it does elsewhere.
    hidden = ("JUPYTER_", "JPY_", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        environment[name] = f"{directory}/{name.lower()}"
    # The debugger's words about frozen modules are none of a cell's.
    environment.update(TMPDIR=directory, PYDEVD_DISABLE_FILE_VALIDATION="1")
    try:
        yield environment
    finally:
        for pid in processes_in(environment):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def processes_in(environment: dict[str, str]) -> dict[int, str]:
    """The command lines of all that runs in an `own_environment`: kernels, their clients and what these have started.

    A kernel is the leader of a session, so the leak check does not see what it leaves behind.
    """
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("IPYTHONDIR") == environment["IPYTHONDIR"]:
                found[process.pid] = " ".join(process.cmdline())
    return found


class Cell:
    """What a cell has brought about.

    Attributes:
        number: By which its messages name it.
        messages: All that the kernel has published since the cell before had ended, whichever cell it belongs to.
        seconds: How long it took from the stop button, or else from its beginning, to the cell's end.
    """

    def __init__(self, number: str, messages: list[dict[str, Any]], seconds: float) -> None:
        self.number = number
        self.messages = messages
        self.seconds = seconds

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The contents of the messages of a kind."""
        return [message["content"] for message in self.messages if message["kind"] == kind]

    @property
    def text(self) -> str:
        """All that was written to stdout and stderr."""
        return "".join(content["text"] for content in self.of("stream"))

    @property
    def errors(self) -> list[str]:
        """The names of the exceptions that were shown."""
        return [content["ename"] for content in self.of("error")]

    @property
    def result(self) -> str | None:
        """The repr of its last line's value."""
        shown = [content["data"]["text/plain"] for content in self.of("execute_result")]
        return shown[0] if shown else None

    @property
    def strays(self) -> list[dict[str, Any]]:
        """What came in this cell's time and belongs to another."""
        return [message for message in self.messages if message["parent"] != self.number]


class Notebook:
    """A kernel and its client.

    Args:
        environment: What `own_environment` has given.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._client = subprocess.Popen(
            [sys.executable, "-m", "tests._notebook"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def run(self, code: str) -> Cell:
        """Run a cell to its end."""
        self.begin(code)
        return self.finish()

    def begin(self, code: str) -> None:
        """Run a cell, and do not wait for it."""
        self._ask("begin", code)

    def stop(self) -> None:
        """Press the stop button."""
        self._ask("stop")

    def finish(self) -> Cell:
        """Wait until the cell has ended."""
        answer = self._ask("finish")
        assert "hangs" not in answer, f"{answer['hangs']}\n{json.dumps(answer['messages'], indent=1)}"
        return Cell(answer["number"], answer["messages"], answer["seconds"])

    def shutdown(self, *, now: bool = False) -> Cell:
        """End the kernel: ask it to, or kill it."""
        answer = self._ask("shutdown", now)
        return Cell("", answer["messages"], answer["seconds"])

    def close(self) -> None:
        """End the kernel, if that has not been done, and the client."""
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        self._client.stdin.close()
        self._client.stdout.close()
        self._client.wait()

    def _ask(self, *question: object) -> dict[str, Any]:
        assert self._client.stdin is not None
        self._client.stdin.write(json.dumps(question) + "\n")
        self._client.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._client.stdout is not None
        line = self._client.stdout.readline()
        assert line, "the kernel's client has ended; its stderr says why"
        answer: dict[str, Any] = json.loads(line)
        return answer


# -- the client's side


class _Client:
    def __init__(self) -> None:
        from jupyter_client.manager import KernelManager

        # Not TCP, where somebody else may take the port between its choice and its use.
        self.manager = KernelManager(transport="ipc", ip=os.environ["TMPDIR"] + "/kernel")
        # The client's stdout is for answers.
        self.manager.start_kernel(stdout=sys.stderr, stderr=sys.stderr)
        self.client = self.manager.client()
        # Seconds until a kernel is killed that waits for the end of a resource tracker: 5 make each test 2.5 s longer.
        self.manager.shutdown_wait_time = 2.0
        self.number = ""
        self.since = 0.0

    def begin(self, code: str) -> dict[str, Any]:
        self.since = time.monotonic()
        self.number = self.client.execute(code)
        return {}

    def stop(self) -> dict[str, Any]:
        self.since = time.monotonic()
        self.manager.interrupt_kernel()
        return {}

    def finish(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        answer = {"number": self.number, "messages": messages}
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            message = self.published(max(0.0, deadline - time.monotonic()))
            if message is None:
                return {**answer, "hangs": f"a cell has not ended within {_PATIENCE_S:g} s"}
            messages.append(message)
            ours = (message["kind"], message["parent"]) == ("status", self.number)
            if ours and message["content"]["execution_state"] == "idle":
                return {**answer, "seconds": time.monotonic() - self.since}

    def shutdown(self, now: bool) -> dict[str, Any]:
        since = time.monotonic()
        self.manager.shutdown_kernel(now=now)
        seconds = time.monotonic() - since
        messages = []
        while (message := self.published(0.2)) is not None:
            messages.append(message)
        self.client.stop_channels()
        return {"messages": messages, "seconds": seconds}

    def published(self, within: float) -> dict[str, Any] | None:
        from queue import Empty

        try:
            message = self.client.get_iopub_msg(timeout=within)
        except Empty:
            return None
        parent = message["parent_header"].get("msg_id")
        return {"kind": message["msg_type"], "parent": parent, "content": message["content"]}

    def serve(self) -> None:
        try:
            self.client.start_channels()
            self.client.wait_for_ready(timeout=_PATIENCE_S)
            print("{}", flush=True)
            for line in sys.stdin:
                name, *arguments = json.loads(line)
                print(json.dumps(getattr(self, name)(*arguments)), flush=True)
        finally:
            if self.manager.has_kernel:
                self.manager.shutdown_kernel(now=True)
            self.client.stop_channels()


if __name__ == "__main__":
    _Client().serve()
