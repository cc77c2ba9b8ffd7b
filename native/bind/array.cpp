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

/// `order`: true (Fortran's), false (C's), or what to transpose it by afterwards.
PyObject* call_rebuild(PyObject* array, const Kind& kind, PyObject* order) noexcept {
  PyObject* shape = PyObject_GetAttr(array, names.shape);
  PyObject* buffer = shape == nullptr ? nullptr : PyPickleBuffer_FromObject(array);
  if (buffer == nullptr) {
    Py_XDECREF(shape);
    return nullptr;
  }
  return Py_BuildValue("O(NNOO)", rebuild, buffer, shape, kind.letter, order);
}

/// When the elements lie side by side, in whatever order of the dimensions: those, from the longest stride to the shortest.
/// Else nullptr, with an exception set only when there is no memory.
PyObject* axes_of(const Py_buffer& view) noexcept {
  PyObject* axes = PyTuple_New(view.ndim);
  Py_ssize_t step = view.itemsize;
  u64 seen = 0;
  for (int n = view.ndim - 1; axes != nullptr && n >= 0; --n) {
    int i = 0;
    while (i < view.ndim && ((seen >> i & 1) != 0 || (view.shape[i] != 1 && view.strides[i] != step))) ++i;
    PyObject* axis = i < view.ndim ? PyLong_FromLong(i) : nullptr;
    if (axis == nullptr) {
      Py_CLEAR(axes);
      break;
    }
    PyTuple_SET_ITEM(axes, n, axis);
    seen |= u64{1} << i;
    step *= view.shape[i];
  }
  return axes;
}

/// Of an array whose elements lie side by side: as an array in C's order, and how to transpose it afterwards.
PyObject* reduce_permuted(PyObject* array, const Kind& kind, PyObject* axes) noexcept {
  const Py_ssize_t n = PyTuple_GET_SIZE(axes);
  PyObject* base = PyObject_CallMethod(array, "transpose", "(O)", axes);
  PyObject* back = base == nullptr ? nullptr : PyTuple_New(n);
  for (Py_ssize_t i = 0; back != nullptr && i < n; ++i) {
    PyObject* axis = PyLong_FromSsize_t(i);
    if (axis == nullptr) Py_CLEAR(back);
    else PyTuple_SET_ITEM(back, PyLong_AsLong(PyTuple_GET_ITEM(axes, i)), axis);
  }
  PyObject* r = back == nullptr ? nullptr : call_rebuild(base, kind, back);
  Py_XDECREF(base);
  Py_XDECREF(back);
  return r;
}

PyObject* reduce_known(PyObject* array, const Kind& kind, const Py_buffer& view) noexcept {
  if (PyBuffer_IsContiguous(&view, 'C') != 0) return call_rebuild(array, kind, Py_False);
  if (PyBuffer_IsContiguous(&view, 'F') != 0) return call_rebuild(array, kind, Py_True);
  PyObject* axes = axes_of(view);
  if (axes == nullptr && PyErr_Occurred()) return nullptr;
  PyObject* copy = axes != nullptr ? nullptr : PyObject_CallMethod(array, "copy", nullptr);
  PyObject* r = axes != nullptr   ? reduce_permuted(array, kind, axes)
                : copy != nullptr ? call_rebuild(copy, kind, Py_False)
                                  : nullptr;
  Py_XDECREF(axes);
  Py_XDECREF(copy);
  return r;
}

/// By NumPy; what is read-only would be so for its receiver too.
PyObject* reduce_other(PyObject* array, bool read_only) noexcept {
  PyObject* sent = read_only ? PyObject_CallMethod(array, "copy", "s", "K") : Py_NewRef(array);
  PyObject* r = sent == nullptr ? nullptr : PyObject_CallMethod(sent, "__reduce_ex__", "i", 5);
  Py_XDECREF(sent);
  return r;
}

/// Of dates and times, which have no buffer: as the integers that they are, to be viewed as dates afterwards.
/// nullptr (no exception) for anything else.
PyObject* reduce_dates(PyObject* array) noexcept {
  PyObject* dtype = PyObject_GetAttr(array, names.dtype);
  PyObject* kind = dtype == nullptr ? nullptr : PyObject_GetAttrString(dtype, "kind");
  const bool dates =
      kind != nullptr && PyUnicode_Check(kind) &&
      (PyUnicode_CompareWithASCIIString(kind, "M") == 0 || PyUnicode_CompareWithASCIIString(kind, "m") == 0);
  PyObject* methodcaller = dates ? import_from("operator", "methodcaller") : nullptr;
  PyObject* back = methodcaller == nullptr ? nullptr : PyObject_CallFunction(methodcaller, "sO", "view", dtype);
  PyObject* integers = back == nullptr ? nullptr : PyObject_CallMethod(array, "view", "s", "i8");
  PyObject* r = integers == nullptr ? nullptr : Py_BuildValue("O(O)", back, integers);
  for (PyObject* each : {dtype, kind, methodcaller, back, integers}) Py_XDECREF(each);
  PyErr_Clear();
  return r;
}

PyObject* reduce(PyObject*, PyObject* array) noexcept {
  Py_buffer view;
  if (PyObject_GetBuffer(array, &view, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    PyObject* r = reduce_dates(array);
    return r != nullptr ? r : reduce_other(array, false);  // NumPy knows what to do, or what to say
  }
  const Kind* kind = kind_of(array, view);
  PyErr_Clear();
  PyObject* r =
      kind != nullptr ? reduce_known(array, *kind, view) : reduce_other(array, view.readonly != 0 && !is_frozen(view));
  PyBuffer_Release(&view);
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

/// _array(buffer, shape, letter, order)
PyObject* rebuild_array(PyObject*, PyObject* const* args, Py_ssize_t nargs) noexcept {
  if (nargs != 4) {
    PyErr_Format(PyExc_TypeError, "_array() takes 4 arguments (%zd given)", nargs);
    return nullptr;
  }
  if (ndarray == nullptr && !load_numpy()) return nullptr;
  const char* letter = PyUnicode_Check(args[2]) ? PyUnicode_AsUTF8(args[2]) : "";
  const bool one = letter != nullptr && letter[0] != '\0' && letter[1] == '\0';
  const Kind* kind = letter == nullptr ? nullptr : kind_of(one ? *letter : '\0');
  PyObject* array = kind == nullptr ? nullptr : writable(call_ndarray(args[1], *kind, args[0], args[3] == Py_True));
  if (array == nullptr || !PyTuple_Check(args[3])) return array;
  PyObject* transposed = PyObject_CallMethod(array, "transpose", "(O)", args[3]);
  Py_DECREF(array);
  return transposed;
}

PyMethodDef reduce_method = {"_reduce_array", reduce, METH_O, nullptr};
PyMethodDef functions[] = {
    {"_array", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(rebuild_array)), METH_FASTCALL,
     "_array(buffer, shape, letter, order) -> numpy.ndarray\n\nAn array that uses a buffer in place: what pickles "
     "call. `order`: whether it is Fortran's, or the axes to transpose it by."},
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
