"""`install()`: ``import multiprocessing`` gives procession.

The standard library's modules are changed in place, so that it does not matter how a program names what it uses:
``multiprocessing.Queue``, ``from multiprocessing.pool import Pool``, ``multiprocessing.get_context("spawn")``,
``concurrent.futures.ProcessPoolExecutor``. Call it before the program's other imports: a name that somebody has
already imported stays what it was. Child processes get the same, whatever the start method.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing import context as _std_context
from multiprocessing import pool as _std_pool
from multiprocessing import queues as _std_queues
from multiprocessing import synchronize as _std_synchronize
from types import ModuleType

from procession import context, pool, queues, synchronize
from procession._proc.popen import on_arrival

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["install"]

# What the standard library's own modules look up, and what programs import from them.
_CLASSES = {
    _std_context: (
        context,
        (
            "DefaultContext",
            "ForkContext",
            "ForkProcess",
            "ForkServerContext",
            "ForkServerProcess",
            "Process",
            "SpawnContext",
            "SpawnProcess",
        ),
    ),
    _std_pool: (pool, ("Pool", "RemoteTraceback")),
    _std_synchronize: (
        synchronize,
        ("Barrier", "BoundedSemaphore", "Condition", "Event", "Lock", "RLock", "Semaphore"),
    ),
}


class _QueueAlias(type):
    """The type of what `multiprocessing.queues.Queue` and its like are after `install()`.

    Calling one makes ours. A subclass of one is a subclass of the standard library's: those who derive from it
    (concurrent.futures, loky, torch) override its feeder thread and reach into its pipe.
    """

    ours: type
    std: type

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        real = tuple(base.std if isinstance(base, _QueueAlias) else base for base in bases)
        return type(name, real, namespace, **options)

    @classmethod
    def make(cls, ours: type, std: type) -> _QueueAlias:
        """Return an alias that stands for both classes and makes the first."""
        # The standard library's own code says Queue.__init__(self, ...) and means its own.
        namespace = {
            name: vars(std)[name] for name in ("__init__", "__getstate__", "__setstate__") if name in vars(std)
        }
        namespace |= {
            "__doc__": ours.__doc__,
            "__module__": std.__module__,
            "__qualname__": std.__qualname__,
            "ours": ours,
            "std": std,
        }
        return type.__new__(cls, std.__name__, (), namespace)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return cls.ours(*args, **options)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.ours, name) if hasattr(cls.ours, name) else getattr(cls.std, name)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, (cls.ours, cls.std))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, (cls.ours, cls.std))


def install() -> None:
    """Have ``import multiprocessing`` give procession, in this process and its children.

    Can be called any number of times. There is no way back within the process.

    Example:
        >>> import procession
        >>> procession.install()  # doctest: +SKIP
        >>> import multiprocessing
        >>> multiprocessing.Process is procession.Process  # doctest: +SKIP
        True
    """
    if _std_context.Process is context.Process:
        return
    # First, and for good with the standard library's Queue as the base of its _SafeQueue: see _QueueAlias.
    import concurrent.futures.process  # noqa: F401

    new: dict[int, Any] = {}
    for std, (ours, names) in _CLASSES.items():
        for name in names:
            new[id(getattr(std, name))] = getattr(ours, name)
    for name in ("JoinableQueue", "Queue", "SimpleQueue"):
        original = getattr(_std_queues, name)
        new[id(original)] = _QueueAlias.make(getattr(queues, name), original)
    # The functions of the package: methods of its default context, which its submodules have imported by name.
    for name in multiprocessing.__all__:
        if hasattr(context._default_context, name):
            new[id(getattr(multiprocessing, name))] = getattr(context._default_context, name)
    # By identity and in every module at once: `from . import get_context` has left copies of the names.
    for module_name, module in list(sys.modules.items()):
        if module_name == "multiprocessing" or module_name.startswith("multiprocessing."):
            _replace(module, new)
    _adopt_contexts()
    on_arrival(install)


def _replace(module: ModuleType, new: dict[int, Any]) -> None:
    for name, value in list(vars(module).items()):
        if id(value) in new:
            setattr(module, name, new[id(value)])


def _adopt_contexts() -> None:
    """Make the standard library's table of contexts and its default context give ours."""
    _std_context._concrete_contexts.update(context._concrete_contexts)  # type: ignore[attr-defined]
    default: Any = _std_context._default_context
    # It goes on keeping the start method, for both: see procession.context.
    for attribute in ("_default_context", "_actual_context"):
        kept = getattr(default, attribute)
        if kept is not None:
            setattr(default, attribute, context._concrete_contexts[kept._name])
    # Whoever holds this object, or has it from multiprocessing.context, gets ours from it as well.
    for name in vars(context.Factories):
        if not name.startswith("_") and name != "get_context":
            setattr(default, name, getattr(context._default_context, name))
    default.Process = context.Process


class _CallableModule(ModuleType):
    """The module `procession.install`: importing it hides the function `procession.install`, so it can be called."""

    def __call__(self) -> None:
        install()


sys.modules[__name__].__class__ = _CallableModule
