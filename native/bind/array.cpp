// NumPy arrays in messages and pickles, without NumPy's own detour. NumPy is not needed to build this: it is asked by its Python interface.
#include <iterator>

#include "pickler.hpp"

namespace procession::bind {
namespace {

// How the buffer protocol and numpy.dtype name the types whose arrays are described here. Others (complex numbers, structures,
// dates, text, objects, another byte order, what has metadata) are pickled as NumPy does it.
constexpr char kLetters[] = "?bBhHiIlLqQefdg";

struct Kind {
  PyObject* letter;
  PyObject* dtype;  ///< the one object that NumPy has of it
};

PyTypeObject* ndarray = nullptr;
Kind kinds[std::size(kLetters)];
PyObject *rebuild = nullptr, *reducer = nullptr, *order_f = nullptr, *zero = nullptr;
struct {
  PyObject *dtype, *shape;
} names;

/// False with an exception set.
bool load_numpy() noexcept {
  PyObject* type = import_from("numpy", "ndarray");
  PyObject* dtype = type == nullptr ? nullptr : import_from("numpy", "dtype");
  for (size_t i = 0; dtype != nullptr && kLetters[i] != '\0'; ++i) {
    Py_XSETREF(kinds[i].letter, PyUnicode_FromStringAndSize(&kLetters[i], 1));
    Py_XSETREF(kinds[i].dtype, kinds[i].letter == nullptr ? nullptr : PyObject_CallOneArg(dtype, kinds[i].letter));
    if (kinds[i].dtype == nullptr) Py_CLEAR(dtype);
  }
  if (dtype == nullptr) Py_CLEAR(type);
  Py_XDECREF(dtype);
  ndarray = reinterpret_cast<PyTypeObject*>(type);
  return ndarray != nullptr;
}

/// nullptr with an exception set when there is no such type.
const Kind* kind_of(char letter) noexcept {
  const char* at = letter == '\0' ? nullptr : std::strchr(kLetters, letter);
  if (at != nullptr) return &kinds[at - kLetters];
  PyErr_Format(PyExc_ValueError, "_array(): there is no type '%c'", letter);
  return nullptr;
}

/// nullptr (no exception) when the array's type is none of those, or is more than its letter says.
const Kind* kind_of(PyObject* array, const Py_buffer& view) noexcept {
  const char* letter = view.format;
  if (letter == nullptr || letter[0] == '\0' || letter[1] != '\0') return nullptr;
  const char* at = std::strchr(kLetters, *letter);
  if (at == nullptr) return nullptr;
  const Kind* kind = &kinds[at - kLetters];
  PyObject* dtype = PyObject_GetAttr(array, names.dtype);
  Py_XDECREF(dtype);
  return dtype == kind->dtype ? kind : nullptr;
}

PyObject* call_rebuild(PyObject* array, const Kind& kind, bool fortran) noexcept {
  PyObject* shape = PyObject_GetAttr(array, names.shape);
  PyObject* buffer = shape == nullptr ? nullptr : PyPickleBuffer_FromObject(array);
  if (buffer == nullptr) {
    Py_XDECREF(shape);
    return nullptr;
  }
  return Py_BuildValue("O(NNOO)", rebuild, buffer, shape, kind.letter, fortran ? Py_True : Py_False);
}

PyObject* reduce(PyObject*, PyObject* array) noexcept {
  Py_buffer view;
  const Kind* kind = nullptr;
  bool c = false, fortran = false, read_only = false;
  if (PyObject_GetBuffer(array, &view, PyBUF_RECORDS_RO) == 0) {
    kind = kind_of(array, view);
    c = PyBuffer_IsContiguous(&view, 'C') != 0;
    fortran = !c && PyBuffer_IsContiguous(&view, 'F') != 0;
    read_only = view.readonly != 0 && !is_frozen(view);
    PyBuffer_Release(&view);
  }
  PyErr_Clear();  // NumPy knows what to do, or what to say
  const bool as_it_is = kind != nullptr ? c || fortran : !read_only;
  PyObject* sent = as_it_is ? Py_NewRef(array) : PyObject_CallMethod(array, "copy", "s", kind != nullptr ? "C" : "K");
  if (sent == nullptr) return nullptr;
  PyObject* r =
      kind != nullptr ? call_rebuild(sent, *kind, fortran) : PyObject_CallMethod(sent, "__reduce_ex__", "i", 5);
  Py_DECREF(sent);
  return r;
}

PyObject* call_ndarray(PyObject* shape, const Kind& kind, PyObject* buffer, bool fortran) noexcept {
  return PyObject_CallFunctionObjArgs(reinterpret_cast<PyObject*>(ndarray), shape, kind.dtype, buffer, zero, Py_None,
                                      fortran ? order_f : Py_None, nullptr);
}

/// What has been sent is the receiver's own, also where the sender's array was read-only: a copy, unless all see the same memory.
/// Takes over the reference, returns one.
PyObject* writable(PyObject* array) noexcept {
  Py_buffer view;
  if (array == nullptr) return nullptr;
  if (PyObject_GetBuffer(array, &view, PyBUF_ANY_CONTIGUOUS) != 0) {
    Py_DECREF(array);
    return nullptr;
  }
  const bool keep = view.readonly == 0 || is_frozen(view);
  PyBuffer_Release(&view);
  if (keep) return array;
  PyObject* own = PyObject_CallMethod(array, "copy", "s", "K");  // the order of its elements too
  Py_DECREF(array);
  return own;
}

/// _array(buffer, shape, letter, fortran)
PyObject* rebuild_array(PyObject*, PyObject* const* args, Py_ssize_t nargs) noexcept {
  if (nargs != 4) {
    PyErr_Format(PyExc_TypeError, "_array() takes 4 arguments (%zd given)", nargs);
    return nullptr;
  }
  if (ndarray == nullptr && !load_numpy()) return nullptr;
  const char* letter = PyUnicode_Check(args[2]) ? PyUnicode_AsUTF8(args[2]) : "";
  const Kind* kind = letter == nullptr ? nullptr : kind_of(*letter);
  return kind == nullptr ? nullptr : writable(call_ndarray(args[1], *kind, args[0], args[3] == Py_True));
}

PyMethodDef reduce_method = {"_reduce_array", reduce, METH_O, nullptr};
PyMethodDef functions[] = {
    {"_array", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rebuild_array)), METH_FASTCALL,
     "_array(buffer, shape, letter, fortran) -> numpy.ndarray\n\nAn array that uses a buffer in place: what pickles "
     "call."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyObject* array_reducer(PyObject* type) noexcept {
  if (ndarray == nullptr) {
    // Whoever has an array has imported NumPy.
    if (!PyType_Check(type) || std::strcmp(reinterpret_cast<PyTypeObject*>(type)->tp_name, "numpy.ndarray") != 0)
      return nullptr;
    if (!load_numpy()) {
      PyErr_Clear();
      return nullptr;
    }
  }
  return type == reinterpret_cast<PyObject*>(ndarray) ? reducer : nullptr;
}

bool describe_array(PyObject* v, ArrayForm* form, Py_buffer* view) noexcept {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(v));
  if (array_reducer(type) == nullptr || has_reducer(type)) return false;
  if (PyObject_GetBuffer(v, view, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    return false;
  }
  const bool c = PyBuffer_IsContiguous(view, 'C') != 0;
  const Kind* kind = kind_of(v, *view);
  if (kind == nullptr || view->ndim > kMostDimensions || (!c && PyBuffer_IsContiguous(view, 'F') == 0)) {
    PyBuffer_Release(view);
    return false;
  }
  form->letter = kLetters[kind - kinds];
  form->fortran = !c;
  form->dimensions = static_cast<u8>(view->ndim);
  for (int i = 0; i < view->ndim; ++i) form->shape[i] = view->shape[i];
  return true;
}

PyObject* make_array(const ArrayForm& form, PyObject* buffer) noexcept {
  if (ndarray == nullptr && !load_numpy()) return nullptr;
  PyObject* shape = PyTuple_New(form.dimensions);
  for (int i = 0; shape != nullptr && i < form.dimensions; ++i) {
    PyObject* n = PyLong_FromLongLong(form.shape[i]);
    if (n == nullptr) Py_CLEAR(shape);
    else PyTuple_SET_ITEM(shape, i, n);
  }
  if (shape == nullptr) return nullptr;
  const Kind* kind = kind_of(form.letter);
  PyObject* array =
      kind == nullptr ? nullptr : call_ndarray(shape, *kind, buffer == nullptr ? Py_None : buffer, form.fortran);
  Py_DECREF(shape);
  return array;
}

PyObject* copy_array(const ArrayForm& form, const char* data, u64 n) noexcept {
  PyObject* array = make_array(form, nullptr);
  Py_buffer view;
  if (array == nullptr) return nullptr;
  if (PyObject_GetBuffer(array, &view, PyBUF_ANY_CONTIGUOUS | PyBUF_WRITABLE) != 0) {
    Py_DECREF(array);
    return nullptr;
  }
  std::memcpy(view.buf, data, std::min(n, static_cast<u64>(view.len)));
  PyBuffer_Release(&view);
  return array;
}

bool add_array_functions(PyObject* module) noexcept {
  names = {PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("shape")};
  reducer = PyCFunction_New(&reduce_method, nullptr);
  order_f = PyUnicode_InternFromString("F");
  zero = PyLong_FromLong(0);
  if (names.dtype == nullptr || names.shape == nullptr) return false;
  if (reducer == nullptr || order_f == nullptr || zero == nullptr) return false;
  return PyModule_AddFunctions(module, functions) == 0 &&
         (rebuild = PyObject_GetAttrString(module, "_array")) != nullptr;
}

}  // namespace procession::bind
