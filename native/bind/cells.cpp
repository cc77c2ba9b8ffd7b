// Cells, and the loop of a worker over a chunk, which writes into one of them which item it is at.
#include <signal.h>
#include <unistd.h>

#include "procession/cells.hpp"

#include "codec.hpp"

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

/// What a worker's cells say; `procession/_pool/messages.py` has the same names.
enum : Py_ssize_t { kSeqCell, kIndexCell, kCancelCell, kRunningCell, kUnansweredCell, kCells };
constexpr long kItem = 2, kValue = 0;  // kinds of messages

i64 precise_ns() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

/// (kValue, wid, seq, value, ns) into the queue of answers; takes over `value`. False with an exception set.
bool answer(PyObject* put, PyObject* wid, PyObject* seq, PyObject* value, i64 ns) noexcept {
  PyObject* message = Py_BuildValue("(lOONL)", kValue, wid, seq, value, static_cast<long long>(ns));
  if (message == nullptr) return false;
  PyObject* done = PyObject_CallOneArg(put, message);
  Py_DECREF(message);
  Py_XDECREF(done);
  return done != nullptr;
}

PyObject* serve(PyObject*, PyObject* const* args, Py_ssize_t nargs) noexcept {
  if (nargs != 6 || !PyDict_CheckExact(args[2]) || !PyObject_TypeCheck(args[3], cells_type)) {
    PyErr_SetString(PyExc_TypeError, "_serve(get, put, functions: dict, cells, wid, timeout)");
    return nullptr;
  }
  PyObject *get = args[0], *put = args[1], *functions = args[2], *wid = args[4];
  Atomic<i64>* cells = cell(args[3], 0);
  if (cells == nullptr || cell(args[3], kCells - 1) == nullptr) return nullptr;
  PyObject* get_args[] = {Py_True, args[5]};
  for (;;) {
    PyObject* message = PyObject_Vectorcall(get, get_args, 2, nullptr);
    if (message == nullptr) return nullptr;
    PyObject* function = nullptr;
    if (PyTuple_CheckExact(message) && PyTuple_GET_SIZE(message) == 5 &&
        PyLong_AsLong(PyTuple_GET_ITEM(message, 0)) == kItem) {
      function = PyDict_GetItemWithError(functions, PyTuple_GET_ITEM(message, 2));
    }
    if (function == nullptr) {
      if (!PyErr_Occurred()) return message;
      Py_DECREF(message);
      return nullptr;
    }
    PyObject* number = PyTuple_GET_ITEM(message, 1);
    const i64 seq = PyLong_AsLongLong(number);
    cells[kSeqCell].store(seq, std::memory_order_release);
    cells[kUnansweredCell].store(seq, std::memory_order_release);
    Py_INCREF(function);
    const i64 begin = precise_ns();
    cells[kRunningCell].store(seq, std::memory_order_release);
    PyObject* value = PyObject_CallOneArg(function, PyTuple_GET_ITEM(message, 4));
    cells[kRunningCell].store(0, std::memory_order_release);
    const i64 ns = precise_ns() - begin;
    Py_DECREF(function);
    if (value != nullptr && !is_plain(value)) {
      PyObject* result = Py_BuildValue("(OONL)", Py_None, number, value, static_cast<long long>(ns));
      Py_DECREF(message);
      return result;
    }
    const bool ok = value != nullptr && answer(put, wid, number, value, ns);
    Py_DECREF(message);
    if (!ok) return nullptr;
    cells[kUnansweredCell].store(0, std::memory_order_release);
  }
}

PyMethodDef methods[] = {
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_members, handle_members},
    {Py_sq_length, reinterpret_cast<void*>(length)},
    {Py_sq_item, reinterpret_cast<void*>(get)},
    {Py_sq_ass_item, reinterpret_cast<void*>(set)},
    {Py_tp_doc,
     const_cast<char*>("Cells(count)\n--\n\n`count` 64-bit integers in shared memory, 0 at first; each is read and "
                       "written as one.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.Cells", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT, slots};

/// Where what faulthandler has written into `fd` goes when this process dies of a crash.
struct {
  int fd = -1;
  pid_t pid = 0;
  void* to = nullptr;
  size_t size = 0;
} last_words;

void copy_last_words(int signal) noexcept {
  // A child that this process has forked has nothing to say here.
  if (getpid() == last_words.pid && pread(last_words.fd, last_words.to, last_words.size, 0) < 0) {}
  ::signal(signal, SIG_DFL);
  raise(signal);
}

PyObject* keep_last_words(PyObject*, PyObject* args) noexcept {
  PyObject* cells;
  Py_ssize_t first;
  int fd;
  if (!PyArg_ParseTuple(args, "O!ni:_keep_last_words", cells_type, &cells, &first, &fd)) return nullptr;
  Atomic<i64>* start = cell(cells, first);
  if (start == nullptr) return nullptr;
  last_words.fd = fd;
  last_words.pid = getpid();
  last_words.to = start;
  last_words.size = static_cast<size_t>(length(cells) - first) * sizeof(i64);
  struct sigaction action = {};
  action.sa_handler = copy_last_words;
  action.sa_flags = SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigaction(signal, &action, nullptr);
  Py_RETURN_NONE;
}

int end_to = -1;

void write_end(int) noexcept {
  const int saved = errno;
  if (write(end_to, "", 1) < 0) {}
  errno = saved;
}

PyObject* write_end_at(PyObject*, PyObject* args) noexcept {
  int number;
  if (!PyArg_ParseTuple(args, "ii:_write_end_at", &number, &end_to)) return nullptr;
  struct sigaction action = {};
  action.sa_handler = write_end;
  action.sa_flags = SA_RESTART | SA_ONSTACK;
  if (sigaction(number, &action, nullptr) != 0) return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"_write_end_at", write_end_at, METH_VARARGS,
     "_write_end_at(signal, fd)\n--\n\nWrite a zero byte into `fd` when the signal comes: to be chained after "
     "faulthandler.register()."},
    {"_serve", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(serve)), METH_FASTCALL,
     "_serve(get, put, functions, cells, wid, timeout)\n--\n\nTake messages and answer those that are one plain item "
     "for a "
     "function in `functions` with a plain result. Returns the first message that is something else; or "
     "(None, seq, result, ns) when a result is not plain. What the function raises comes through; the cells tell of "
     "which unit."},
    {"_keep_last_words", keep_last_words, METH_VARARGS,
     "_keep_last_words(cells, first, fd)\n--\n\nWhen this process dies of a crash, copy what has been written into "
     "`fd` into the cells from `first` on.\n\nTo be called before faulthandler.enable(fd), which calls the former "
     "handler after its own."},
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
