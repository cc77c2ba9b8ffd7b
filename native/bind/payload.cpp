// Payload: a pickle or compact form, and what lies beside it.
#include <cstddef>

#include "codec.hpp"
#include "pickler.hpp"

namespace procession::bind {
namespace {

PyTypeObject* payload_type = nullptr;

Payload* payload(PyObject* self) noexcept { return reinterpret_cast<Payload*>(self); }

PyObject* create(PyTypeObject* type, PyObject* args, PyObject* kwargs) noexcept {
  static const char* names[] = {"data", "buffers", "handles", "lasting", nullptr};
  PyObject *data, *buffers, *handles = nullptr;
  int lasting = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O!O!|Op", const_cast<char**>(names), &PyBytes_Type, &data,
                                   &PyList_Type, &buffers, &handles, &lasting))
    return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  payload(self)->data = Py_NewRef(data);
  payload(self)->buffers = Py_NewRef(buffers);
  payload(self)->handles = Py_XNewRef(handles);
  payload(self)->lasting = lasting != 0;
  return self;
}

void dealloc(PyObject* self) noexcept {
  PyTypeObject* type = Py_TYPE(self);
  Payload* p = payload(self);
  Py_XDECREF(p->data);
  Py_XDECREF(p->buffers);
  Py_XDECREF(p->handles);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* reduce(PyObject* self, PyObject*) noexcept {
  const Payload* p = payload(self);
  PyObject* handles = p->handles == nullptr ? PyTuple_New(0) : Py_NewRef(p->handles);
  PyObject* buffers = p->buffers == nullptr ? PyList_New(0) : Py_NewRef(p->buffers);
  PyObject* r = handles == nullptr || buffers == nullptr
                    ? nullptr
                    : Py_BuildValue("O(OOO)", reinterpret_cast<PyObject*>(Py_TYPE(self)), p->data, buffers, handles);
  Py_XDECREF(handles);
  Py_XDECREF(buffers);
  if (r != nullptr) payload_given(self);
  return r;
}

PyObject* load(PyObject* self, PyObject*) noexcept { return unpack(payload(self)->data, payload(self)->buffers); }

PyObject* get_nbytes(PyObject* self, void*) noexcept {
  u64 sum = 0;
  PyObject* buffers = payload(self)->buffers;
  for (Py_ssize_t i = 0; buffers != nullptr && i < PyList_GET_SIZE(buffers); ++i) {
    Part part;
    if (!parse_part(PyList_GET_ITEM(buffers, i), &part)) return nullptr;
    if (!part.segment->frozen()) sum += part.length;
  }
  return PyLong_FromUnsignedLongLong(sum);
}

PyMethodDef methods[] = {
    {"load", load, METH_NOARGS,
     "Return the object; it uses the segments in place. Once only: two would be the same memory."},
    {"__reduce__", reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyMemberDef members[] = {
    {"data", T_OBJECT, offsetof(Payload, data), READONLY, nullptr},
    {"buffers", T_OBJECT, offsetof(Payload, buffers), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};
PyGetSetDef getset[] = {
    {"nbytes", get_nbytes, nullptr, "How much is beside the data, but for what all share.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(create)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, getset},
    {Py_tp_doc,
     const_cast<char*>("Payload(data, buffers, handles=(), lasting=False)\n--\n\nA pickle (or what _pack() makes), the "
                       "buffers it leaves out, and the handles in it, which live as long as this does.\n\nArgs:\n"
                       "    data: The pickle.\n"
                       "    buffers: For each buffer its segment, where it begins there, and its length.\n"
                       "    handles: What holds the locks, queues and other objects whose handles are in `data`.\n"
                       "    lasting: It is sent more than once. Else it is given away when it is sent: its receiver is "
                       "the only holder then.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.Payload", sizeof(Payload), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

bool is_payload(PyObject* v) noexcept { return Py_TYPE(v) == payload_type; }

PyObject* make_payload(PyObject* data, PyObject* buffers) noexcept {
  PyObject* self = payload_type->tp_alloc(payload_type, 0);
  if (self == nullptr) return nullptr;
  payload(self)->data = Py_NewRef(data);
  payload(self)->buffers = Py_NewRef(buffers);
  return self;
}

void payload_given(PyObject* self) noexcept {
  if (payload(self)->lasting) return;
  Py_CLEAR(payload(self)->buffers);
  Py_CLEAR(payload(self)->handles);
}

bool parse_part(PyObject* part, Part* into) noexcept {
  PyObject* segment = nullptr;
  unsigned long long offset = 0, length = 0;
  if (!PyArg_ParseTuple(part, "O!KK", segment_class(), &segment, &offset, &length)) return false;
  if (!check_handle(reinterpret_cast<Handle*>(segment))) return false;
  *into = {reinterpret_cast<SegmentObject*>(segment), offset, length};
  return true;
}

bool add_payload_type(PyObject* module) noexcept {
  PyObject* t = PyType_FromSpec(&spec);
  payload_type = reinterpret_cast<PyTypeObject*>(t);
  return t != nullptr && PyModule_AddType(module, payload_type) == 0;
}

}  // namespace procession::bind
