// Lock and RLock.
#include <cstddef>

#include "handle.hpp"
#include "procession/lock.hpp"

namespace procession::bind {
namespace {

// `with lock:` looks up __enter__ and __exit__ on the type and calls the descriptor's __get__, which for a method makes a
// new bound object each time: 50 of 70 ns. Each lock therefore carries two callable objects inside its own memory, and our
// descriptor hands those out. At rest their reference count is 0; while one is out it holds a reference to the lock, so it
// can outlive every other reference (`f = lock.__exit__; del lock; f()`), and its deallocator gives that back.
struct Callable {
  PyObject ob_base;
  vectorcallfunc call;
};

struct LockObject {
  Handle handle;
  Callable enter, exit;

  UserLock& lock() const noexcept { return handle.state<UserLock>(); }
  enum Policy : u8 { kWarn, kRaise, kIgnore };
  bool raise_on_death() const noexcept { return handle.object->flags == kRaise; }
  bool ignore_death() const noexcept { return handle.object->flags == kIgnore; }
  LockOps ops() const noexcept { return LockOps(handle.view->arena, handle.view->me); }
};

extern PyTypeObject enter_type, exit_type, descriptor_type;
PyTypeObject* lock_type = nullptr;
PyTypeObject* rlock_type = nullptr;

LockObject* lock_of_enter(PyObject* c) noexcept {
  return reinterpret_cast<LockObject*>(reinterpret_cast<char*>(c) - offsetof(LockObject, enter));
}
LockObject* lock_of_exit(PyObject* c) noexcept {
  return reinterpret_cast<LockObject*>(reinterpret_cast<char*>(c) - offsetof(LockObject, exit));
}

bool is_rlock(const LockObject* l) noexcept { return l->handle.object->kind == Kind::kRLock; }

/// The lock is ours, and its former holder died: warn, or raise and let go.
bool report_death(LockObject* self, Tag died) noexcept {
  UserLock& l = self->lock();
  if (self->ignore_death()) return true;
  View* v = self->handle.view;
  PyObject* who = nullptr;
  int code = 0;
  bool known = false;
  if (died == kOrphaned) {
    l.died_name[sizeof l.died_name - 1] = '\0';
    const int pid = l.died_pid.load(std::memory_order_relaxed);
    who = l.died_name[0] != '\0' ? PyUnicode_FromFormat("%s pid %d", l.died_name, pid)
                                 : PyUnicode_FromFormat("pid %d", pid);
    code = l.died_exit.load(std::memory_order_relaxed);
    known = l.died_exit_known.load(std::memory_order_relaxed) != 0;
  } else {
    who = describe_tag(v, died);
    const Slot& s = v->arena.slots()[slot_index(died)];
    known = s.exit_known.load(std::memory_order_acquire) != 0;
    code = s.exit_code.load(std::memory_order_relaxed);
    if (!known) {
      const ProcStat stat = read_proc_stat(s.pid.load(std::memory_order_relaxed));  // a zombie still tells
      if (stat.found && stat.state == 'Z') {
        known = true;
        code = WIFSIGNALED(stat.exit_code) ? -WTERMSIG(stat.exit_code) : WEXITSTATUS(stat.exit_code);
      }
    }
  }
  PyObject* name = object_name(&self->handle);
  PyObject* m = PyImport_ImportModule("procession._errors");
  PyObject* how = m == nullptr ? nullptr
                  : known      ? PyObject_CallMethod(m, "describe_exit", "i", code)
                               : PyObject_CallMethod(m, "describe_exit", "O", Py_None);
  PyObject* cls = m == nullptr
                      ? nullptr
                      : PyObject_GetAttrString(m, self->raise_on_death() ? "LockOwnerDiedError" : "LockOwnerDied");
  bool ok = who != nullptr && name != nullptr && how != nullptr && cls != nullptr;
  if (ok && self->raise_on_death()) {
    PyErr_Format(cls, "%U: its holder (%U) %U. The lock is free again; what it protects may be half-done.", name, who,
                 how);
    ok = false;
  } else if (ok) {
    ok = PyErr_WarnFormat(cls, 1, "%U: its holder (%U) %U. The lock is yours now; what it protects may be half-done.",
                          name, who, how) == 0;
  }
  Py_XDECREF(who);
  Py_XDECREF(name);
  Py_XDECREF(m);
  Py_XDECREF(how);
  Py_XDECREF(cls);
  if (!ok) self->ops().release(l);  // an error must not leave the lock held
  return ok;
}

enum class Taken { kNo, kYes, kError };

Taken take(LockObject* self, i64 deadline) noexcept {
  UserLock& l = self->lock();
  const LockOps ops = self->ops();
  const bool recursive = is_rlock(self);
  const u64 thread = this_thread();
  if (recursive && ops.held_by_me(l) && l.thread.load(std::memory_order_relaxed) == thread) {
    if (l.count == UINT32_MAX) {
      PyErr_SetString(PyExc_OverflowError, "RLock acquired too many times");
      return Taken::kError;
    }
    ++l.count;
    return Taken::kYes;
  }
  Tag died = 0;
  Acquired a;
  if (ops.try_acquire(l)) {
    a = Acquired::kYes;
  } else {
    PyWaiter waiter(deadline);
    a = ops.acquire(l, waiter, &died);
  }
  if (a == Acquired::kInterrupted) return Taken::kError;
  if (a == Acquired::kNo) return Taken::kNo;
  l.thread.store(thread, std::memory_order_relaxed);
  l.count = 1;
  // The count stands before the warning is issued: what shows warnings may take this very RLock, one deeper.
  if (a == Acquired::kOwnerDied && !report_death(self, died)) return Taken::kError;
  return Taken::kYes;
}

bool let_go(LockObject* self) noexcept {
  UserLock& l = self->lock();
  const LockOps ops = self->ops();
  if (is_rlock(self)) {
    if (!ops.held_by_me(l) || l.thread.load(std::memory_order_relaxed) != this_thread()) {
      PyErr_SetString(PyExc_AssertionError, "attempt to release recursive lock not owned by thread");
      return false;
    }
    if (l.count > 1) {
      --l.count;
      return true;
    }
  }
  if (ops.release(l)) return true;
  PyErr_SetString(PyExc_ValueError, "semaphore or lock released too many times");
  return false;
}

// --- methods ----------------------------------------------------------------------------------------------------------------

PyObject* acquire(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  if (!check_handle(&l->handle)) return nullptr;
  i64 deadline = kForever;
  if ((nargs != 0 || kwnames != nullptr) && !parse_wait(args, nargs, kwnames, "acquire", &deadline)) return nullptr;
  const Taken t = take(l, deadline);
  return t == Taken::kError ? nullptr : PyBool_FromLong(t == Taken::kYes);
}

PyObject* release(PyObject* self, PyObject*) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  if (!check_handle(&l->handle) || !let_go(l)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* enter_call(PyObject* c, PyObject* const*, size_t, PyObject*) noexcept {
  LockObject* l = lock_of_enter(c);
  if (!check_handle(&l->handle) || take(l, kForever) == Taken::kError) return nullptr;
  Py_RETURN_TRUE;
}

PyObject* exit_call(PyObject* c, PyObject* const*, size_t, PyObject*) noexcept {
  LockObject* l = lock_of_exit(c);
  if (!check_handle(&l->handle) || !let_go(l)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* enter_method(PyObject* self, PyObject*) noexcept {
  return enter_call(reinterpret_cast<PyObject*>(&reinterpret_cast<LockObject*>(self)->enter), nullptr, 0, nullptr);
}
PyObject* exit_method(PyObject* self, PyObject*) noexcept {
  return exit_call(reinterpret_cast<PyObject*>(&reinterpret_cast<LockObject*>(self)->exit), nullptr, 0, nullptr);
}

bool mine(const LockObject* l) noexcept {
  return l->ops().held_by_me(l->lock()) && l->lock().thread.load(std::memory_order_relaxed) == this_thread();
}
bool is_free(const LockObject* l) noexcept { return (l->lock().word.load(std::memory_order_relaxed) & kTagMask) == 0; }

PyObject* locked(PyObject* self, PyObject*) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  return check_handle(&l->handle) ? PyBool_FromLong(!is_free(l)) : nullptr;
}
PyObject* is_mine(PyObject* self, PyObject*) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  return check_handle(&l->handle) ? PyBool_FromLong(mine(l)) : nullptr;
}
PyObject* is_zero(PyObject* self, PyObject*) noexcept { return locked(self, nullptr); }
PyObject* get_value(PyObject* self, PyObject*) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  return check_handle(&l->handle) ? PyLong_FromLong(is_free(l) ? 1 : 0) : nullptr;
}
PyObject* count(PyObject* self, PyObject*) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  return check_handle(&l->handle) ? PyLong_FromUnsignedLong(mine(l) ? l->lock().count : 0) : nullptr;
}
PyObject* semlock(PyObject* self, void*) noexcept { return Py_NewRef(self); }

/// The standard library's form, `<Lock(owner=MainProcess)>`, with the pid where the holder is another process.
PyObject* repr(PyObject* self) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  const char* dot = std::strrchr(Py_TYPE(self)->tp_name, '.');
  const char* type = dot == nullptr ? Py_TYPE(self)->tp_name : dot + 1;
  if (l->handle.object == nullptr) return PyUnicode_FromFormat("<%s(uninitialised)>", type);
  const u32 w = l->lock().word.load(std::memory_order_relaxed) & kTagMask;
  PyObject* who = nullptr;
  if (w == 0) {
    who = PyUnicode_FromString("None");
  } else if (w == kOrphaned) {
    who = PyUnicode_FromString("a process that died");
  } else if (mine(l)) {
    PyObject* m = PyImport_ImportModule("procession._sync");
    who = m == nullptr ? nullptr : PyObject_CallMethod(m, "_whoami", nullptr);
    Py_XDECREF(m);
  } else if (l->ops().held_by_me(l->lock())) {
    who = PyUnicode_FromString("SomeOtherThread");
  } else {
    who = describe_tag(l->handle.view, w);
  }
  if (who == nullptr) return nullptr;
  PyObject* r = is_rlock(l) ? PyUnicode_FromFormat("<%s(%U, %u)>", type, who, w == 0 ? 0 : l->lock().count)
                            : PyUnicode_FromFormat("<%s(owner=%U)>", type, who);
  Py_DECREF(who);
  return r;
}

