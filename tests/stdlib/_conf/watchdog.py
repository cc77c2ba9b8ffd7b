"""Run test processes that report what they do in an events file (one JSON
line an event), end those that hang, and go on with the tests left over.

The tests of one group (a test class, a test file) run in one process, in a
session of its own.  When no event comes for `timeout` seconds every process of
that session gets SIGABRT, on which faulthandler writes its stacks to the log,
then SIGKILL; the test that ran counts as a hang and a new process runs the
tests left over.
"""

import json
import os
import re
import signal
import subprocess
import time


class Group:
    """`command(ids_file, events_file)` gives the argv that runs those tests."""

    def __init__(self, name, ids, command, env, workdir, timeout=120.0, exit_grace=60.0, max_restarts=None):
        self.name = name
        self.ids = list(ids)
        self.command = command
        self.env = env
        self.workdir = workdir
        self.timeout = timeout
        self.exit_grace = exit_grace
        self.max_restarts = len(self.ids) + 2 if max_restarts is None else max_restarts
        self.results = {}
        self.fixtures = {}
        self.env_changed = False
        self.leftover = 0
        self.seconds = 0.0

    def run(self):
        start = time.monotonic()
        os.makedirs(self.workdir, exist_ok=True)
        left = list(self.ids)
        for attempt in range(self.max_restarts + 1):
            if not left:
                break
            before = len(left)
            reason = self._once(left, attempt)
            left = [i for i in left if i not in self.results]
            if reason is None and len(left) == before:
                reason = ("error", "the test process ended without running it")
            if reason is not None and left:
                if len(left) == before:  # nothing ran: no use to go on
                    for i in left:
                        self.results[i] = dict(outcome=reason[0], time=0.0, text=reason[1])
                    left = []
        for i in left:
            self.results[i] = dict(outcome="error", time=0.0, text="not run: too many restarts")
        self.seconds = time.monotonic() - start
        return self

    def _once(self, left, attempt):
        base = os.path.join(self.workdir, f"{attempt}")
        ids_file, events_file, log = base + ".ids", base + ".events", base + ".log"
        with open(ids_file, "w") as f:
            json.dump(left, f)
        open(events_file, "w").close()
        cwd = base + ".cwd"
        os.makedirs(cwd, exist_ok=True)
        with open(log, "wb") as logf:
            proc = subprocess.Popen(
                self.command(ids_file, events_file),
                cwd=cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=logf,
                stderr=logf,
                start_new_session=True,
            )
        state = dict(running=None, since=0.0, done=False, fixture_errors=[])
        last = time.monotonic()
        hung = None
        with open(events_file, "rb") as events:
            rest = b""
            while True:
                ended = proc.poll() is not None
                chunk = events.read()
                if chunk:
                    last = time.monotonic()
                    rest += chunk
                    *lines, rest = rest.split(b"\n")
                    for line in lines:
                        self._event(json.loads(line), state)
                    continue
                if ended:
                    break
                limit = self.exit_grace if state["done"] else self.timeout
                if time.monotonic() - last > limit:
                    hung = limit
                    break
                time.sleep(0.02)
        if hung is not None:
            self._signal_session(proc.pid, signal.SIGABRT)
            time.sleep(1.0)
        self.leftover += self._signal_session(proc.pid, signal.SIGKILL, not_counted=proc.pid)
        proc.wait()
        tail = self._tail(log)
        if hung is not None:
            text = f"no progress for {hung:.0f} s\n{tail}"
            if state["running"]:
                self.results[state["running"]] = dict(outcome="hang", time=hung, text=text)
                return ("hang", text)
            if state["done"]:
                self.fixtures["(exit)"] = dict(outcome="hang", text="the test process did not exit\n" + tail)
                return None
            self.fixtures[f"(between tests, run {attempt})"] = dict(outcome="hang", text=text)
            return ("hang", "in a class or module fixture: " + text)
        if state["running"]:
            text = f"the test process ended with {proc.returncode}\n{tail}"
            self.results[state["running"]] = dict(outcome="crash", time=0.0, text=text)
            return ("crash", text)
        if not state["done"]:
            text = f"the test process ended with {proc.returncode}\n{tail}"
            if all(i in self.results for i in left):
                self.fixtures["(exit)"] = dict(outcome="crash", text=text)
            return ("crash", text)
        if state["fixture_errors"]:
            # setUpClass or setUpModule failed: the tests it kept from running
            bad = state["fixture_errors"][0]
            if bad[0] == "skip":
                for i in left:
                    self.results.setdefault(i, dict(outcome="skip", time=0.0, text=bad[1]))
            else:
                for i in left:
                    self.results.setdefault(i, dict(outcome="error", time=0.0, text=bad[1]))
        return None

    def _event(self, e, state):
        ev = e["ev"]
        if ev == "start":
            state["running"], state["since"] = e["id"], e["t"]
        elif ev == "end":
            self.results[e["id"]] = dict(
                outcome=e["outcome"], time=round(e["t"] - state["since"], 3), text=e.get("text", "")
            )
            state["running"] = None
        elif ev == "fixture":
            state["fixture_errors"].append((e["outcome"], e["id"] + "\n" + e["text"]))
            if e["outcome"] != "skip":
                self.fixtures[e["id"]] = dict(outcome=e["outcome"], text=e["text"])
        elif ev == "done":
            state["done"] = True
            self.env_changed |= bool(e.get("env_changed"))

    @staticmethod
    def _tail(path, size=8000):
        with open(path, "rb") as f:
            f.seek(0, 2)
            f.seek(max(0, f.tell() - size))
            return f.read().decode(errors="replace")

    @staticmethod
    def _signal_session(sid, signum, not_counted=None):
        """Signal every process whose session is `sid`; how many there were."""
        count = 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/stat", "rb") as f:
                    fields = f.read().rpartition(b")")[2].split()
                if int(fields[3]) == sid and fields[0] != b"Z":
                    os.kill(int(pid), signum)
                    count += int(pid) != not_counted
            except (OSError, ValueError, IndexError):
                pass
        return count


def default_sigint():
    """A background job of a shell ignores SIGINT, and so would every child: the
    tests that want KeyboardInterrupt would fail.  A signal that Python catches
    is set back to its default on exec."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)


BAD = ("fail", "error", "hang", "crash")


def count(outcomes):
    outcomes = list(outcomes)
    return (sum(o == "pass" for o in outcomes), sum(o in BAD for o in outcomes), sum(o == "skip" for o in outcomes))


def line(passed, failed, skipped, word=""):
    return f"{word}{passed} passed, {failed} failed, {skipped} skipped"


def short(text):
    """The line of a traceback that says what went wrong."""
    lines = [l.strip() for l in text.strip().splitlines() if l.strip()]
    for l in lines:  # as pytest marks it
        if re.match(r"^E\s+\S", l):
            return l[1:].strip()[:200]
    for l in reversed(lines):
        if re.match(r"^[\w.]+(Error|Exception|Warning|Interrupt|Exit|Empty|Full)\b", l):
            return l[:200]
    return (lines[0] if lines else "")[:200]
