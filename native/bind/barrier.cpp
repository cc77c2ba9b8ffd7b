// The shared half of Barrier; the class with the action is Python's (procession._sync.barrier).
#include "procession/barrier.hpp"

#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* barrier_type = nullptr;

Handle* handle(PyObject* self) noexcept { return reinterpret_cast<Handle*>(self); }
BarrierState& state(PyObject* self) noexcept { return handle(self)->state<BarrierState>(); }
BarrierOps ops(PyObject* self) noexcept { return BarrierOps(handle(self)->view->arena, handle(self)->view->me); }

PyObject* raise_broken() noexcept {
  PyObject* m = PyImport_ImportModule("threading");
  PyObject* c = m == nullptr ? nullptr : PyObject_GetAttrString(m, "BrokenBarrierError");
  Py_XDECREF(m);
  if (c != nullptr) PyErr_SetNone(c);
  Py_XDECREF(c);
  return nullptr;
}

/// wait(action or None, timeout or None) -> index. The last to come runs the action, then lets the others go.
PyObject* wait(PyObject* self, PyObject* args) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  PyObject* action = Py_None;
  PyObject* timeout = nullptr;
  i64 deadline = kForever;
  if (!PyArg_ParseTuple(args, "|OO", &action, &timeout) || !parse_timeout(timeout, &deadline)) return nullptr;
  const BarrierOps b = ops(self);
  RosterEntry* e = nullptr;
  u32 index = 0;
  PyWaiter waiter(deadline);
  for (;;) {
    switch (b.arrive(state(self), action != Py_None, &e, &index, waiter)) {
      case BarrierOps::Arrival::kInterrupted: waiter.resume(); return PyErr_Occurred() ? nullptr : raise_broken();
      case BarrierOps::Arrival::kFull: waiter.resume(); return raise_no_memory(handle(self)->view, sizeof(RosterChunk));
      case BarrierOps::Arrival::kBroken: waiter.resume(); return raise_broken();
      case BarrierOps::Arrival::kBusy: {
        const Wait r = b.wait_idle(state(self), waiter);
        if (r == Wait::kInterrupted) return nullptr;
        if (r == Wait::kTimeout) {
          b.abort(state(self), waiter);
          waiter.resume();
          return raise_broken();
        }
        continue;
      }
      case BarrierOps::Arrival::kLast: {
        waiter.resume();
        defer_error();
        if (action == Py_None) return PyLong_FromUnsignedLong(index);
        PyObject* r = PyObject_CallNoArgs(action);
        const bool whole = b.finish(state(self), r == nullptr, waiter);
        waiter.resume();
        if (r == nullptr) return nullptr;
        Py_DECREF(r);
        return whole ? PyLong_FromUnsignedLong(index) : raise_broken();
      }
      case BarrierOps::Arrival::kWaits: {
        u32 outcome = 0;
        const Wait r = b.wait(state(self), *e, &outcome, waiter);
        waiter.resume();
        if (r == Wait::kInterrupted) return nullptr;
        defer_error();
        return outcome == BarrierOps::kReleased ? PyLong_FromUnsignedLong(index) : raise_broken();
      }
    }
  }
}

PyObject* reset(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  PyWaiter waiter(kForever);
  ops(self).reset(state(self), waiter);
  waiter.resume();
  Py_RETURN_NONE;
}

PyObject* abort_(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  PyWaiter waiter(kForever);
  ops(self).abort(state(self), waiter);
  waiter.resume();
  Py_RETURN_NONE;
}

PyObject* parties(PyObject* self, void*) noexcept {
  return check_handle(handle(self)) ? PyLong_FromUnsignedLong(state(self).parties) : nullptr;
}
PyObject* n_waiting(PyObject* self, void*) noexcept {
  return check_handle(handle(self)) ? PyLong_FromUnsignedLong(ops(self).waiting(state(self))) : nullptr;
}
PyObject* broken(PyObject* self, void*) noexcept {
  return check_handle(handle(self)) ? PyBool_FromLong(state(self).broken.load(std::memory_order_acquire) != 0)
                                    : nullptr;
}

int init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  static const char* names[] = {"parties", nullptr};
  int n = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i", const_cast<char**>(names), &n)) return -1;
  if (n < 1) {
    PyErr_Format(PyExc_ValueError, "parties must be > 0, not %d", n);
    return -1;
  }
  if (!make_object(handle(self), sizeof(BarrierState), Kind::kBarrier)) return -1;
  state(self).parties = static_cast<u32>(n);
  return 0;
}

PyMethodDef methods[] = {
    {"_wait", wait, METH_VARARGS, "_wait(action=None, timeout=None) -> index"},
    {"reset", reset, METH_NOARGS, "Empty the barrier; those who wait get BrokenBarrierError."},
    {"abort", abort_, METH_NOARGS, "Break the barrier: whoever waits or comes gets BrokenBarrierError, until reset()."},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef getset[] = {
    {"parties", parties, nullptr, "How many have to come.", nullptr},
    {"n_waiting", n_waiting, nullptr, "How many wait.", nullptr},
    {"broken", broken, nullptr, "Whether the barrier is broken.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, handle_members},
    {Py_tp_doc, const_cast<char*>("BarrierState(parties)\n--\n\nThe shared half of a Barrier.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.BarrierState", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

bool add_barrier_type(PyObject* module) noexcept { return add_type(module, &spec, &barrier_type); }

}  // namespace procession::bind
