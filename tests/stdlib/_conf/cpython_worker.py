"""Run some tests of a conf_test_<method> module and write one JSON line per
event.  Started by run_cpython.py; children of the tests may import this file
again as __mp_main__, so nothing happens at import."""

import json
import os
import sys
import time
import unittest


class Events:
    def __init__(self, path):
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.pid = os.getpid()

    def __call__(self, ev, **kw):
        if os.getpid() == self.pid:
            os.write(self.fd, (json.dumps({"ev": ev, "t": time.monotonic(), **kw}) + "\n").encode())


def test_id(test):
    return ".".join(test.id().split(".")[-2:])


class Result(unittest.TestResult):
    def __init__(self, events):
        super().__init__()
        self.events = events
        self.outcome = None

    def startTest(self, test):
        self.outcome = None
        self.events("start", id=test_id(test))
        super().startTest(test)

    def stopTest(self, test):
        outcome, text = self.outcome or ("pass", "")
        self.events("end", id=test_id(test), outcome=outcome, text=text[-6000:])
        super().stopTest(test)

    def note(self, test, outcome, text):
        if isinstance(test, unittest.TestCase) or hasattr(test, "test_case"):
            if self.outcome is None or self.outcome[0] == "skip":
                self.outcome = outcome, text
        else:  # setUpClass, tearDownModule, ...
            self.events("fixture", id=str(test), outcome=outcome, text=text[-6000:])

    def addError(self, test, err):
        self.note(test, "error", self._exc_info_to_string(err, test))

    def addFailure(self, test, err):
        self.note(test, "fail", self._exc_info_to_string(err, test))

    def addSubTest(self, test, subtest, err):
        if err is not None:
            failed = issubclass(err[0], test.failureException)
            self.note(test, "fail" if failed else "error", f"{subtest}\n" + self._exc_info_to_string(err, test))

    def addSkip(self, test, reason):
        self.note(test, "skip", reason)

    def addExpectedFailure(self, test, err):
        pass

    def addUnexpectedSuccess(self, test):
        self.note(test, "fail", "unexpected success")

    def addDuration(self, test, elapsed):
        pass


def flatten(suite):
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from flatten(item)
        else:
            yield item


def main():
    mode, module_name, ids_file, events_path = sys.argv[1:5]
    import faulthandler

    faulthandler.enable()
    import importlib

    module = importlib.import_module(module_name)
    loader = unittest.TestLoader()
    tests = {test_id(t): t for t in flatten(loader.loadTestsFromModule(module))}
    if mode == "list":
        with open(ids_file, "w") as f:
            json.dump(list(tests), f)
        return
    with open(ids_file) as f:
        wanted = json.load(f)
    events = Events(events_path)
    from test import support

    suite = unittest.TestSuite(tests[i] for i in wanted if i in tests)
    del tests
    result = Result(events)
    suite.run(result)
    events("done", env_changed=bool(getattr(support, "environment_altered", False)))


if __name__ == "__main__":
    main()
