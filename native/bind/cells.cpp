// Cells, and the loop of a worker over a chunk, which writes into one of them which item it is at.
#include "procession/cells.hpp"

#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* cells_type = nullptr;
constexpr Py_ssize_t kMostCells = 4096;

Handle* handle(PyObject* self) noexcept { return reinterpret_cast<Handle*>(self); }

/// Cell `i`, or nullptr with an exception set.
Atomic<i64>* cell(PyObject* self, Py_ssize_t i) noexcept {
  if (!check_handle(handle(self))) return nullptr;
  auto& state = handle(self)->state<CellsState>();
  if (i >= 0 && static_cast<u64>(i) < state.count) return &state.at[i];
  PyErr_Format(PyExc_IndexError, "cell %zd of %llu", i, static_cast<unsigned long long>(state.count));
  return nullptr;
}

Py_ssize_t length(PyObject* self) noexcept {
  return check_handle(handle(self)) ? static_cast<Py_ssize_t>(handle(self)->state<CellsState>().count) : -1;
}

PyObject* get(PyObject* self, Py_ssize_t i) noexcept {
  const Atomic<i64>* c = cell(self, i);
  return c == nullptr ? nullptr : PyLong_FromLongLong(c->load(std::memory_order_acquire));
}

int set(PyObject* self, Py_ssize_t i, PyObject* value) noexcept {
  Atomic<i64>* c = cell(self, i);
  if (c == nullptr) return -1;
  if (value == nullptr) {
    PyErr_SetString(PyExc_TypeError, "cells cannot be deleted");
    return -1;
  }
  const long long number = PyLong_AsLongLong(value);
  if (number == -1 && PyErr_Occurred()) return -1;
  c->store(number, std::memory_order_release);
  return 0;
}

int init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  Py_ssize_t count = 0;
  static const char* names[] = {"count", nullptr};
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n", const_cast<char**>(names), &count)) return -1;
  if (count < 1 || count > kMostCells) {
    PyErr_Format(PyExc_ValueError, "Cells() takes 1 to %zd, not %zd", kMostCells, count);
    return -1;
  }
  if (!make_object(handle(self), CellsState::size(static_cast<u64>(count)), Kind::kCells)) return -1;
  handle(self)->state<CellsState>().count = static_cast<u64>(count);
  return 0;
}

i64 coarse_ns() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &t);  // 5 ns; steps of 1 to 10 ms
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

PyObject* run_items(PyObject*, PyObject* const* args, Py_ssize_t nargs) noexcept {
  if (nargs != 7 || !PyList_CheckExact(args[1]) || !PyObject_TypeCheck(args[3], cells_type) ||
      !PyList_CheckExact(args[5])) {
    PyErr_SetString(PyExc_TypeError, "_run_items(function, items: list, start, cells, cell, results: list, limit_ns)");
    return nullptr;
  }
  PyObject *function = args[0], *items = args[1], *results = args[5];
  const Py_ssize_t start = PyLong_AsSsize_t(args[2]), index = PyLong_AsSsize_t(args[4]);
  const long long limit = PyLong_AsLongLong(args[6]);
  if (PyErr_Occurred()) return nullptr;
  Atomic<i64>* at = cell(args[3], index);
  if (at == nullptr) return nullptr;
  const i64 begin = coarse_ns();
  // The list can be changed by the function only if that finds it by way of the garbage collector; so its size is asked.
  for (Py_ssize_t i = start; i < PyList_GET_SIZE(items); ++i) {
    at->store(i, std::memory_order_release);
    PyObject* item = PyList_GET_ITEM(items, i);
    Py_INCREF(item);
    PyObject* value = PyObject_CallOneArg(function, item);
    Py_DECREF(item);
    if (value == nullptr) return nullptr;
    const int failed = PyList_Append(results, value);
    Py_DECREF(value);
    if (failed != 0) return nullptr;
    if (coarse_ns() - begin >= limit) break;
  }
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
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
    {Py_sq_length, reinterpret_cast<void*>(length)},
    {Py_sq_item, reinterpret_cast<void*>(get)},
    {Py_sq_ass_item, reinterpret_cast<void*>(set)},
    {Py_tp_doc,
     const_cast<char*>("Cells(count)\n--\n\n`count` 64-bit integers in shared memory, 0 at first; each is read and "
                       "written as one.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.Cells", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT, slots};

PyMethodDef functions[] = {
    {"_run_items", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(run_items)), METH_FASTCALL,
     "_run_items(function, items, start, cells, cell, results, limit_ns)\n--\n\nAppend function(item) to `results` for "
     "each item from `start` on, and write its index into the cell before; return after the item at which `limit_ns` "
     "nanoseconds were over. What the function raises comes through."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_cells_type(PyObject* module) noexcept {
  return add_type(module, &spec, &cells_type) && PyModule_AddFunctions(module, functions) == 0;
}

}  // namespace procession::bind
