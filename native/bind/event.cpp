// Event.
#include "procession/event.hpp"

#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* event_type = nullptr;

Handle* handle(PyObject* self) noexcept { return reinterpret_cast<Handle*>(self); }
EventState& state(PyObject* self) noexcept { return handle(self)->state<EventState>(); }

PyObject* is_set(PyObject* self, PyObject*) noexcept {
  return check_handle(handle(self)) ? PyBool_FromLong(EventOps::is_set(state(self))) : nullptr;
}

PyObject* set(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  EventOps::set(state(self));
  Py_RETURN_NONE;
}

PyObject* clear(PyObject* self, PyObject*) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  EventOps::clear(state(self));
  Py_RETURN_NONE;
}

PyObject* wait(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  i64 deadline = kForever;
  if (nargs != 0 || kwnames != nullptr) {
    const bool by_name = kwnames != nullptr && PyTuple_GET_SIZE(kwnames) == 1 &&
                         PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "timeout") == 0;
    if (nargs + (kwnames == nullptr ? 0 : PyTuple_GET_SIZE(kwnames)) != 1 || (kwnames != nullptr && !by_name)) {
      PyErr_SetString(PyExc_TypeError, "wait() takes at most one argument, timeout");
      return nullptr;
    }
    if (!parse_timeout(args[0], &deadline)) return nullptr;
  }
  PyWaiter waiter(deadline);
  const Wait r = EventOps::wait(state(self), waiter);
  waiter.resume();
  if (r == Wait::kInterrupted) return nullptr;
  return PyBool_FromLong(r == Wait::kReady);
}

PyObject* repr(PyObject* self) noexcept {
  const char* set_status = handle(self)->object == nullptr ? "uninitialised"
                           : EventOps::is_set(state(self)) ? "set"
                                                           : "unset";
  const char* dot = std::strrchr(Py_TYPE(self)->tp_name, '.');
  return PyUnicode_FromFormat("<%s at %p %s>", dot == nullptr ? Py_TYPE(self)->tp_name : dot + 1, self, set_status);
}

int init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  PyObject* ctx = nullptr;
  static const char* names[] = {"ctx", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$O", const_cast<char**>(names), &ctx)) return -1;
  return make_object(handle(self), sizeof(EventState), Kind::kEvent) ? 0 : -1;
}

PyMethodDef methods[] = {
    {"is_set", is_set, METH_NOARGS, "Whether the event is set."},
    {"set", set, METH_NOARGS, "Set the event and wake everybody who waits for it. Never blocks, whoever died."},
    {"clear", clear, METH_NOARGS, "Unset the event."},
    {"wait", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(wait)), METH_FASTCALL | METH_KEYWORDS,
     "wait(timeout=None) -> bool\n\nWait until the event is set; False when `timeout` seconds (monotonic clock) were "
     "over first."},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(repr)},
    {Py_tp_methods, methods},
    {Py_tp_members, handle_members},
    {Py_tp_doc, const_cast<char*>("Event(*, ctx=None)\n--\n\nA flag that processes set, clear and wait for.")},
    {0, nullptr},
};
PyType_Spec spec{"procession.synchronize.Event", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

bool add_event_type(PyObject* module) noexcept { return add_type(module, &spec, &event_type); }

}  // namespace procession::bind
