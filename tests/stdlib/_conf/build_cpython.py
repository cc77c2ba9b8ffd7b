"""Make, in a scratch folder, a copy of this interpreter's own
test/_test_multiprocessing.py, or of its test_concurrent_futures, that tests
another module than multiprocessing.

Runs under the interpreter whose test suite is wanted.  Only import lines and
a few strings are rewritten, each in place on its own line, so line numbers in
tracebacks are those of the original file.  Nothing of the copy is to be kept.

What is rewritten, and why:
  * `import multiprocessing.x` / `from multiprocessing[.x] import y`: the name
    `multiprocessing` is bound to a facade (conf_facade.py, made here) that
    serves the names of the module under test, and falls back to the standard
    library's helper modules (connection, heap, util, ...) for what the module
    under test does not ship.
  * scripts held in strings and run with -c or from a file: their
    `import multiprocessing [as mp]` imports the module under test, with the
    needed sys.path entries set on the same line (they run under -I or -E).
  * names by which a child finds the test module again.
  * setUpModule/tearDownModule also set the standard library's start method,
    so that helper classes used bare (SyncManager(), ...) use the method too.

In test_concurrent_futures, beside the imports of multiprocessing:
  * `from concurrent import futures`: the name is bound to a facade as well, in
    which ProcessPoolExecutor is that of the module under test.
  * the same in scripts that are run with -c.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import os
import py_compile
import re
import sys

SUBMODULES = (
    "connection context dummy forkserver heap managers pool popen_fork "
    "popen_forkserver popen_spawn_posix popen_spawn_win32 process queues "
    "reduction resource_sharer resource_tracker shared_memory sharedctypes "
    "spawn synchronize util"
).split()

TEST_MODULE = "_conf_test_multiprocessing"  # test_stderr_flush wants this ending
METHODS = ("fork", "spawn", "forkserver")
EXECUTOR = "ProcessPoolExecutor"
FUTURES_MODULE = "_conf_test_concurrent_futures"
NOT_HERE = "not here: "  # what the message begins with when the interpreter does not ship the tests

FACADE = '''\
"""Made by build_cpython.py: what the names `multiprocessing` and `futures` mean in the copy."""
import importlib
import types
import concurrent.futures.process
import multiprocessing as _std

_NAME = {name!r}
_HELPERS = {helpers!r}
_SUBMODULES = {submodules!r}
_mod = importlib.import_module(_NAME)


def _import(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is not None and (name == e.name or name.startswith(e.name + '.')):
            return None
        raise


class _Sub(types.ModuleType):
    """A helper module of the module under test.  Public names (those in the
    standard library's __all__) must be its own; private ones may fall back."""

    def __init__(self, own, std):
        super().__init__(own.__name__)
        self.__dict__['_conf_own'] = own
        self.__dict__['_conf_std'] = std

    def __getattr__(self, name):
        own, std = self._conf_own, self._conf_std
        try:
            return getattr(own, name)
        except AttributeError:
            if name in getattr(std, '__all__', ()):
                raise
            return getattr(std, name)


def _submodule(name):
    std = _import('multiprocessing.' + name)
    if _mod is _std or _HELPERS == 'stdlib':
        return std
    own = getattr(_mod, name, None)
    if not isinstance(own, types.ModuleType):
        own = _import(_NAME + '.' + name)
    if own is None or own is std:
        return std
    return _Sub(own, std)


class _Facade(types.ModuleType):

    def __getattr__(self, name):
        if name in _SUBMODULES:
            value = _submodule(name)
            if value is None:
                raise AttributeError(name)
            self.__dict__[name] = value
            return value
        try:
            return getattr(_mod, name)
        except AttributeError:
            # a public name of multiprocessing must be served by the module
            if name in _std.__all__:
                raise
            return getattr(_std, name)

    def __dir__(self):
        return dir(_mod)


multiprocessing = _Facade(_NAME, _mod.__doc__)


def _conf_std_method(method):
    if _mod is not _std:
        _std.set_start_method(method, force=True)


class _Futures(types.ModuleType):
    """concurrent.futures, or concurrent.futures.process, with the executor of the module under test if it has one."""

    def __init__(self, std):
        super().__init__(std.__name__)
        self.__dict__['_conf_std'] = std

    def __getattr__(self, name):
        if name == 'process':
            return _Futures(self._conf_std.process)
        if name == 'ProcessPoolExecutor' and hasattr(_mod, name):
            return getattr(_mod, name)
        return getattr(self._conf_std, name)


futures = _Futures(concurrent.futures)
'''

SUITE = """\
import unittest
import {test_module}

{test_module}.install_tests_in_module_dict(globals(), {method!r})
"""

FUTURES_SUITE = '''\
"""The test classes that have a process pool, those that start it by {method}."""
import importlib
import unittest


def load_tests(loader, tests, pattern):
    suite = unittest.TestSuite()
    for name in {modules!r}:
        module = importlib.import_module(name)
        for case in list(vars(module).values()):
            if not isinstance(case, type) or not issubclass(case, unittest.TestCase) or case.__module__ != name:
                continue
            if hasattr(case, 'executor_type'):
                if getattr(case, 'ctx', None) == {method!r}:
                    suite.addTests(loader.loadTestsFromTestCase(case))
            elif hasattr(case, 'test_{method}'):  # one that runs tests of the others
                suite.addTest(case('test_{method}'))
    return suite
'''

TAIL = """

# --- added by build_cpython.py ---
# check_invariant() looks at private counters of the standard library's
# Condition.  Where the Condition under test has none, the rest of the tests
# that call it still counts.
_conf_check_invariant = _TestCondition.check_invariant

def _conf_check_invariant_if_any(self, cond):
    if all(hasattr(cond, a) for a in
           ('_sleeping_count', '_woken_count', '_wait_semaphore')):
        _conf_check_invariant(self, cond)
    elif self.TYPE != 'processes':
        _conf_check_invariant(self, cond)

_TestCondition.check_invariant = _conf_check_invariant_if_any
"""


def offsets(source):
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def rewrite_embedded(text, module, prefix):
    """Rewrite the import lines of a script that is held in a string."""
    own_executor = hasattr(importlib.import_module(module), EXECUTOR)
    out = []
    for line in text.split("\n"):
        m = re.match(r"^(\s*)import multiprocessing(?: as (\w+))?\s*$", line)
        if m:
            line = f"{m[1]}{prefix}import {module} as {m[2] or 'multiprocessing'}"
        else:
            m = re.match(r"^(\s*)from multiprocessing import ([\w, ]+)$", line)
            if m and not {n.strip() for n in m[2].split(",")} <= set(SUBMODULES):
                line = f"{m[1]}{prefix}from {module} import {m[2]}"
            # the name is put in by format(): that of a thread pool too, in classes that are not run
            m = own_executor and re.match(r"^(\s*)from concurrent\.futures import (\{executor_type\})\s*$", line)
            if m:
                line = f"{m[1]}{prefix}from {module} import {m[2]}"
        out.append(line)
    return "\n".join(out)


def rewrite_names(source, module, prefix, own_submodules=()):
    tree = ast.parse(source)
    starts = offsets(source)
    raw = source.encode()
    edits = []

    def span(node):
        return (starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
            if any(n.split(".")[0] == "multiprocessing" for n in names):
                assert all(n.split(".")[0] == "multiprocessing" for n in names), names
                bound = {a.asname or "multiprocessing" for a in node.names}
                assert bound == {"multiprocessing"} or names == ["multiprocessing"], names
                edits.append(
                    (*span(node), f"from conf_facade import multiprocessing as {bound.pop()}, _conf_std_method")
                )
        elif isinstance(node, ast.ImportFrom):
            if node.module == "concurrent" and [a.name for a in node.names] == ["futures"]:
                edits.append((*span(node), "from conf_facade import futures"))
                continue
            if (node.module or "").split(".")[0] != "multiprocessing" or node.level:
                continue
            edits.append((*span(node), "; ".join(f"{a.asname or a.name} = {node.module}.{a.name}" for a in node.names)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            value = node.value
            if "multiprocessing" not in value:
                continue
            start, end = span(node)
            text = raw[start:end].decode()
            if value == "test.test_multiprocessing_forkserver":
                new = repr("conf_test_forkserver")
            elif re.match(r"multiprocessing\.(\w+)\._\w+$", value):
                # a private name that a test patches; the module's own if it has it
                _, sub, attr = value.split(".")
                own = sub in own_submodules and hasattr(importlib.import_module(f"{module}.{sub}"), attr)
                new = repr(value.replace("multiprocessing", module, 1) if own else value)
            else:
                new = rewrite_embedded(text, module, prefix)
            if new != text:
                edits.append((start, end, new))
    edits = sorted(set(edits), reverse=True)
    for start, end, new in edits:
        assert b"\n" not in raw[start:end] or raw[start:end].count(b"\n") == new.count("\n")
        raw = raw[:start] + new.encode() + raw[end:]
    return raw.decode()


def rewrite(source, module, prefix, own_submodules):
    """_test_multiprocessing.py"""
    text = rewrite_names(source, module, prefix, own_submodules)

    def once(old, new):
        nonlocal text
        if text.count(old) != 1:
            raise SystemExit(f"{text.count(old)} places like {old!r}: this version of the test file is not known")
        text = text.replace(old, new)

    once("from test._test_multiprocessing import TestFlags", f"{prefix}from {TEST_MODULE} import TestFlags")
    once(
        "multiprocessing.set_start_method(start_method, force=True)",
        "multiprocessing.set_start_method(start_method, force=True); _conf_std_method(start_method)",
    )
    once(
        "multiprocessing.set_start_method(old_start_method[0], force=True)",
        "multiprocessing.set_start_method(old_start_method[0], force=True); _conf_std_method(old_start_method[0])",
    )
    return text


def provenance(module):
    """Where each public name of multiprocessing comes from in the module."""
    import multiprocessing as std

    mod = importlib.import_module(module)
    out = {"own": [], "stdlib": [], "missing": []}
    for name in std.__all__:
        try:
            value = getattr(mod, name)
        except AttributeError:
            out["missing"].append(name)
            continue
        func = getattr(value, "__func__", value)
        where = getattr(func, "__module__", "") or ""
        if value is getattr(std, name) or where.split(".")[0] == "multiprocessing":
            out["stdlib"].append(name)
        else:
            out["own"].append(name)
    return out


def read(*path):
    try:
        with open(os.path.join(*path), encoding="utf-8") as f:
            return f.read()
    except FileNotFoundError as e:
        version = ".".join(map(str, sys.version_info[:3]))
        raise SystemExit(f"{NOT_HERE}CPython {version} is installed without {e.filename}") from None


def copy_multiprocessing(testdir, write, module, prefix, own_submodules):
    source = read(testdir, "_test_multiprocessing.py")
    write(f"{TEST_MODULE}.py", rewrite(source, module, prefix, own_submodules) + TAIL)
    for method in METHODS:
        write(f"conf_test_{method}.py", SUITE.format(test_module=TEST_MODULE, method=method))
    for script in ("mp_fork_bomb.py", "mp_preload.py"):
        text = read(testdir, script)
        text = text.replace("import multiprocessing, sys", "import multiprocessing\nimport sys")
        text = rewrite_embedded(text, module, prefix)
        write(script, text.replace('"test.mp_preload"', '"mp_preload"'))


def copy_futures(testdir, write, module, prefix):
    """test_concurrent_futures: one file before 3.12, later a package."""
    package = os.path.join(testdir, "test_concurrent_futures")
    if os.path.isdir(package):
        files = {os.path.join(FUTURES_MODULE, f): (package, f) for f in os.listdir(package) if f.endswith(".py")}
        modules = [f"{FUTURES_MODULE}.{f[:-3]}" for _, f in sorted(files.values()) if f.startswith("test_")]
    else:
        files = {f"{FUTURES_MODULE}.py": (testdir, "test_concurrent_futures.py")}
        modules = [FUTURES_MODULE]
    for name, where in files.items():
        # The name also for `from multiprocessing.x import y` in a file that does not import multiprocessing itself.
        text = "from conf_facade import multiprocessing; " + read(*where)
        write(name, rewrite_names(text, module, prefix))
    for method in METHODS:
        write(f"conf_test_{method}.py", FUTURES_SUITE.format(modules=modules, method=method))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--helpers", choices=("auto", "stdlib"), default="auto")
    parser.add_argument("--tests", choices=("multiprocessing", "concurrent_futures"), default="multiprocessing")
    args = parser.parse_args()

    import multiprocessing

    try:
        import test
    except ModuleNotFoundError as e:
        raise SystemExit(f"{NOT_HERE}{sys.executable} is installed without its test package") from e
    testdir = os.path.dirname(os.path.abspath(test.__file__))
    mod = importlib.import_module(args.module)
    spec = importlib.util.find_spec(args.module)
    origin = spec.origin if spec and spec.origin else None

    path = [args.out]
    if mod is not multiprocessing:
        home = origin
        if home and os.path.basename(home).startswith("__init__."):
            home = os.path.dirname(home)
        for _ in range(args.module.count(".") + 1):
            home = home and os.path.dirname(home)
        # and the folders that --path named: children under -I and -E do not see them
        for d in [home, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]:
            if d and d not in path:
                path.append(d)
    prefix = f"import sys; sys.path[:0] = {json.dumps(path)}; "
    if "{" in prefix or "'" in prefix:
        raise SystemExit("braces or quotes in the path of the module: not handled")

    own = []
    if mod is not multiprocessing and args.helpers == "auto":
        for sub in SUBMODULES:
            try:
                if importlib.util.find_spec(f"{args.module}.{sub}") is not None:
                    own.append(sub)
            except ModuleNotFoundError:
                pass

    def write(name, text):
        name = os.path.join(args.out, name)
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w", encoding="utf-8") as f:
            f.write(text)
        py_compile.compile(name, doraise=True)

    write("conf_facade.py", FACADE.format(name=args.module, helpers=args.helpers, submodules=SUBMODULES))
    if args.tests == "multiprocessing":
        copy_multiprocessing(testdir, write, args.module, prefix, own)
    else:
        copy_futures(testdir, write, args.module, prefix)

    print(
        json.dumps(
            {
                "python": ".".join(map(str, sys.version_info[:3])),
                "module": args.module,
                "version": getattr(mod, "__version__", None),
                "helpers": args.helpers,
                "own_submodules": own,
                "names": provenance(args.module),
            }
        )
    )


if __name__ == "__main__":
    main()
