#include "handle.hpp"

#include <pthread.h>

#include <cmath>
#include <utility>

#include "buffer.hpp"

namespace procession::bind {
namespace {

View* views = nullptr;      // the current one first
Handle* handles = nullptr;  // guarded by handles_mutex: fork may come from a thread without the GIL
pthread_mutex_t handles_mutex = PTHREAD_MUTEX_INITIALIZER;
u64 limit_bytes = 0;  // 0: find out
u64 size_bytes = Arena::kDefaultSize;
thread_local PyObject* collector = nullptr;  // a list that keeps pickled handles alive, see handle_collector()

/// A process without a slot (all taken): it works, but its death is not noticed.
Tag no_slot() noexcept { return make_tag(static_cast<u32>(getpid()), 0xfffa); }

void before_fork() noexcept {
  pthread_mutex_lock(&handles_mutex);
  for (View* v = views; v != nullptr; v = v->next) {
    v->child = v->arena.reserve_child(v->me);
    if (v->child == 0 && v->arena.collect(v->me, patient()) != 0) v->child = v->arena.reserve_child(v->me);
  }
  for (Handle* h = handles; h != nullptr; h = h->next) {
    // Parent and child each have a copy of the array from here on, as of all other memory.
    if (is_segment(h)) isolate(reinterpret_cast<SegmentObject*>(h));
    const bool held = h->view->child != 0 && h->view->arena.hold(h->view->me, *h->object, h->view->child, 1, patient());
    if (!held) h->object->pinned.store(1, std::memory_order_relaxed);
  }
}

void after_fork_in_parent() noexcept { pthread_mutex_unlock(&handles_mutex); }

void after_fork_in_child() noexcept {
  ++fork_count;
  for (View* v = views; v != nullptr; v = v->next) {
    v->me = v->child;
    if (v->child != 0 && v->arena.enter_reserved(v->child)) continue;
    v->me = v->arena.claim();
    if (v->me == 0) v->me = no_slot();
    for (Handle *h = handles, *next = nullptr; h != nullptr; h = next) {
      next = h->next;
      if (h->view != v) continue;
      if (v->child == 0) {  // no slot before the fork: the parent has pinned it
        v->arena.hold(v->me, *h->object, v->me, 1, patient());
        continue;
      }
      // Stopped between fork and here for so long that the reservation was given up, and with it what this process was to
      // hold: the memory may be somebody else's by now.
      (h->prev != nullptr ? h->prev->next : handles) = h->next;
      if (h->next != nullptr) h->next->prev = h->prev;
      h->object = nullptr;
    }
  }
  pthread_mutex_init(&handles_mutex, nullptr);
}

void link_handle(Handle* h) noexcept {
  pthread_mutex_lock(&handles_mutex);
  h->prev = nullptr;
  h->next = handles;
  if (handles != nullptr) handles->prev = h;
  handles = h;
  pthread_mutex_unlock(&handles_mutex);
}

void unlink_handle(Handle* h) noexcept {
  pthread_mutex_lock(&handles_mutex);
  (h->prev != nullptr ? h->prev->next : handles) = h->next;
  if (h->next != nullptr) h->next->prev = h->prev;
  pthread_mutex_unlock(&handles_mutex);
}

/// Adopt an arena that has been mapped: take a slot in it, make it the current one.
View* enter_view(View* v) noexcept {
  v->me = v->arena.claim();
  if (v->me == 0) {
    // All slots taken: perhaps by processes that are gone.
    v->me = no_slot();
    if (v->arena.collect(v->me, patient()) != 0) {
      const Tag t = v->arena.claim();
      if (t != 0) v->me = t;
    }
  }
  static const bool registered = [] {
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    return true;
  }();
  (void)registered;
  v->next = views;
  views = v;
  return v;
}

const char* failure_text(Arena::Failure f) noexcept {
  switch (f) {
    case Arena::Failure::kMemfd: return "memfd_create failed (too many open files, or forbidden by a sandbox)";
    case Arena::Failure::kTruncate: return "the memory file could not be given a size (ulimit -f?)";
    case Arena::Failure::kMap: return "no address space of 256 KiB or more could be mapped (ulimit -v?)";
    case Arena::Failure::kNotAnArena: return "the file descriptor is not an arena of procession";
    case Arena::Failure::kLayout: return "the arena was made by another version of procession";
    case Arena::Failure::kTooSmall: return "the arena's size is too small (PROCESSION_ARENA_SIZE)";
    default: return "unknown";
  }
}

void raise_failure(Arena& arena, Arena::Failure f) noexcept {
  const int error = arena.error();
  const bool system = f == Arena::Failure::kMemfd || f == Arena::Failure::kTruncate || f == Arena::Failure::kMap;
  if (!system) {
    PyErr_Format(PyExc_ValueError, "procession: %s.", failure_text(f));
    return;
  }
  PyObject* args = Py_BuildValue("(iN)", error,
                                 PyUnicode_FromFormat("procession could not make its arena of shared memory: %s: %s. "
                                                      "`procession doctor` shows the limits.",
                                                      failure_text(f), std::strerror(error)));
  if (args == nullptr) return;
  PyErr_SetObject(PyExc_OSError, args);
  Py_DECREF(args);
}

View* new_view(int fd) noexcept {
  View* v = new (std::nothrow) View;
  if (v == nullptr) {
    PyErr_NoMemory();
    return nullptr;
  }
  const Arena::Failure f = fd < 0 ? v->arena.create(size_bytes, limit_bytes) : v->arena.attach(fd);
  if (f != Arena::Failure::kNone) {
    raise_failure(v->arena, f);
    delete v;
    return nullptr;
  }
  return enter_view(v);
}

PyObject* deferred[3];  // what defer_error() keeps until the interpreter looks

int raise_deferred(void*) noexcept {
  if (deferred[0] == nullptr) return 0;
  PyErr_Restore(deferred[0], deferred[1], deferred[2]);
  deferred[0] = deferred[1] = deferred[2] = nullptr;
  return -1;
}

}  // namespace

u32 fork_count = 0;

void defer_error() noexcept {
  if (PyErr_Occurred() == nullptr) return;
  if (deferred[0] != nullptr) {  // one is enough
    PyErr_Clear();
    return;
  }
  PyErr_Fetch(&deferred[0], &deferred[1], &deferred[2]);
  if (Py_AddPendingCall(raise_deferred, nullptr) != 0) raise_deferred(nullptr);
}

View* current_view() noexcept {
  if (views != nullptr) return views;
  if (limit_bytes == 0) {
    // Policy (the memory limit, the environment) is Python's: procession._settings says how large the arena may be.
    PyObject* m = PyImport_ImportModule("procession._settings");
    PyObject* r = m == nullptr ? nullptr : PyObject_CallMethod(m, "arena_limits", nullptr);
    Py_XDECREF(m);
    unsigned long long size = 0, limit = 0;
    const bool ok = r != nullptr && PyArg_ParseTuple(r, "KK", &size, &limit);
    Py_XDECREF(r);
    if (!ok) return nullptr;
    if (views != nullptr) return views;  // made by another thread meanwhile
    size_bytes = size;
    limit_bytes = limit;
  }
  return new_view(-1);
}

View* find_view(u64 arena_id) noexcept {
  for (View* v = views; v != nullptr; v = v->next) {
    if (v->arena.id() == arena_id) return v;
  }
  return nullptr;
}

bool has_views() noexcept { return views != nullptr; }

PyObject* error_class(const char* name) noexcept {
  PyObject* m = PyImport_ImportModule("procession._errors");
  if (m == nullptr) return nullptr;
  PyObject* c = PyObject_GetAttrString(m, name);
  Py_DECREF(m);
  return c;
}

PyObject* raise_no_memory(const View* v, u64 bytes) noexcept {
  if (PyErr_Occurred()) return nullptr;
  PyObject* c = error_class("ArenaFullError");
  if (c == nullptr) return nullptr;
  const Header& h = v->arena.header();
  PyErr_Format(
      c,
      "the arena is full: %llu bytes more were asked for, %llu of %llu are in use. Take items out of queues, or "
      "raise the limit (PROCESSION_ARENA_SIZE, ulimit -v, the container's memory limit).",
      static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(h.used.load(std::memory_order_relaxed)),
      static_cast<unsigned long long>(h.limit));
  Py_DECREF(c);
  return nullptr;
}

bool make_object(Handle* h, u64 size, Kind kind, u64 zeroed) noexcept {
  if (h->object != nullptr) {
    PyErr_Format(PyExc_RuntimeError, "%s.__init__() was called twice", Py_TYPE(h)->tp_name);
    return false;
  }
  View* v = current_view();
  if (v == nullptr) return false;
  PyWaiter waiter(kForever);
  const u32 i = v->arena.allocate_object(v->me, size, kind, waiter, zeroed);
  waiter.resume();
  if (i == 0) {
    raise_no_memory(v, size);  // unless a signal handler has raised
    return false;
  }
  defer_error();
  h->view = v;
  h->object = &v->arena.at<Object>(i);
  link_handle(h);
  return true;
}

Handle* find_handle(bool (*f)(Handle*, const void*), const void* arg) noexcept {
  pthread_mutex_lock(&handles_mutex);
  Handle* h = handles;
  while (h != nullptr && (Py_REFCNT(h) == 0 || !f(h, arg))) h = h->next;
  pthread_mutex_unlock(&handles_mutex);
  return h;
}

PyObject* swap_collector(PyObject* list) noexcept { return std::exchange(collector, list); }

bool check_handle(const Handle* h) noexcept {
  if (h->object != nullptr) return true;
  const char* text = h->view == nullptr
                         ? "%s.__init__() has not been called"
                         : "this %s was lost: the process was stopped for seconds while it was being forked";
  PyErr_Format(PyExc_RuntimeError, text, Py_TYPE(h)->tp_name);
  return false;
}

void release_handle(Handle* h) noexcept {
  if (h->object == nullptr) return;
  unlink_handle(h);
  h->view->arena.drop(h->view->me, *h->object, patient());
  h->object = nullptr;
}

void handle_dealloc(PyObject* self) noexcept {
  Handle* h = reinterpret_cast<Handle*>(self);
  PyTypeObject* type = Py_TYPE(self);
  if (PyType_IS_GC(type)) PyObject_GC_UnTrack(self);
  if (h->weakrefs != nullptr) PyObject_ClearWeakRefs(self);
  release_handle(h);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef handle_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Handle, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

// --- pickling ---------------------------------------------------------------------------------------------------------------

namespace {

PyObject* rebuild_function = nullptr;

}  // namespace

/// (rebuild, (class, arena, block, generation), attributes of a Python subclass or None).
PyObject* handle_reduce(PyObject* self, PyObject*) noexcept {
  Handle* h = reinterpret_cast<Handle*>(self);
  if (!check_handle(h)) return nullptr;
  if (collector != nullptr) {
    if (PyList_Append(collector, self) != 0) return nullptr;
  } else {
    h->object->pinned.store(1, std::memory_order_relaxed);
  }
  PyObject* state = nullptr;
  PyObject* dict = PyObject_GetAttrString(self, "__dict__");
  if (dict == nullptr) {
    PyErr_Clear();
  } else if (PyDict_Check(dict) && PyDict_GET_SIZE(dict) != 0) {
    state = PyDict_Copy(dict);
    // Attributes that mean something in this process only (pipes, caches) stay here.
    PyObject* local = state == nullptr ? nullptr : PyObject_GetAttrString(self, "_process_local");
    if (local == nullptr) PyErr_Clear();
    for (Py_ssize_t i = 0; local != nullptr && PyTuple_Check(local) && i < PyTuple_GET_SIZE(local); ++i) {
      if (PyDict_DelItem(state, PyTuple_GET_ITEM(local, i)) != 0) PyErr_Clear();
    }
    Py_XDECREF(local);
    Py_DECREF(dict);
    if (state == nullptr) return nullptr;
  } else {
    Py_DECREF(dict);
  }
  if (state == nullptr) state = Py_NewRef(Py_None);
  const u32 block = h->object->block;
  return Py_BuildValue("O(OKII)N", rebuild_function, Py_TYPE(self),
                       static_cast<unsigned long long>(h->view->arena.id()), block,
                       h->view->arena.block(block).gen.load(std::memory_order_relaxed), state);
}

namespace {

PyTypeObject* native_types[32];  // those of ours that handles can be of: see add_type()
u32 native_count = 0;

PyObject* raise_handle(const char* cls, PyTypeObject* type, u32 block, const char* text) noexcept {
  PyObject* c = error_class(cls);
  if (c == nullptr) return nullptr;
  PyErr_Format(c, "%s-%u: %s", type->tp_name, block, text);
  Py_DECREF(c);
  return nullptr;
}

PyObject* rebuild(PyObject*, PyObject* args) noexcept {
  PyTypeObject* type = nullptr;
  unsigned long long id = 0;
  unsigned int block = 0, gen = 0;
  if (!PyArg_ParseTuple(args, "O!KII", &PyType_Type, &type, &id, &block, &gen)) return nullptr;
  return rebuild_handle(type, id, block, gen);
}

}  // namespace

PyObject* rebuild_handle(PyTypeObject* type, u64 id, u32 block, u32 gen) noexcept {
  View* v = find_view(id);
  if (v == nullptr) {
    return raise_handle(
        "ForeignHandleError", type, block,
        "this handle comes from another family of processes, whose shared memory is not mapped here. Pass it "
        "to children as an argument, through a Queue or a Pipe of the same program; it cannot go to a "
        "process that was started by other means, nor to a file.");
  }
  const Header& header = v->arena.header();
  if (block == 0 || block >= header.nblocks.load(std::memory_order_acquire) ||
      v->arena.block(block).gen.load(std::memory_order_acquire) != gen || !v->arena.is_live_object(block)) {
    return raise_handle("StaleHandleError", type, block,
                        "the object has been freed: no process held it any more. Keep a reference to it in one of them "
                        "until this handle has been unpickled.");
  }
  Object& object = v->arena.at<Object>(block);
  // The native base's tp_new: a subclass's own __new__ may want arguments, and is not for unpickling.
  PyTypeObject* native = type;
  const auto is_native = [](PyTypeObject* t) {
    for (u32 i = 0; i < native_count; ++i) {
      if (native_types[i] == t) return true;
    }
    return false;
  };
  while (native != nullptr && !is_native(native)) native = native->tp_base;
  if (native == nullptr) {
    PyErr_Format(PyExc_TypeError, "%s is no class of procession", type->tp_name);
    return nullptr;
  }
  PyObject* none = PyTuple_New(0);
  if (none == nullptr) return nullptr;
  PyObject* self = native->tp_new(type, none, nullptr);
  Py_DECREF(none);
  if (self == nullptr) return nullptr;
  Handle* h = reinterpret_cast<Handle*>(self);
  h->view = v;
  PyWaiter waiter(kForever);
  const bool held = v->arena.hold(v->me, object, v->me, 1, waiter);
  waiter.resume();
  if (!held) {
    Py_DECREF(self);
    if (!PyErr_Occurred()) raise_no_memory(v, 256);
    return nullptr;
  }
  h->object = &object;
  link_handle(h);
  return is_segment(h) ? segment_received(self) : self;
}

namespace {

PyTypeObject* hold_type = nullptr;

/// Hold(handle): holds the object of another handle, without its class and attributes.
PyObject* new_hold(PyTypeObject* type, PyObject* args, PyObject*) noexcept {
  if (PyTuple_GET_SIZE(args) == 0) return type->tp_alloc(type, 0);  // to be unpickled into
  PyObject* of = nullptr;
  if (!PyArg_ParseTuple(args, "O", &of)) return nullptr;
  PyTypeObject* native = Py_TYPE(of);
  while (native != nullptr &&
         std::find(native_types, native_types + native_count, native) == native_types + native_count)
    native = native->tp_base;
  if (native == nullptr) return PyErr_Format(PyExc_TypeError, "%s is no handle", Py_TYPE(of)->tp_name);
  const Handle* from = reinterpret_cast<Handle*>(of);
  if (!check_handle(from)) return nullptr;
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  Handle* h = reinterpret_cast<Handle*>(self);
  h->view = from->view;
  if (!h->view->arena.hold(h->view->me, *from->object, h->view->me, 1, patient())) {
    Py_DECREF(self);
    return raise_no_memory(from->view, 256);
  }
  h->object = from->object;
  link_handle(h);
  return self;
}

PyMethodDef hold_methods[] = {{"__reduce__", handle_reduce, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyType_Slot hold_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(new_hold)},
    {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)},
    {Py_tp_methods, hold_methods},
    {Py_tp_members, handle_members},
    {Py_tp_doc, const_cast<char*>("Hold(handle)\n--\n\nHolds a handle's object, and is sent as nothing else.")},
    {0, nullptr},
};
PyType_Spec hold_spec{"procession._native.Hold", sizeof(Handle), 0, Py_TPFLAGS_DEFAULT, hold_slots};

}  // namespace

// --- names ------------------------------------------------------------------------------------------------------------------

PyObject* object_name(const Handle* h) noexcept {
  const char* dot = std::strrchr(Py_TYPE(h)->tp_name, '.');
  return PyUnicode_FromFormat("%s-%u", dot == nullptr ? Py_TYPE(h)->tp_name : dot + 1,
                              h->object == nullptr ? 0 : h->object->block);
}

PyObject* describe_tag(const View* v, Tag tag) noexcept {
  const u32 i = slot_index(tag);
  if (i == 0 || i >= v->arena.header().slots) return PyUnicode_FromString("an unknown process");
  const Slot& s = v->arena.slots()[i];
  if (Slot::gen_of(s.word.load(std::memory_order_acquire)) != slot_gen(tag))
    return PyUnicode_FromString("a process that has ended");
  const int pid = s.pid.load(std::memory_order_relaxed);
  char name[sizeof s.name];
  std::memcpy(name, s.name, sizeof name - 1);
  name[sizeof name - 1] = '\0';
  return name[0] != '\0' ? PyUnicode_FromFormat("%s pid %d", name, pid) : PyUnicode_FromFormat("pid %d", pid);
}

// --- arguments --------------------------------------------------------------------------------------------------------------

bool parse_timeout(PyObject* timeout, i64* deadline) noexcept {
  if (timeout == nullptr || timeout == Py_None) {
    *deadline = kForever;
    return true;
  }
  const double s = PyFloat_AsDouble(timeout);
  if (s == -1.0 && PyErr_Occurred()) return false;
  if (std::isnan(s)) {
    PyErr_SetString(PyExc_ValueError, "timeout must be a number of seconds or None, not nan");
    return false;
  }
  constexpr double kLong = 1e9;  // 30 years: for ever, and far from overflow
  *deadline = s <= 0 ? 0 : s >= kLong ? kForever : now_ns() + static_cast<i64>(s * 1e9);
  return true;
}

bool parse_wait(PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames, const char* function,
                i64* deadline) noexcept {
  *deadline = kForever;
  PyObject* block = nullptr;
  PyObject* timeout = nullptr;
  if (nargs > 2) {
    PyErr_Format(PyExc_TypeError, "%s() takes at most 2 arguments (%zd given)", function, nargs);
    return false;
  }
  if (nargs > 0) block = args[0];
  if (nargs > 1) timeout = args[1];
  const Py_ssize_t nkw = kwnames == nullptr ? 0 : PyTuple_GET_SIZE(kwnames);
  for (Py_ssize_t i = 0; i < nkw; ++i) {
    PyObject* key = PyTuple_GET_ITEM(kwnames, i);
    PyObject** to = PyUnicode_CompareWithASCIIString(key, "block") == 0     ? &block
                    : PyUnicode_CompareWithASCIIString(key, "timeout") == 0 ? &timeout
                                                                            : nullptr;
    if (to == nullptr || *to != nullptr) {
      PyErr_Format(
          PyExc_TypeError,
          to == nullptr ? "%s() got an unexpected keyword argument '%U'" : "%s() got multiple values for argument '%U'",
          function, key);
      return false;
    }
    *to = args[nargs + i];
  }
  if (block != nullptr && block != Py_True) {
    const int b = PyObject_IsTrue(block);
    if (b < 0) return false;
    if (b == 0) {
      *deadline = 0;
      return true;
    }
  }
  return parse_timeout(timeout, deadline);
}

bool add_type(PyObject* module, PyType_Spec* spec, PyTypeObject** type, PyTypeObject* base) noexcept {
  PyObject* t = PyType_FromSpecWithBases(spec, reinterpret_cast<PyObject*>(base));
  if (t == nullptr) return false;
  *type = reinterpret_cast<PyTypeObject*>(t);
  if (native_count < sizeof native_types / sizeof *native_types) native_types[native_count++] = *type;
  return PyModule_AddType(module, *type) == 0;
}

// --- functions of the module ------------------------------------------------------------------------------------------------

namespace {

PyObject* arena_fd(PyObject*, PyObject*) noexcept {
  View* v = current_view();
  return v == nullptr ? nullptr : PyLong_FromLong(v->arena.fd());
}

PyObject* has_arena(PyObject*, PyObject*) noexcept { return PyBool_FromLong(has_views()); }

PyObject* attach(PyObject*, PyObject* arg) noexcept {
  const int fd = static_cast<int>(PyLong_AsLong(arg));
  if (fd == -1 && PyErr_Occurred()) return nullptr;
  struct stat theirs, ours;
  for (View* v = views; v != nullptr; v = v->next) {
    if (fstat(fd, &theirs) == 0 && fstat(v->arena.fd(), &ours) == 0 && theirs.st_ino == ours.st_ino &&
        theirs.st_dev == ours.st_dev) {
      if (fd != v->arena.fd()) close(fd);
      Py_RETURN_NONE;
    }
  }
  return new_view(fd) == nullptr ? nullptr : Py_NewRef(Py_None);
}

void copy_name(char (&to)[64], const char* from) noexcept {
  std::strncpy(to, from, sizeof to - 1);
  to[sizeof to - 1] = '\0';
}

PyObject* set_process_name(PyObject*, PyObject* arg) noexcept {
  const char* name = PyUnicode_AsUTF8(arg);
  if (name == nullptr) return nullptr;
  for (View* v = views; v != nullptr; v = v->next) {
    if (slot_index(v->me) < kMaxSlots) copy_name(v->arena.slots()[slot_index(v->me)].name, name);
  }
  Py_RETURN_NONE;
}

PyObject* process_exiting(PyObject*, PyObject* args) noexcept {
  int failed = 0;
  if (!PyArg_ParseTuple(args, "|p", &failed)) return nullptr;
  for (View* v = views; v != nullptr; v = v->next) {
    if (slot_index(v->me) < kMaxSlots) v->arena.leave(v->me, failed != 0);
  }
  Py_RETURN_NONE;
}

PyObject* record_exit(PyObject*, PyObject* args) noexcept {
  int pid = 0, code = 0;
  if (!PyArg_ParseTuple(args, "ii", &pid, &code)) return nullptr;
  PyWaiter waiter(now_ns() + 1000 * kMillisecond);
  for (View* v = views; v != nullptr; v = v->next) {
    const u32 i = v->arena.find_slot(pid);
    if (i == 0) continue;
    Slot& s = v->arena.slots()[i];
    s.exit_code.store(code, std::memory_order_relaxed);
    s.exit_known.store(1, std::memory_order_release);
    // A crash: what it held is wanted by others, and their slices would find it one by one. A clean exit can wait.
    const bool crashed =
        v->arena.fate(make_tag(Slot::gen_of(s.word.load(std::memory_order_acquire)), i), true) == Owner::kDied;
    v->arena.header().departures.fetch_add(1, std::memory_order_relaxed);
    if (crashed) v->arena.collect(v->me, waiter);
  }
  waiter.resume();
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* collect(PyObject*, PyObject*) noexcept {
  u32 n = 0;
  PyWaiter waiter(kForever);
  for (View* v = views; v != nullptr; v = v->next) n += v->arena.collect(v->me, waiter);
  waiter.resume();
  return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLong(n);
}

PyObject* handle_collector(PyObject*, PyObject* arg) noexcept {
  if (arg != Py_None && !PyList_Check(arg)) {
    PyErr_SetString(PyExc_TypeError, "handle_collector() takes a list or None");
    return nullptr;
  }
  PyObject* old = collector;
  collector = arg == Py_None ? nullptr : Py_NewRef(arg);
  return old == nullptr ? Py_NewRef(Py_None) : old;
}

PyObject* trim(PyObject*, PyObject*) noexcept {
  u64 n = 0;
  PyWaiter waiter(kForever);
  waiter->before_sleep();
  for (View* v = views; v != nullptr; v = v->next) n += v->arena.trim(v->me, *waiter);
  waiter.resume();
  return PyErr_Occurred() ? nullptr : PyLong_FromUnsignedLongLong(n);
}

struct Holding {
  u64 bytes;
  u32 segments;
};

PyObject* memory(PyObject*, PyObject*) noexcept {
  if (current_view() == nullptr) return nullptr;
  Arena& a = views->arena;
  Header& h = a.header();
  u32 used = 0, objects = 0, processes = 0;
  u64 segments = 0, in_messages = 0;
  Buffer<Holding> holdings;
  const u32 slots = h.slot_end.load(std::memory_order_relaxed);
  if (!holdings.reserve(slots)) return PyErr_NoMemory();
  for (u32 i = 0; i < slots; ++i) holdings.push({0, 0});
  PyWaiter waiter(now_ns() + 1000 * kMillisecond);
  for (u32 i = 1; i < h.nblocks.load(std::memory_order_acquire); ++i) {
    const u32 owner = a.block(i).owner.load(std::memory_order_relaxed);
    used += owner != 0;
    objects += a.is_live_object(i);
    if (a.block(i).kind != Kind::kSegment || !a.is_live_object(i)) continue;
    const u64 bytes = Arena::class_bytes(a.block(i).cls);
    segments += bytes;
    const bool moving = a.look_at_holders(views->me, i, *waiter, [&](Tag t) {
      if (slot_index(t) >= slots) return;
      holdings[slot_index(t)].bytes += bytes;
      holdings[slot_index(t)].segments += 1;
    });
    if (moving) in_messages += bytes;
  }
  waiter.resume();
  if (PyErr_Occurred()) return nullptr;
  PyObject* holders = PyList_New(0);
  for (u32 i = 1; holders != nullptr && i < slots; ++i) {
    if (holdings[i].segments == 0) continue;
    const Slot& s = a.slots()[i];
    char name[sizeof s.name];
    std::memcpy(name, s.name, sizeof name - 1);
    name[sizeof name - 1] = '\0';
    PyObject* one = Py_BuildValue("(isKI)", s.pid.load(std::memory_order_relaxed), name,
                                  static_cast<unsigned long long>(holdings[i].bytes), holdings[i].segments);
    if (one == nullptr || PyList_Append(holders, one) != 0) Py_CLEAR(holders);
    Py_XDECREF(one);
  }
  if (holders == nullptr) return nullptr;
  for (u32 i = 1; i < h.slot_end.load(std::memory_order_relaxed); ++i)
    processes += a.slots()[i].state() == SlotState::kLive;
  return Py_BuildValue("{s:K,s:K,s:K,s:I,s:I,s:I,s:K,s:K,s:K,s:N}", "used",
                       static_cast<unsigned long long>(h.used.load(std::memory_order_relaxed)), "limit",
                       static_cast<unsigned long long>(h.limit), "reserved", static_cast<unsigned long long>(h.size),
                       "blocks", used, "objects", objects, "processes", processes, "idle",
                       static_cast<unsigned long long>(h.idle.load(std::memory_order_relaxed)), "segments",
                       static_cast<unsigned long long>(segments), "in_messages",
                       static_cast<unsigned long long>(in_messages), "holders", holders);
}

PyObject* set_slices(PyObject*, PyObject* arg) noexcept {
  const int on = PyObject_IsTrue(arg);
  if (on < 0) return nullptr;
  Waiter::slices_flag().store(on != 0, std::memory_order_relaxed);
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"arena_fd", arena_fd, METH_NOARGS, "File descriptor of the family's memory; makes the arena on first use."},
    {"has_arena", has_arena, METH_NOARGS, "Whether this process has an arena."},
    {"attach", attach, METH_O, "Map the arena behind a file descriptor, which now belongs to the extension."},
    {"set_process_name", set_process_name, METH_O, "Name this process in the process table."},
    {"process_exiting", process_exiting, METH_VARARGS,
     "This process ends in good order: its locks stay held, as in the standard library."},
    {"record_exit", record_exit, METH_VARARGS, "record_exit(pid, exitcode): a child has been reaped."},
    {"collect", collect, METH_NOARGS, "Give back what departed processes left; returns how many."},
    {"handle_collector", handle_collector, METH_O,
     "Keep handles that this thread pickles alive in a list (None: pin them)."},
    {"memory", memory, METH_NOARGS, "What the arena holds."},
    {"trim", trim, METH_NOARGS, "Give idle memory back to the kernel; returns how many bytes."},
    {"_set_slices", set_slices, METH_O,
     "Tests: with False, sleeps are not cut into slices, so that a lost wake-up hangs."},
    {"_rebuild", rebuild, METH_VARARGS, "Unpickle a handle."},
    {nullptr, nullptr, 0, nullptr},
};

int exec_module(PyObject* module) noexcept {
  rebuild_function = PyObject_GetAttrString(module, "_rebuild");
  const bool ok = rebuild_function != nullptr && add_lock_types(module) && add_semaphore_types(module) &&
                  add_event_type(module) && add_condition_type(module) && add_barrier_type(module) &&
                  add_cells_type(module) && add_queue_types(module) && add_segment_type(module) &&
                  add_type(module, &hold_spec, &hold_type) && add_locked_attribute_type(module) &&
                  add_codec_functions(module) && add_payload_type(module) && add_array_functions(module) &&
                  add_dormant_functions(module) && add_lifeline_functions(module);
  return ok ? 0 : -1;
}

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    "procession._native",
    "The parts of procession that live in shared memory.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyObject* make_module() noexcept {
  PyObject* m = PyModule_Create(&module_definition);
  if (m != nullptr && exec_module(m) != 0) Py_CLEAR(m);
  return m;
}

}  // namespace procession::bind

PyMODINIT_FUNC PyInit__native() { return procession::bind::make_module(); }
