// Queue, JoinableQueue and SimpleQueue: what their Python classes (procession._wire.queues) are built on.
#include "procession/queue.hpp"

#include <utility>

#include "buffer.hpp"
#include "codec.hpp"
#include "pickler.hpp"

namespace procession::bind {
namespace {

struct QueueObject {
  Handle handle;
  bool closed;  ///< by close(), in this process
  bool large;   ///< the last message that was taken here carried something
  u8 bells;     ///< a bit for each bell this handle has added

  QueueState& state() const noexcept { return handle.state<QueueState>(); }
  QueueOps ops() const noexcept { return QueueOps(handle.view->arena, handle.view->me); }
  bool joinable() const noexcept { return handle.object->kind == Kind::kJoinableQueue; }
};

PyTypeObject* queue_type = nullptr;
PyTypeObject* joinable_type = nullptr;
PyObject* empty_error = nullptr;
PyObject* full_error = nullptr;
PyObject* shut_down_error = nullptr;

QueueObject* queue(PyObject* self) noexcept { return reinterpret_cast<QueueObject*>(self); }

bool find_errors() noexcept {
  if (shut_down_error != nullptr) return true;
  PyObject* m = PyImport_ImportModule("queue");
  if (m == nullptr) return false;
  empty_error = PyObject_GetAttrString(m, "Empty");
  full_error = PyObject_GetAttrString(m, "Full");
  Py_DECREF(m);
  if (empty_error == nullptr || full_error == nullptr) return false;
  shut_down_error = error_class("ShutDown");
  return shut_down_error != nullptr;
}

PyObject* raise_plain(PyObject*& error) noexcept {
  if (find_errors()) PyErr_SetNone(error);
  return nullptr;
}

bool check_open(QueueObject* q) noexcept {
  if (!check_handle(&q->handle)) return false;
  if (!q->closed) return true;
  // The standard library's SimpleQueue says so with an OSError, its Queue with a ValueError.
  PyObject* cls = PyObject_GetAttrString(reinterpret_cast<PyObject*>(q), "_closed_error");
  if (cls == nullptr) PyErr_Clear();
  PyErr_Format(cls != nullptr ? cls : PyExc_ValueError, "%s %R is closed", Py_TYPE(q)->tp_name, q);
  Py_XDECREF(cls);
  return false;
}

PyObject* put_failed(QueueObject* q, Put r, u64 bytes) noexcept {
  if (PyErr_Occurred()) return nullptr;
  switch (r) {
    case Put::kFull: return raise_plain(full_error);
    case Put::kShutDown: return raise_plain(shut_down_error);
    case Put::kNoMemory: return raise_no_memory(q->handle.view, bytes);
    default: return raise_plain(full_error);  // a stopped process inside the queue, and the time was over
  }
}

/// Give up the cargoes of messages that were not put, or have been read.
void unload(QueueObject* q, const Outgoing* m, size_t n) noexcept {
  for (size_t i = 0; i < n; ++i) {
    if (m[i].cargo != 0) q->handle.view->arena.unload_cargo(q->handle.view->me, m[i].cargo, patient());
  }
}

// --- put --------------------------------------------------------------------------------------------------------------------

PyObject* put_one(QueueObject* q, PyObject* value, i64 deadline) noexcept {
  Encoded e;
  if (!e.encode(value)) {
    // The standard library's hook for subclasses (concurrent.futures overrides it): there, errors of pickling come later.
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyObject* hook = PyObject_GetAttrString(reinterpret_cast<PyObject*>(q), "_on_queue_feeder_error");
    if (hook == nullptr) {
      PyErr_Restore(type, error, traceback);
      return nullptr;
    }
    PyErr_NormalizeException(&type, &error, &traceback);
    if (traceback != nullptr) PyException_SetTraceback(error, traceback);
    PyObject* r = PyObject_CallFunctionObjArgs(hook, error, value, nullptr);
    Py_DECREF(hook);
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return r;
  }
  Outgoing o = e.outgoing();
  if (e.handles() != nullptr) {
    o.cargo = load(e, q->handle.view, q->handle.object->block);
    if (PyErr_Occurred()) return nullptr;
  }
  u32 done = 0;
  PyWaiter waiter(deadline);
  const Put r = q->ops().put(q->state(), &o, 1, &done, waiter);
  waiter.resume();
  if (done == 0) {
    unload(q, &o, 1);
    return put_failed(q, r, o.len);
  }
  defer_error();
  Py_RETURN_NONE;
}

/// `(obj, block=True, timeout=None)`, positional or by name.
bool parse_put(PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames, PyObject** value, i64* deadline) noexcept {
  if (nargs >= 1) {
    *value = args[0];
    return parse_wait(args + 1, nargs - 1, kwnames, "put", deadline);
  }
  const Py_ssize_t nkw = kwnames == nullptr ? 0 : PyTuple_GET_SIZE(kwnames);
  PyObject* block = Py_True;
  PyObject* timeout = Py_None;
  for (Py_ssize_t i = 0; i < nkw; ++i) {
    PyObject* key = PyTuple_GET_ITEM(kwnames, i);
    if (PyUnicode_CompareWithASCIIString(key, "obj") == 0) *value = args[i];
    else if (PyUnicode_CompareWithASCIIString(key, "block") == 0) block = args[i];
    else if (PyUnicode_CompareWithASCIIString(key, "timeout") == 0) timeout = args[i];
    else {
      PyErr_Format(PyExc_TypeError, "put() got an unexpected keyword argument '%U'", key);
      return false;
    }
  }
  if (*value == nullptr) {
    PyErr_SetString(PyExc_TypeError, "put() missing 1 required positional argument: 'obj'");
    return false;
  }
  PyObject* both[] = {block, timeout};
  return parse_wait(both, 2, nullptr, "put", deadline);
}

PyObject* put(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  QueueObject* q = queue(self);
  if (!check_open(q)) return nullptr;
  i64 deadline = kForever;
  PyObject* value = nullptr;
  if (nargs == 1 && kwnames == nullptr) {
    value = args[0];
  } else if (!parse_put(args, nargs, kwnames, &value, &deadline)) {
    return nullptr;
  }
  return put_one(q, value, deadline);
}

PyObject* put_nowait(PyObject* self, PyObject* value) noexcept {
  QueueObject* q = queue(self);
  return check_open(q) ? put_one(q, value, 0) : nullptr;
}

/// All are pickled before the first is put: an error of pickling puts none.
PyObject* put_many(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  QueueObject* q = queue(self);
  i64 deadline = kForever;
  if (!check_open(q)) return nullptr;
  if (nargs < 1) {
    PyErr_SetString(PyExc_TypeError, "put_many() missing 1 required positional argument: 'items'");
    return nullptr;
  }
  if (!parse_wait(args + 1, nargs - 1, kwnames, "put_many", &deadline)) return nullptr;
  PyObject* items = PySequence_Fast(args[0], "put_many() takes an iterable");
  if (items == nullptr) return nullptr;
  const size_t n = static_cast<size_t>(PySequence_Fast_GET_SIZE(items));
  constexpr u64 kElsewhere = UINT64_MAX;
  Buffer<Outgoing> out;
  Buffer<char> small;  // what the encoder wrote itself, one after the other
  Buffer<u64> at;      // where in `small`: pointers only once it has stopped growing
  PyObject* keep = PyList_New(0);
  bool ok = keep != nullptr;
  if (ok && (!out.reserve(n) || !at.reserve(n))) {
    PyErr_NoMemory();
    ok = false;
  }
  u64 bytes = 0;
  for (size_t i = 0; ok && i < n && i < static_cast<size_t>(PySequence_Fast_GET_SIZE(items)); ++i) {
    Encoded e;
    PyObject* item =
        Py_NewRef(PySequence_Fast_GET_ITEM(items, static_cast<Py_ssize_t>(i)));  // a reducer may empty the list
    ok = e.encode(item);
    Py_DECREF(item);
    if (!ok) break;
    Outgoing o = e.outgoing();
    if (e.handles() != nullptr) {
      o.cargo = load(e, q->handle.view, q->handle.object->block);
      ok = PyErr_Occurred() == nullptr;
      if (!ok) break;
    }
    bytes += o.len;
    const bool inside = e.is_inside();
    ok = out.push(o) && at.push(inside ? small.size() : kElsewhere) &&
         (!inside || small.append(static_cast<const char*>(o.data), o.len));
    if (!ok) {
      PyErr_NoMemory();
      unload(q, &o, out.size() == i ? 1 : 0);
    } else if (!inside) {
      PyObject* kept = e.keeper();
      ok = PyList_Append(keep, kept) == 0;
      Py_DECREF(kept);
    }
  }
  Py_DECREF(items);
  if (!ok) {
    unload(q, out.data(), out.size());
    Py_XDECREF(keep);
    return nullptr;
  }
  for (size_t i = 0; i < out.size(); ++i) {
    if (at[i] != kElsewhere) out[i].data = small.data() + at[i];
  }
  u32 done = 0;
  if (!out.empty()) {
    PyWaiter waiter(deadline);
    const Put r = q->ops().put(q->state(), out.data(), static_cast<u32>(out.size()), &done, waiter);
    waiter.resume();
    Py_CLEAR(keep);
    if (done != out.size()) {
      unload(q, out.data() + done, out.size() - done);
      put_failed(q, r, bytes);
      PyObject *type, *error, *traceback;
      PyErr_Fetch(&type, &error, &traceback);
      PyErr_NormalizeException(&type, &error, &traceback);
      PyObject* count = PyLong_FromUnsignedLong(done);
      if (error != nullptr && count != nullptr && PyObject_SetAttrString(error, "items_put", count) != 0) PyErr_Clear();
      Py_XDECREF(count);
      PyErr_Restore(type, error, traceback);
      return nullptr;
    }
  }
  Py_XDECREF(keep);
  Py_RETURN_NONE;
}

// --- get --------------------------------------------------------------------------------------------------------------------

constexpr u32 kOnStack = 2048;

/// Decode a message that has been taken; then its handles are held here, and its cargo can go.
PyObject* receive(QueueObject* q, u8 kind, const void* data, u64 len, u32 cargo, PyObject* whole) noexcept {
  const u32 outer = std::exchange(own_cargoes, cargo != 0);
  PyObject* value = decode(kind, data, len, whole);
  own_cargoes = outer;
  if (cargo != 0) q->handle.view->arena.unload_cargo(q->handle.view->me, cargo, patient());
  return value;
}

/// One message taken and decoded; nullptr with an exception, kEmpty included.
/// `undisturbed`: signals are left to be handled after the call, for items taken before would go down with it.
PyObject* get_one(QueueObject* q, i64 deadline, bool undisturbed = false) noexcept {
  char stack[kOnStack];
  PyObject* bytes = nullptr;
  Incoming in{stack, sizeof stack, 0, 0};
  const QueueOps ops = q->ops();
  QueueState& s = q->state();
  const bool joinable = q->joinable();
  PyWaiter waiter(deadline);
  const Waiter way = undisturbed ? waiter->undisturbed() : *waiter;
  for (;;) {
    const Get r = ops.try_get(s, joinable, in, way);
    if (r == Get::kDone) break;
    Wait w = Wait::kTimeout;
    switch (r) {
      case Get::kTooSmall:
        waiter.resume();
        Py_XDECREF(bytes);
        bytes = PyBytes_FromStringAndSize(nullptr, in.len);
        if (bytes == nullptr) return nullptr;
        in.data = PyBytes_AS_STRING(bytes);
        in.capacity = in.len;
        continue;
      case Get::kEmpty:
        if (deadline != 0) w = ops.wait_items(s, joinable, way, q->large);
        if (w == Wait::kReady) continue;
        waiter.resume();
        Py_XDECREF(bytes);
        return w == Wait::kInterrupted ? nullptr : raise_plain(empty_error);
      case Get::kShutDown:
        waiter.resume();
        Py_XDECREF(bytes);
        return raise_plain(shut_down_error);
      case Get::kNoMemory:
        waiter.resume();
        Py_XDECREF(bytes);
        return raise_no_memory(q->handle.view, in.len + sizeof(Record));
      default:
        waiter.resume();
        Py_XDECREF(bytes);
        return PyErr_Occurred() ? nullptr : raise_plain(empty_error);
    }
  }
  waiter.resume();
  defer_error();
  q->large = in.cargo != 0;
  ops.announce_space(s, 1);
  PyObject* value =
      receive(q, in.kind, in.data, in.len, in.cargo, bytes != nullptr && in.len == in.capacity ? bytes : nullptr);
  Py_XDECREF(bytes);
  return value;
}

PyObject* get(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  QueueObject* q = queue(self);
  if (!check_open(q)) return nullptr;
  i64 deadline = kForever;
  if ((nargs != 0 || kwnames != nullptr) && !parse_wait(args, nargs, kwnames, "get", &deadline)) return nullptr;
  return get_one(q, deadline);
}

PyObject* get_nowait(PyObject* self, PyObject*) noexcept {
  QueueObject* q = queue(self);
  return check_open(q) ? get_one(q, 0) : nullptr;
}

struct Taken {
  u8 kind;
  u32 len;
  u32 cargo;
  u64 at;
};

/// Messages are copied out under one lock, into a buffer, and decoded afterwards.
bool get_batch(QueueObject* q, u32 n, PyObject* list, PyWaiter& waiter, Buffer<char>& buffer, u64* need) noexcept {
  Buffer<Taken> taken;
  u64 used = 0;
  *need = 0;
  const auto take = [&](const Message& m) {
    const u32 n = m.payload_len();
    if (used + n > buffer.capacity()) {
      *need = n;
      return false;
    }
    if (!taken.push({m.kind, n, m.cargo(), used})) return false;
    std::memcpy(buffer.data() + used, m.payload(), n);
    used += n;
    return true;
  };
  if (!taken.reserve(std::min<u32>(n, 4096))) return true;
  q->ops().try_get_many(q->state(), n, take, waiter->undisturbed());
  waiter.resume();  // before anything of Python is touched
  if (taken.empty()) return true;
  q->ops().announce_space(q->state(), static_cast<u32>(taken.size()));
  bool ok = true;
  PyObject *type = nullptr, *error = nullptr, *traceback = nullptr;
  for (const Taken& t : taken) {
    PyObject* value = receive(q, t.kind, buffer.data() + t.at, t.len, t.cargo, nullptr);
    if (value == nullptr || PyList_Append(list, value) != 0) {
      // The others are taken already: go on, and report the first error.
      if (ok) PyErr_Fetch(&type, &error, &traceback);
      else PyErr_Clear();
      ok = false;
    }
    Py_XDECREF(value);
  }
  if (!ok) PyErr_Restore(type, error, traceback);
  return ok;
}

/// Up to `n` items in all, without waiting. The signals that come meanwhile are handled after the call.
bool get_more(QueueObject* q, Py_ssize_t n, PyObject* list) noexcept {
  const auto one = [&] {
    PyObject* value = get_one(q, 0, true);
    if (value == nullptr) {
      const bool none = PyErr_ExceptionMatches(empty_error) || PyErr_ExceptionMatches(shut_down_error);
      if (none) PyErr_Clear();
      return none ? 0 : -1;
    }
    const int failed = PyList_Append(list, value);
    Py_DECREF(value);
    return failed != 0 ? -1 : 1;
  };
  Buffer<char> buffer;
  PyWaiter waiter(0);
  while (PyList_GET_SIZE(list) < n) {
    const Py_ssize_t before = PyList_GET_SIZE(list);
    u64 need = 0;
    if (!q->joinable()) {
      if (!buffer.reserve(64 << 10)) return true;  // what was taken is returned; the rest is still in the queue
      const bool ok =
          get_batch(q, static_cast<u32>(std::min<Py_ssize_t>(n - before, INT32_MAX)), list, waiter, buffer, &need);
      if (!ok) return false;
      if (PyList_GET_SIZE(list) != before) continue;
      if (need == 0) return true;
    }
    // Joinable, or longer than the buffer.
    const int r = one();
    if (r <= 0) return r == 0;
  }
  return true;
}

PyObject* get_many(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  QueueObject* q = queue(self);
  if (!check_open(q)) return nullptr;
  long n = 100;
  Py_ssize_t used = 0;
  if (nargs > 0) {
    n = PyLong_AsLong(args[0]);
    if (n == -1 && PyErr_Occurred()) return nullptr;
    used = 1;
  }
  i64 deadline = kForever;
  if (!parse_wait(args + used, nargs - used, kwnames, "get_many", &deadline)) return nullptr;
  if (n < 1) {
    PyErr_Format(PyExc_ValueError, "get_many() takes at least 1 item, not %ld", n);
    return nullptr;
  }
  PyObject* list = PyList_New(0);
  if (list == nullptr) return nullptr;
  // The first may have to be waited for, or be longer than the buffer; the rest comes in batches.
  PyObject* first = get_one(q, deadline);
  if (first == nullptr || PyList_Append(list, first) != 0) {
    Py_XDECREF(first);
    Py_DECREF(list);
    return nullptr;
  }
  Py_DECREF(first);
  if (!get_more(q, n, list)) {
    // An item that cannot be unpickled must not take the others of its batch with it.
    PyObject *type, *error, *traceback;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (error != nullptr && PyObject_SetAttrString(error, "items_taken", list) != 0) PyErr_Clear();
    PyErr_Restore(type, error, traceback);
    Py_CLEAR(list);
  }
  return list;
}

// --- state ------------------------------------------------------------------------------------------------------------------

i64 size_of(QueueObject* q) noexcept {
  if (!check_handle(&q->handle)) return -1;
  PyWaiter waiter(kForever);
  const i64 n = q->ops().size(q->state(), q->joinable(), waiter);
  waiter.resume();
  return n;
}

PyObject* qsize(PyObject* self, PyObject*) noexcept {
  const i64 n = size_of(queue(self));
  return n < 0 ? nullptr : PyLong_FromLongLong(n);
}

PyObject* empty(PyObject* self, PyObject*) noexcept {
  const i64 n = size_of(queue(self));
  return n < 0 ? nullptr : PyBool_FromLong(n == 0);
}

PyObject* full(PyObject* self, PyObject*) noexcept {
  const i64 n = size_of(queue(self));
  return n < 0 ? nullptr : PyBool_FromLong(queue(self)->ops().full(queue(self)->state()));
}

PyObject* shutdown(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  QueueObject* q = queue(self);
  static const char* names[] = {"immediate", nullptr};
  int immediate = 0;
  if (!check_handle(&q->handle) ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "|p", const_cast<char**>(names), &immediate))
    return nullptr;
  PyWaiter waiter(kForever);
  q->ops().shut_down(q->state(), immediate != 0, waiter);
  waiter.resume();
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* close_(PyObject* self, PyObject*) noexcept {
  queue(self)->closed = true;
  Py_RETURN_NONE;
}

PyObject* get_closed(PyObject* self, void*) noexcept { return PyBool_FromLong(queue(self)->closed); }

PyObject* get_maxsize(PyObject* self, void*) noexcept {
  return check_handle(&queue(self)->handle) ? PyLong_FromUnsignedLong(queue(self)->state().maxsize) : nullptr;
}

PyObject* task_done(PyObject* self, PyObject*) noexcept {
  QueueObject* q = queue(self);
  if (!check_handle(&q->handle)) return nullptr;
  PyWaiter waiter(kForever);
  const QueueOps::Done r = q->ops().task_done(q->state(), waiter);
  waiter.resume();
  if (PyErr_Occurred()) return nullptr;
  if (r == QueueOps::Done::kNone) {
    PyErr_SetString(PyExc_ValueError, "task_done() called too many times");
    return nullptr;
  }
  Py_RETURN_NONE;
}

PyObject* join(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  QueueObject* q = queue(self);
  static const char* names[] = {"timeout", nullptr};
  PyObject* timeout = nullptr;
  i64 deadline = kForever;
  if (!check_handle(&q->handle) ||
      !PyArg_ParseTupleAndKeywords(args, kwargs, "|O", const_cast<char**>(names), &timeout) ||
      !parse_timeout(timeout, &deadline)) {
    return nullptr;
  }
  PyWaiter waiter(deadline);
  const Wait r = q->ops().join(q->state(), waiter);
  waiter.resume();
  if (PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(r == Wait::kReady);
}

PyObject* unfinished(PyObject* self, PyObject*) noexcept {
  QueueObject* q = queue(self);
  return check_handle(&q->handle) ? PyLong_FromUnsignedLong(q->ops().unfinished(q->state())) : nullptr;
}

PyObject* add_bell(PyObject* self, PyObject* arg) noexcept {
  QueueObject* q = queue(self);
  const long fd = PyLong_AsLong(arg);
  if (!check_handle(&q->handle) || (fd == -1 && PyErr_Occurred())) return nullptr;
  const int bell = q->ops().add_bell(q->state(), static_cast<int>(fd));
  if (bell >= 0) q->bells |= static_cast<u8>(1u << bell);
  return PyLong_FromLong(bell);
}

PyObject* arm_bell(PyObject* self, PyObject* args) noexcept {
  QueueObject* q = queue(self);
  int bell = 0, space = 0;
  if (!check_handle(&q->handle) || !PyArg_ParseTuple(args, "ip", &bell, &space)) return nullptr;
  if (bell < 0 || bell >= static_cast<int>(kBells)) {
    PyErr_SetString(PyExc_ValueError, "no such bell");
    return nullptr;
  }
  q->ops().arm_bell(q->state(), bell, space ? kBellSpace : kBellItems);
  const bool ready = space ? !q->ops().full(q->state()) : q->ops().may_have_items(q->state());
  return PyBool_FromLong(ready || (q->state().flags.load(std::memory_order_relaxed) & kQueueShutDown) != 0);
}

PyObject* remove_bell(PyObject* self, PyObject* arg) noexcept {
  QueueObject* q = queue(self);
  const long bell = PyLong_AsLong(arg);
  if (!check_handle(&q->handle) || (bell == -1 && PyErr_Occurred())) return nullptr;
  if (bell >= 0 && bell < static_cast<long>(kBells)) q->ops().remove_bell(q->state(), static_cast<int>(bell));
  Py_RETURN_NONE;
}

/// A handle takes its bells with it (their pipes are closed with its Python half), or six handles later there are none.
void queue_dealloc(PyObject* self) noexcept {
  QueueObject* q = queue(self);
  for (u32 i = 0; q->handle.object != nullptr && i < kBells; ++i) {
    if (q->bells >> i & 1) q->ops().remove_bell(q->state(), static_cast<int>(i));
  }
  handle_dealloc(self);
}

int init(PyObject* self, PyObject* args, PyObject* kwargs, Kind kind) noexcept {
  QueueObject* q = queue(self);
  static const char* names[] = {"maxsize", "ctx", nullptr};
  long long maxsize = 0;
  PyObject* ctx = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|L$O", const_cast<char**>(names), &maxsize, &ctx)) return -1;
  if (maxsize > INT32_MAX) {
    PyErr_Format(PyExc_ValueError, "maxsize must be at most 2147483647, not %lld", maxsize);
    return -1;
  }
  if (!make_object(&q->handle, sizeof(QueueState) + kInlineUnits * 8, kind)) return -1;
  QueueOps::init(q->state(), maxsize > 0 ? static_cast<u32>(maxsize) : 0);
  return 0;
}
int queue_init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  return init(self, args, kwargs, Kind::kQueue);
}
int joinable_init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  return init(self, args, kwargs, Kind::kJoinableQueue);
}

template <class F>
constexpr PyCFunction as_method(F f) noexcept {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"put", as_method(put), METH_FASTCALL | METH_KEYWORDS,
     "put(obj, block=True, timeout=None)\n\nPut an item; it has been delivered when this returns, and is a "
     "snapshot.\n\n"
     "Blocks while the queue is full, until a signal handler raises or `timeout` seconds (monotonic clock) are over; "
     "negative\n"
     "counts as 0. Raises queue.Full, ShutDown, ValueError after close(), ArenaFullError, and what pickling raises."},
    {"put_nowait", put_nowait, METH_O, "put(obj, block=False)"},
    {"put_many", as_method(put_many), METH_FASTCALL | METH_KEYWORDS,
     "put_many(items, block=True, timeout=None)\n\nPut all items in order, at a fraction of the cost of one by one.\n\n"
     "All are pickled first: if one cannot be, none is put. On queue.Full the exception's `items_put` says how many "
     "were."},
    {"get", as_method(get), METH_FASTCALL | METH_KEYWORDS,
     "get(block=True, timeout=None)\n\nTake the oldest item.\n\n"
     "Blocks until there is one, the queue is shut down, a signal handler raises or `timeout` seconds (monotonic "
     "clock) are\n"
     "over; negative counts as 0. Raises queue.Empty, ShutDown, ValueError after close()."},
    {"get_nowait", get_nowait, METH_NOARGS, "get(block=False)"},
    {"get_many", as_method(get_many), METH_FASTCALL | METH_KEYWORDS,
     "get_many(n=100, block=True, timeout=None) -> list\n\nTake the 1 to n oldest items; waits, as get() does, for the "
     "first only."},
    {"qsize", qsize, METH_NOARGS, "How many items are in the queue; exact at the moment of the call."},
    {"empty", empty, METH_NOARGS, "Whether the queue is empty; exact at the moment of the call."},
    {"full", full, METH_NOARGS, "Whether the queue is full; exact at the moment of the call."},
    {"shutdown", as_method(shutdown), METH_VARARGS | METH_KEYWORDS,
     "shutdown(immediate=False)\n\nNo put succeeds from now on; get goes on until the queue is empty (immediate: it is "
     "emptied\n"
     "now). Both then raise ShutDown, in all processes. As queue.Queue.shutdown of Python 3.13."},
    {"close", close_, METH_NOARGS,
     "This process is done with the queue: put and get raise ValueError here. Others are not concerned."},
    {"_unfinished", unfinished, METH_NOARGS, nullptr},
    {"_add_bell", add_bell, METH_O, nullptr},
    {"_arm_bell", arm_bell, METH_VARARGS, nullptr},
    {"_remove_bell", remove_bell, METH_O, nullptr},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyMethodDef joinable_methods[] = {
    {"task_done", task_done, METH_NOARGS,
     "Mark the oldest item that this process has taken and not yet marked as done.\n\n"
     "An item whose consumer was killed before that is delivered again. ValueError when nothing is in hand."},
    {"join", as_method(join), METH_VARARGS | METH_KEYWORDS,
     "join(timeout=None) -> bool\n\nWait until every item put has been taken and marked done; False when the time was "
     "over first."},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef getset[] = {
    {"_closed", get_closed, nullptr, nullptr, nullptr},
    {"_maxsize", get_maxsize, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(queue_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(queue_dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, handle_members},
    {Py_tp_doc, const_cast<char*>("Queue(maxsize=0, *, ctx=None)\n--\n\nThe shared half of a queue.")},
    {0, nullptr},
};
PyType_Slot joinable_slots[] = {
    {Py_tp_init, reinterpret_cast<void*>(joinable_init)},
    {Py_tp_methods, joinable_methods},
    {Py_tp_doc, const_cast<char*>("JoinableQueue(maxsize=0, *, ctx=None)\n--\n\nThe shared half of a JoinableQueue.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.Queue", sizeof(QueueObject), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
PyType_Spec joinable_spec{"procession._native.JoinableQueue", sizeof(QueueObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, joinable_slots};

}  // namespace

bool add_queue_types(PyObject* module) noexcept {
  return add_type(module, &spec, &queue_type) && add_type(module, &joinable_spec, &joinable_type, queue_type);
}

}  // namespace procession::bind
