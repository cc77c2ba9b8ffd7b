// The waiting line of Condition; the class with the lock is Python's (procession._sync.condition).
#include "procession/condition.hpp"

#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* line_type = nullptr;

Handle* handle(PyObject* self) noexcept { return reinterpret_cast<Handle*>(self); }
ConditionState& state(PyObject* self) noexcept { return handle(self)->state<ConditionState>(); }
ConditionOps ops(PyObject* self) noexcept { return ConditionOps(handle(self)->view->arena, handle(self)->view->me); }

/// A place in the line travels to Python and back as its distance from the object.
PyObject* join(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  PyWaiter waiter(kForever);
  RosterEntry* e = ops(self).enqueue(state(self), waiter);
  waiter.resume();
  if (e == nullptr) return PyErr_Occurred() ? nullptr : raise_no_memory(handle(self)->view, sizeof(RosterChunk));
  return PyLong_FromSsize_t(reinterpret_cast<char*>(e) - reinterpret_cast<char*>(&state(self)));
}

PyObject* wait(PyObject* self, PyObject* args) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  Py_ssize_t place = 0;
  PyObject* timeout = nullptr;
  i64 deadline = kForever;
  if (!PyArg_ParseTuple(args, "n|O", &place, &timeout)) return nullptr;
  auto* e = reinterpret_cast<RosterEntry*>(reinterpret_cast<char*>(&state(self)) + place);
  if (!parse_timeout(timeout, &deadline)) {
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    ops(self).wait(state(self), *e, patient());  // out of the line again
    PyErr_Restore(type, value, traceback);
    return nullptr;
  }
  PyWaiter waiter(deadline);
  const Wait r = ops(self).wait(state(self), *e, waiter);
  waiter.resume();
  return r == Wait::kInterrupted ? nullptr : PyBool_FromLong(r == Wait::kReady);
}

PyObject* notify(PyObject* self, PyObject* arg) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  const long n = PyLong_AsLong(arg);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  if (n <= 0) return PyLong_FromLong(0);
  PyWaiter waiter(kForever);
  const i32 told = ops(self).notify(state(self), static_cast<u32>(std::min<long>(n, INT32_MAX)), waiter);
  waiter.resume();
  return PyErr_Occurred() ? nullptr : PyLong_FromLong(told);
}

PyObject* waiting(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  long n = 0;
  handle(self)->view->arena.for_each(state(self).waiters, [&](RosterEntry& e) {
    n += e.tag.load(std::memory_order_relaxed) != 0 &&
         (e.value.load(std::memory_order_relaxed) & ConditionOps::kStateMask) == ConditionOps::kWaiting;
  });
  return PyLong_FromLong(n);
}

int init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  static const char* names[] = {nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "", const_cast<char**>(names))) return -1;
  return make_object(handle(self), sizeof(ConditionState), Kind::kCondition) ? 0 : -1;
}

PyMethodDef methods[] = {
    {"join", join, METH_NOARGS, "Take a place in the line."},
    {"wait", wait, METH_VARARGS,
     "wait(place, timeout=None) -> bool: wait to be notified; leaves the line in any case."},
    {"notify", notify, METH_O, "Wake the n that have waited longest; returns how many there were."},
    {"waiting", waiting, METH_NOARGS, "How many wait."},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Handle, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_doc, const_cast<char*>("WaitLine()\n--\n\nA first-come-first-served line of waiting threads.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.WaitLine", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

bool add_condition_type(PyObject* module) noexcept { return add_type(module, &spec, &line_type); }

}  // namespace procession::bind