// --- construction -----------------------------------------------------------------------------------------------------------

// Not in tp_alloc, which a subclass made in Python does not inherit.
PyObject* lock_new(PyTypeObject* type, PyObject*, PyObject*) noexcept {
  PyObject* self = type->tp_alloc(type, 0);
  if (self == nullptr) return nullptr;
  auto* l = reinterpret_cast<LockObject*>(self);
  const auto rest = [](Callable& c, PyTypeObject* t, vectorcallfunc f) {
    Py_SET_TYPE(&c.ob_base, t);
    Py_SET_REFCNT(&c.ob_base, 0);
    c.call = f;
  };
  rest(l->enter, &enter_type, enter_call);
  rest(l->exit, &exit_type, exit_call);
  return self;
}

int init(PyObject* self, PyObject* args, PyObject* kwargs, Kind kind) noexcept {
  auto* l = reinterpret_cast<LockObject*>(self);
  PyObject* ctx = nullptr;
  const char* policy = "warn";
  if (PyTuple_GET_SIZE(args) != 0 || (kwargs != nullptr && PyDict_GET_SIZE(kwargs) != 0)) {
    static const char* names[] = {"ctx", "on_owner_death", nullptr};
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$Os", const_cast<char**>(names), &ctx, &policy)) return -1;
    if (std::strcmp(policy, "warn") != 0 && std::strcmp(policy, "raise") != 0 && std::strcmp(policy, "ignore") != 0) {
      PyErr_Format(PyExc_ValueError, "on_owner_death must be 'warn', 'raise' or 'ignore', not '%s'", policy);
      return -1;
    }
  }
  if (!make_object(&l->handle, sizeof(UserLock), kind)) return -1;
  l->handle.object->flags = policy[0] == 'r'   ? LockObject::kRaise
                            : policy[0] == 'i' ? LockObject::kIgnore
                                               : LockObject::kWarn;
  return 0;
}
int lock_init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  return init(self, args, kwargs, Kind::kLock);
}
int rlock_init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  return init(self, args, kwargs, Kind::kRLock);
}

