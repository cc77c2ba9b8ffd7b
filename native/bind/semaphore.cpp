// Semaphore and BoundedSemaphore.
#include "procession/semaphore.hpp"

#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* semaphore_type = nullptr;
PyTypeObject* bounded_type = nullptr;

Handle* handle(PyObject* self) noexcept { return reinterpret_cast<Handle*>(self); }
SemaphoreState& state(PyObject* self) noexcept { return handle(self)->state<SemaphoreState>(); }
SemaphoreOps ops(PyObject* self) noexcept { return SemaphoreOps(handle(self)->view->arena, handle(self)->view->me); }
bool bounded(PyObject* self) noexcept { return handle(self)->object->kind == Kind::kBoundedSemaphore; }

int take(PyObject* self, bool scoped, i64 deadline) noexcept {
  PyWaiter waiter(deadline);
  const Wait r = ops(self).acquire(state(self), scoped, waiter);
  waiter.resume();
  if (PyErr_Occurred()) {
    if (r == Wait::kReady) ops(self).release(state(self), scoped, patient());
    return -1;
  }
  return r == Wait::kReady;
}

bool give(PyObject* self, bool scoped) noexcept {
  PyWaiter waiter(kForever);
  const SemaphoreOps::Released r = ops(self).release(state(self), scoped, waiter);
  waiter.resume();
  if (PyErr_Occurred()) return false;
  if (r == SemaphoreOps::Released::kYes) return true;
  PyErr_SetString(PyExc_ValueError, "semaphore or lock released too many times");
  return false;
}

PyObject* acquire(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  i64 deadline = kForever;
  if ((nargs != 0 || kwnames != nullptr) && !parse_wait(args, nargs, kwnames, "acquire", &deadline)) return nullptr;
  const int r = take(self, bounded(self), deadline);
  return r < 0 ? nullptr : PyBool_FromLong(r);
}

PyObject* release(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self)) || !give(self, bounded(self))) return nullptr;
  Py_RETURN_NONE;
}

PyObject* enter(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self)) || take(self, true, kForever) < 0) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* exit(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self)) || !give(self, true)) return nullptr;
  Py_RETURN_NONE;
}

/// False with an exception set.
bool read_value(PyObject* self, int* value) noexcept {
  if (!check_handle(handle(self))) return false;
  PyWaiter waiter(kForever);
  *value = ops(self).value(state(self), waiter);
  waiter.resume();
  return PyErr_Occurred() == nullptr;
}

PyObject* get_value(PyObject* self, PyObject*) noexcept {
  int value = 0;
  return read_value(self, &value) ? PyLong_FromLong(value) : nullptr;
}
PyObject* is_zero(PyObject* self, PyObject*) noexcept {
  int value = 0;
  return read_value(self, &value) ? PyBool_FromLong(value == 0) : nullptr;
}
PyObject* semlock(PyObject* self, void*) noexcept { return Py_NewRef(self); }

PyObject* repr(PyObject* self) noexcept {
  const char* dot = std::strrchr(Py_TYPE(self)->tp_name, '.');
  const char* type = dot == nullptr ? Py_TYPE(self)->tp_name : dot + 1;
  if (handle(self)->object == nullptr) return PyUnicode_FromFormat("<%s(uninitialised)>", type);
  int value = 0;
  if (!read_value(self, &value)) return nullptr;
  return bounded(self) ? PyUnicode_FromFormat("<%s(value=%d, maxvalue=%d)>", type, value, state(self).bound)
                       : PyUnicode_FromFormat("<%s(value=%d)>", type, value);
}

int init(PyObject* self, PyObject* args, PyObject* kwargs, Kind kind) noexcept {
  int value = 1;
  PyObject* ctx = nullptr;
  static const char* names[] = {"value", "ctx", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|i$O", const_cast<char**>(names), &value, &ctx)) return -1;
  if (value < 0) {
    PyErr_Format(PyExc_ValueError, "semaphore initial value must be >= 0, not %d", value);
    return -1;
  }
  if (!make_object(handle(self), sizeof(SemaphoreState), kind)) return -1;
  SemaphoreState& s = state(self);
  s.total = value;
  s.bound = kind == Kind::kBoundedSemaphore ? value : INT32_MAX;
  s.value.store(value, std::memory_order_release);
  return 0;
}
int semaphore_init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  return init(self, args, kwargs, Kind::kSemaphore);
}
int bounded_init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  return init(self, args, kwargs, Kind::kBoundedSemaphore);
}

PyMethodDef methods[] = {
    {"acquire", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(acquire)), METH_FASTCALL | METH_KEYWORDS,
     "acquire(block=True, timeout=None) -> bool\n\nTake one permit; True when it was taken.\n\n"
     "Blocks until there is one, a signal handler raises, or `timeout` seconds (monotonic clock) are over; negative "
     "counts as 0.\n"
     "A permit taken by `with`, or from a BoundedSemaphore, comes back when the process that took it is killed."},
    {"release", release, METH_NOARGS,
     "Give one permit back, from any process. ValueError above a BoundedSemaphore's initial value."},
    {"get_value", get_value, METH_NOARGS, "How many permits are free."},
    {"_get_value", get_value, METH_NOARGS, nullptr},
    {"_is_zero", is_zero, METH_NOARGS, nullptr},
    {"__enter__", enter, METH_NOARGS, nullptr},
    {"__exit__", exit, METH_VARARGS, nullptr},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef getset[] = {
    {"_semlock", semlock, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot semaphore_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(semaphore_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(repr)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, handle_members},
    {Py_tp_doc, const_cast<char*>("Semaphore(value=1, *, ctx=None)\n--\n\nA counting semaphore between processes.")},
    {0, nullptr},
};
PyType_Slot bounded_slots[] = {
    {Py_tp_init, reinterpret_cast<void*>(bounded_init)},
    {Py_tp_doc, const_cast<char*>("BoundedSemaphore(value=1, *, ctx=None)\n--\n\n"
                                  "A semaphore that cannot be released above its initial value; its permits come back "
                                  "when the process that took them is killed.")},
    {0, nullptr},
};
PyType_Spec semaphore_spec{"procession.synchronize.Semaphore", sizeof(Handle), 0,
                           Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, semaphore_slots};
PyType_Spec bounded_spec{"procession.synchronize.BoundedSemaphore", sizeof(Handle), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, bounded_slots};

}  // namespace

bool add_semaphore_types(PyObject* module) noexcept {
  return add_type(module, &semaphore_spec, &semaphore_type) &&
         add_type(module, &bounded_spec, &bounded_type, semaphore_type);
}

}  // namespace procession::bind
