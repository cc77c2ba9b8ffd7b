// `value` of a shared number: an attribute that is read and written under the object's lock.
#include "handle.hpp"

namespace procession::bind {
namespace {

// The standard library makes this property in Python, from `acquire()`, the attribute, `release()`: 190 of the 260 ns that
// `v.value += 1` holds the lock for. Here it is one call.
struct LockedAttribute {
  PyObject ob_base;
  PyObject* name;
};

PyTypeObject* locked_attribute_type = nullptr;
PyObject* lock_name = nullptr;
PyObject* object_attribute = nullptr;

/// Read (value == nullptr) or write `instance._obj.<name>` under `instance._lock`. A new reference, None after a write.
PyObject* under_lock(PyObject* self, PyObject* instance, PyObject* value) noexcept {
  PyObject* lock = PyObject_GetAttr(instance, lock_name);
  PyObject* object = lock == nullptr ? nullptr : PyObject_GetAttr(instance, object_attribute);
  PyObject* result = nullptr;
  if (object != nullptr && acquire_any_lock(lock)) {
    PyObject* name = reinterpret_cast<LockedAttribute*>(self)->name;
    if (value == nullptr) {
      result = PyObject_GetAttr(object, name);
    } else if (PyObject_SetAttr(object, name, value) == 0) {
      result = Py_NewRef(Py_None);
    }
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    if (!release_any_lock(lock)) {
      Py_CLEAR(result);
      Py_XDECREF(type);
      Py_XDECREF(error);
      Py_XDECREF(traceback);
    } else {
      PyErr_Restore(type, error, traceback);
    }
  }
  Py_XDECREF(object);
  Py_XDECREF(lock);
  return result;
}

PyObject* get(PyObject* self, PyObject* instance, PyObject*) noexcept {
  return instance == nullptr || instance == Py_None ? Py_NewRef(self) : under_lock(self, instance, nullptr);
}

int set(PyObject* self, PyObject* instance, PyObject* value) noexcept {
  if (value == nullptr) {
    PyErr_SetString(PyExc_AttributeError, "a shared value cannot be deleted");
    return -1;
  }
  PyObject* r = under_lock(self, instance, value);
  Py_XDECREF(r);
  return r == nullptr ? -1 : 0;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) noexcept {
  PyObject* name = nullptr;
  if (!PyArg_ParseTuple(args, "U", &name)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (self != nullptr) reinterpret_cast<LockedAttribute*>(self)->name = Py_NewRef(name);
  return self;
}

void dealloc(PyObject* self) noexcept {
  PyTypeObject* type = Py_TYPE(self);
  Py_XDECREF(reinterpret_cast<LockedAttribute*>(self)->name);
  type->tp_free(self);
  Py_DECREF(type);
}

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_descr_get, reinterpret_cast<void*>(get)},
    {Py_tp_descr_set, reinterpret_cast<void*>(set)},
    {Py_tp_doc,
     const_cast<char*>("LockedAttribute(name)\n--\n\nThe attribute `name` of `self._obj`, under `self._lock`.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.LockedAttribute", sizeof(LockedAttribute), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

bool add_locked_attribute_type(PyObject* module) noexcept {
  lock_name = PyUnicode_InternFromString("_lock");
  object_attribute = PyUnicode_InternFromString("_obj");
  PyObject* t = PyType_FromSpec(&spec);
  locked_attribute_type = reinterpret_cast<PyTypeObject*>(t);
  return lock_name != nullptr && object_attribute != nullptr && t != nullptr &&
         PyModule_AddType(module, locked_attribute_type) == 0;
}

}  // namespace procession::bind
