"""Privacy control: mp_alias with every primitive, queue and pool wrapped so that
only the documented methods can be reached.

It behaves as the standard library does and shows none of its internals, so the
tests that pass with multiprocessing and fail here are those that lean on
internals.  Each of them is then read: known.txt says what it leans on.
"""

import sys

import mp_alias

_KEY = "\0inner"


class _Wrapper:
    _public = ()

    def __init__(self, inner):
        self.__dict__[_KEY] = inner

    def __getattr__(self, name):
        if name in type(self)._public:
            return getattr(self.__dict__[_KEY], name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __reduce__(self):
        return type(self), (self.__dict__[_KEY],)

    def __repr__(self):
        return repr(self.__dict__[_KEY])


class _Managed(_Wrapper):
    def __enter__(self):
        r = self.__dict__[_KEY].__enter__()
        return self if r is self.__dict__[_KEY] else r

    def __exit__(self, *args):
        return self.__dict__[_KEY].__exit__(*args)


class OpaqueLock(_Managed):
    _public = "acquire release".split()


class OpaqueRLock(_Managed):
    _public = "acquire release".split()


class OpaqueSemaphore(_Managed):
    _public = "acquire release get_value".split()


class OpaqueBoundedSemaphore(_Managed):
    _public = "acquire release get_value".split()


class OpaqueCondition(_Managed):
    _public = "acquire release wait wait_for notify notify_all".split()


class OpaqueEvent(_Wrapper):
    _public = "is_set set clear wait".split()


class OpaqueBarrier(_Wrapper):
    _public = "wait reset abort parties n_waiting broken".split()


class OpaqueQueue(_Wrapper):
    _public = ("qsize empty full put get put_nowait get_nowait close join_thread cancel_join_thread").split()


class OpaqueJoinableQueue(OpaqueQueue):
    _public = OpaqueQueue._public + ["task_done", "join"]


class OpaqueSimpleQueue(_Wrapper):
    _public = "close empty get put".split()


class OpaquePool(_Managed):
    _public = ("apply apply_async map map_async imap imap_unordered starmap starmap_async close terminate join").split()


def _bare(lock):
    return lock.__dict__[_KEY] if isinstance(lock, _Wrapper) else lock


class _Own:
    def Lock(self):
        return OpaqueLock(super().Lock())

    def RLock(self):
        return OpaqueRLock(super().RLock())

    def Semaphore(self, value=1):
        return OpaqueSemaphore(super().Semaphore(value))

    def BoundedSemaphore(self, value=1):
        return OpaqueBoundedSemaphore(super().BoundedSemaphore(value))

    def Event(self):
        from multiprocessing.synchronize import Event as Real

        return OpaqueEvent(Real(ctx=self._bare_context()))

    def Condition(self, lock=None):
        from multiprocessing.synchronize import Condition as Real

        return OpaqueCondition(Real(_bare(lock), ctx=self._bare_context()))

    def Barrier(self, parties, action=None, timeout=None):
        from multiprocessing.synchronize import Barrier as Real

        return OpaqueBarrier(Real(parties, action, timeout, ctx=self._bare_context()))

    def Queue(self, maxsize=0):
        from multiprocessing.queues import Queue as Real

        return OpaqueQueue(Real(maxsize, ctx=self._bare_context()))

    def JoinableQueue(self, maxsize=0):
        from multiprocessing.queues import JoinableQueue as Real

        return OpaqueJoinableQueue(Real(maxsize, ctx=self._bare_context()))

    def SimpleQueue(self):
        from multiprocessing.queues import SimpleQueue as Real

        return OpaqueSimpleQueue(Real(ctx=self._bare_context()))

    def Pool(self, processes=None, initializer=None, initargs=(), maxtasksperchild=None):
        from multiprocessing.pool import Pool as Real

        return OpaquePool(Real(processes, initializer, initargs, maxtasksperchild, context=self._bare_context()))

    def _bare_context(self):
        return mp_alias._contexts[self.get_start_method()]

    def get_context(self, method=None):
        if method is None:
            return self
        try:
            return _contexts[method]
        except KeyError:
            raise ValueError(f"cannot find context for {method!r}") from None


class ForkContext(_Own, mp_alias.ForkContext):
    pass


class SpawnContext(_Own, mp_alias.SpawnContext):
    pass


class ForkServerContext(_Own, mp_alias.ForkServerContext):
    pass


_contexts = {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}


class DefaultContext(_Own, mp_alias.DefaultContext):
    def get_context(self, method=None):
        name = mp_alias.DefaultContext.get_context(self, method)._name
        return _contexts[name]


_default = DefaultContext(_contexts["fork"])
_names = [n for n in dir(_default) if not n.startswith("_")]
globals().update((n, getattr(_default, n)) for n in _names)
__all__ = _names + [
    "ForkContext",
    "SpawnContext",
    "ForkServerContext",
    "DefaultContext",
    *(n for n in globals() if n.startswith("Opaque")),
]
if "__main__" in sys.modules:
    sys.modules["__mp_main__"] = sys.modules["__main__"]