PyMethodDef methods[] = {
    {"acquire", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(acquire)), METH_FASTCALL | METH_KEYWORDS,
     "acquire(block=True, timeout=None) -> bool\n\nTake the lock; True when this thread holds it now.\n\n"
     "Blocks until it is free, a signal handler raises, or `timeout` seconds (monotonic clock) are over; negative "
     "counts as 0.\n"
     "A holder that was killed loses it: the next acquirer gets the lock and a LockOwnerDied warning, or, with\n"
     "on_owner_death='raise', a LockOwnerDiedError, and the lock stays free. A holder that ended in good order keeps "
     "it."},
    {"release", release, METH_NOARGS,
     "Let the lock go. A Lock may be released by any process or thread, an RLock by its holder only.\n\n"
     "Raises ValueError (Lock) or AssertionError (RLock) when it is not held."},
    {"locked", locked, METH_NOARGS, "Whether anybody holds the lock."},
    {"_is_mine", is_mine, METH_NOARGS, nullptr},
    {"_is_zero", is_zero, METH_NOARGS, nullptr},
    {"_get_value", get_value, METH_NOARGS, nullptr},
    {"_count", count, METH_NOARGS, nullptr},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef getset[] = {
    {"_semlock", semlock, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

#define LOCK_SLOTS(init_function, doc)                                                                         \
  {                                                                                                            \
    {Py_tp_new, reinterpret_cast<void*>(lock_new)}, {Py_tp_init, reinterpret_cast<void*>(init_function)},      \
        {Py_tp_dealloc, reinterpret_cast<void*>(handle_dealloc)}, {Py_tp_repr, reinterpret_cast<void*>(repr)}, \
        {Py_tp_methods, methods}, {Py_tp_getset, getset}, {Py_tp_members, handle_members},                     \
        {Py_tp_doc, const_cast<char*>(doc)}, {                                                                 \
      0, nullptr                                                                                               \
    }                                                                                                          \
  }

PyType_Slot lock_slots[] = LOCK_SLOTS(
    lock_init,
    "Lock(*, ctx=None, on_owner_death='warn')\n--\n\nA lock between processes that survives its holder's death.");
PyType_Slot rlock_slots[] = LOCK_SLOTS(rlock_init,
                                       "RLock(*, ctx=None, on_owner_death='warn')\n--\n\nA recursive lock between "
                                       "processes that survives its holder's death.");

constexpr unsigned kFlags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE;
PyType_Spec lock_spec{"procession.synchronize.Lock", sizeof(LockObject), 0, kFlags, lock_slots};
PyType_Spec rlock_spec{"procession.synchronize.RLock", sizeof(LockObject), 0, kFlags, rlock_slots};

// --- the callables and their descriptor ---------------------------------------------------------------------------------

void enter_dealloc(PyObject* c) noexcept { Py_DECREF(lock_of_enter(c)); }
void exit_dealloc(PyObject* c) noexcept { Py_DECREF(lock_of_exit(c)); }

PyTypeObject make_callable_type(const char* name, destructor dealloc) noexcept {
  PyTypeObject t{};
  t.ob_base = PyVarObject{PyObject_HEAD_INIT(nullptr) 0};
  t.tp_name = name;
  t.tp_basicsize = sizeof(Callable);
  t.tp_dealloc = dealloc;
  t.tp_vectorcall_offset = offsetof(Callable, call);
  t.tp_call = PyVectorcall_Call;
  t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  return t;
}
PyTypeObject enter_type = make_callable_type("procession._native._Enter", enter_dealloc);
PyTypeObject exit_type = make_callable_type("procession._native._Exit", exit_dealloc);

/// In the types' dictionaries under __enter__ and __exit__.
struct Descriptor {
  PyObject ob_base;
  size_t offset;       ///< of the callable in a LockObject
  PyObject* on_class;  ///< what `Lock.__enter__` gives: a plain method that takes self (ExitStack calls it so)
};

PyObject* descriptor_get(PyObject* self, PyObject* instance, PyObject*) noexcept {
  auto* d = reinterpret_cast<Descriptor*>(self);
  if (instance == nullptr || instance == Py_None) return Py_NewRef(d->on_class);
  auto* c = reinterpret_cast<PyObject*>(reinterpret_cast<char*>(instance) + d->offset);
  if (Py_REFCNT(c) == 0) {
    Py_SET_REFCNT(c, 1);
    Py_INCREF(instance);
  } else {
    Py_INCREF(c);
  }
  return c;
}

PyTypeObject make_descriptor_type() noexcept {
  PyTypeObject t{};
  t.ob_base = PyVarObject{PyObject_HEAD_INIT(nullptr) 0};
  t.tp_name = "procession._native._LockMethod";
  t.tp_basicsize = sizeof(Descriptor);
  t.tp_descr_get = descriptor_get;
  t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  return t;
}
PyTypeObject descriptor_type = make_descriptor_type();

PyMethodDef on_class_methods[] = {
    {"__enter__", enter_method, METH_NOARGS, "Take the lock."},
    {"__exit__", exit_method, METH_VARARGS, "Let the lock go."},
};

bool add_descriptor(PyTypeObject* type, int which) noexcept {
  auto* d = PyObject_New(Descriptor, &descriptor_type);
  if (d == nullptr) return false;
  d->offset = which == 0 ? offsetof(LockObject, enter) : offsetof(LockObject, exit);
  d->on_class = PyDescr_NewMethod(type, &on_class_methods[which]);
  // Kept for the life of the process, as the types are.
  const bool ok = d->on_class != nullptr && PyDict_SetItemString(type->tp_dict, on_class_methods[which].ml_name,
                                                                 reinterpret_cast<PyObject*>(d)) == 0;
  PyType_Modified(type);
  return ok;
}

}  // namespace

bool acquire_any_lock(PyObject* lock) noexcept {
  if (Py_IS_TYPE(lock, rlock_type) || Py_IS_TYPE(lock, lock_type)) {
    auto* l = reinterpret_cast<LockObject*>(lock);
    return check_handle(&l->handle) && take(l, kForever) == Taken::kYes;
  }
  PyObject* r = PyObject_CallMethod(lock, "acquire", nullptr);
  Py_XDECREF(r);
  return r != nullptr;
}

bool release_any_lock(PyObject* lock) noexcept {
  if (Py_IS_TYPE(lock, rlock_type) || Py_IS_TYPE(lock, lock_type)) return let_go(reinterpret_cast<LockObject*>(lock));
  PyObject* r = PyObject_CallMethod(lock, "release", nullptr);
  Py_XDECREF(r);
  return r != nullptr;
}

bool add_lock_types(PyObject* module) noexcept {
  if (PyType_Ready(&enter_type) != 0 || PyType_Ready(&exit_type) != 0 || PyType_Ready(&descriptor_type) != 0)
    return false;
  if (!add_type(module, &lock_spec, &lock_type) || !add_type(module, &rlock_spec, &rlock_type)) return false;
  for (PyTypeObject* t : {lock_type, rlock_type}) {
    if (!add_descriptor(t, 0) || !add_descriptor(t, 1)) return false;
  }
  return true;
}

}  // namespace procession::bind
