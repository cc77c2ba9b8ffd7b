"""Every public name of the running interpreter's multiprocessing is there, under the same module names."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import subprocess
import sys

import pytest

import procession

SUBMODULES = (
    "connection",
    "context",
    "dummy",
    "managers",
    "pool",
    "process",
    "queues",
    "reduction",
    "shared_memory",
    "sharedctypes",
    "synchronize",
    "util",
)

OWN_CLASSES = (
    "Barrier",
    "BoundedSemaphore",
    "Condition",
    "Event",
    "JoinableQueue",
    "Lock",
    "Queue",
    "RLock",
    "Semaphore",
    "SimpleQueue",
)


def test_all_has_every_public_name_of_multiprocessing() -> None:
    assert set(multiprocessing.__all__) - set(procession.__all__) == set()


@pytest.mark.parametrize("name", sorted(procession.__all__))
def test_every_name_in_all_can_be_had_and_is_listed_by_dir(name: str) -> None:
    assert getattr(procession, name) is not None or name == "parent_process"
    assert name in dir(procession)


def test_star_import_gives_exactly_all() -> None:
    namespace: dict[str, object] = {}
    exec("from procession import *", namespace)
    assert {name for name in namespace if name != "__builtins__"} == set(procession.__all__)


@pytest.mark.parametrize("name", SUBMODULES)
def test_submodule_has_the_public_names_of_the_standard_librarys(name: str) -> None:
    std = importlib.import_module(f"multiprocessing.{name}")
    own = importlib.import_module(f"procession.{name}")
    assert getattr(procession, name) is own
    for public in std.__all__:
        assert hasattr(own, public), public


@pytest.mark.parametrize("name", ["connection", "managers", "shared_memory", "sharedctypes", "util", "reduction"])
def test_what_is_not_replaced_is_the_standard_librarys_module(name: str) -> None:
    """Monkeypatching, private names and live globals work because it is the module and not a copy of its names."""
    assert importlib.import_module(f"procession.{name}") is importlib.import_module(f"multiprocessing.{name}")


def test_dummy_and_its_submodule_are_loaded_once() -> None:
    connection = importlib.import_module("procession.dummy.connection")
    assert connection is importlib.import_module("multiprocessing.dummy.connection")
    assert procession.dummy.connection is connection


@pytest.mark.parametrize("name", ["queues", "synchronize", "pool", "context", "process"])
def test_private_names_fall_back_to_the_standard_librarys(name: str) -> None:
    private = {
        "queues": "_sentinel",
        "synchronize": "SemLock",
        "pool": "mapstar",
        "context": "_tls",
        "process": "_children",
    }[name]
    std = importlib.import_module(f"multiprocessing.{name}")
    assert getattr(importlib.import_module(f"procession.{name}"), private) is getattr(std, private)


@pytest.mark.parametrize("name", OWN_CLASSES)
def test_primitives_are_our_own(name: str) -> None:
    made = getattr(procession, name)(*([2] if name == "Barrier" else []))
    assert type(made).__module__.partition(".")[0] == "procession"
    assert isinstance(made, getattr(procession.queues if "Queue" in name else procession.synchronize, name))


def test_a_name_nobody_has_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'procession' has no attribute 'no_such_name'"):
        procession.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from procession import no_such_name")


def test_names_of_multiprocessing_outside_all_are_served_too() -> None:
    assert procession.SUBDEBUG == multiprocessing.SUBDEBUG


def test_import_loads_nothing() -> None:
    """A worker pays for what it touches; the whole of multiprocessing is 10 to 20 ms."""
    code = (
        "import sys; before = set(sys.modules); import procession;"
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('procession')));"
        "print(*sorted(m for m in sys.modules if m.startswith('procession')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["__future__", "procession"]


def test_errors_can_be_caught_as_the_standard_librarys_and_pickled() -> None:
    assert issubclass(procession.ProcessDiedError, multiprocessing.ProcessError)
    assert procession.TimeoutError is multiprocessing.TimeoutError
    error = procession.ProcessDiedError("p", 7, -9)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert "SIGKILL" in str(error)
