// Lists of numbers as bytes: a letter and 8 bytes each, where pickle writes and reads one object after the other.
#include "pickler.hpp"

namespace procession::bind {
namespace {

constexpr char kInts = 'I', kFloats = 'D';  // no pickle begins so

template <class Convert>
PyObject* pack(PyObject* list, Py_ssize_t n, char letter, Convert convert) noexcept {
  PyObject* data = PyBytes_FromStringAndSize(nullptr, 1 + 8 * n);
  if (data == nullptr) return nullptr;
  char* at = PyBytes_AS_STRING(data);
  *at++ = letter;
  for (Py_ssize_t i = 0; i < n; ++i, at += 8) {
    if (!convert(PyList_GET_ITEM(list, i), at)) {
      Py_DECREF(data);
      return nullptr;
    }
  }
  return data;
}

}  // namespace

PyObject* pack_numbers(PyObject* list) noexcept {
  if (!PyList_CheckExact(list) || PyList_GET_SIZE(list) == 0) return nullptr;
  const Py_ssize_t n = PyList_GET_SIZE(list);
  if (PyLong_CheckExact(PyList_GET_ITEM(list, 0))) {
    return pack(list, n, kInts, [](PyObject* v, char* at) {
      if (!PyLong_CheckExact(v)) return false;
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(v, &overflow);
      std::memcpy(at, &number, 8);
      return overflow == 0;
    });
  }
  if (PyFloat_CheckExact(PyList_GET_ITEM(list, 0))) {
    return pack(list, n, kFloats, [](PyObject* v, char* at) {
      if (!PyFloat_CheckExact(v)) return false;
      const double number = PyFloat_AS_DOUBLE(v);
      std::memcpy(at, &number, 8);
      return true;
    });
  }
  return nullptr;
}

bool is_numbers(char letter) noexcept { return letter == kInts || letter == kFloats; }

PyObject* unpack_numbers(const char* at, Py_ssize_t length) noexcept {
  if (length % 8 != 1) {
    PyErr_SetString(PyExc_ValueError, "these bytes do not come from _pack()");
    return nullptr;
  }
  const char letter = *at++;
  const Py_ssize_t n = length / 8;
  PyObject* list = PyList_New(n);
  for (Py_ssize_t i = 0; list != nullptr && i < n; ++i, at += 8) {
    PyObject* v = nullptr;
    if (letter == kInts) {
      long long number;
      std::memcpy(&number, at, 8);
      v = PyLong_FromLongLong(number);
    } else {
      double number;
      std::memcpy(&number, at, 8);
      v = PyFloat_FromDouble(number);
    }
    if (v == nullptr) Py_CLEAR(list);
    else PyList_SET_ITEM(list, i, v);
  }
  return list;
}

}  // namespace procession::bind
