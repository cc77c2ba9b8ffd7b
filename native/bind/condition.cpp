// The waiting line of Condition; the class with the lock is Python's (procession._sync.condition).
#include "procession/condition.hpp"

#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* line_type = nullptr;

Handle* handle(PyObject* self) noexcept { return reinterpret_cast<Handle*>(self); }
ConditionState& state(PyObject* self) noexcept { return handle(self)->state<ConditionState>(); }
ConditionOps ops(PyObject* self) noexcept { return ConditionOps(handle(self)->view->arena, handle(self)->view->me); }

PyObject* call(PyObject* object, const char* method) noexcept { return PyObject_CallMethod(object, method, nullptr); }

/// wait(lock, timeout=None) -> bool: the whole of Condition.wait, here and not in Python, so that no signal handler can
/// raise between joining the line and leaving it: the next notification would go to nobody.
PyObject* wait(PyObject* self, PyObject* args) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  PyObject* lock = nullptr;
  PyObject* timeout = nullptr;
  i64 deadline = kForever;
  if (!PyArg_ParseTuple(args, "O|O", &lock, &timeout) || !parse_timeout(timeout, &deadline)) return nullptr;
  PyObject* counted = call(lock, "_count");
  const long depth = counted == nullptr ? -1 : PyLong_AsLong(counted);
  Py_XDECREF(counted);
  if (depth == -1 && PyErr_Occurred()) return nullptr;
  ConditionState& c = state(self);
  const ConditionOps o = ops(self);
  PyWaiter waiter(deadline);
  RosterEntry* e = nullptr;
  {
    PyWaiter way(kForever);
    e = o.enqueue(c, way);
  }
  if (e == nullptr) return PyErr_Occurred() ? nullptr : raise_no_memory(handle(self)->view, sizeof(RosterChunk));
  Wait r = Wait::kInterrupted;
  long released = 0;
  for (; released < depth; ++released) {
    PyObject* done = call(lock, "release");
    if (done == nullptr) break;
    Py_DECREF(done);
  }
  bool in_line = true;
  if (released == depth) {
    r = o.await_notice(c, *e, waiter);
    waiter.resume();
    in_line = r == Wait::kReady;
  }
  PyObject *type, *error, *traceback;
  PyErr_Fetch(&type, &error, &traceback);
  bool again = true;
  for (; again && released > 0; --released) {
    PyObject* done = call(lock, "acquire");
    again = done != nullptr;
    Py_XDECREF(done);
  }
  if (in_line) {
    PyObject *type2, *error2, *traceback2;
    PyErr_Fetch(&type2, &error2, &traceback2);
    PyWaiter way(kForever);
    o.leave(c, *e, again && type == nullptr, way);
    way.resume();
    PyErr_Restore(type2, error2, traceback2);
  }
  if (type != nullptr && again) PyErr_Restore(type, error, traceback);
  else if (type != nullptr) {  // an error on the way back: the later one, as a `finally` has it
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
  }
  return PyErr_Occurred() ? nullptr : PyBool_FromLong(r == Wait::kReady);
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
    {"wait", wait, METH_VARARGS,
     "wait(lock, timeout=None) -> bool: let the lock go, wait to be notified, take the lock again."},
    {"notify", notify, METH_O, "Wake the n that have waited longest; returns how many there were."},
    {"waiting", waiting, METH_NOARGS, "How many wait."},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_members, handle_members},
    {Py_tp_doc, const_cast<char*>("WaitLine()\n--\n\nA first-come-first-served line of waiting threads.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.WaitLine", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

bool add_condition_type(PyObject* module) noexcept { return add_type(module, &spec, &line_type); }

}  // namespace procession::bind
