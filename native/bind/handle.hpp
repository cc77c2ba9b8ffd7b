// What the types of the extension share: this process's arenas, the handle every object begins with, waiting with the GIL.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include <sys/wait.h>

#include "procession/collect.hpp"

namespace procession::bind {

/// This process's view of one arena. There is one, except where a child inherited an arena of its own making by fork and
/// was then given its family's (a preloaded module of the fork server): handles keep the one they were made in.
struct View {
  Arena arena;
  Tag me = 0;
  Tag child = 0;  ///< between the two sides of a fork: the child's tag to be
  View* next = nullptr;
};

/// Every Python object of ours begins with this.
struct Handle {
  PyObject ob_base;
  View* view;  ///< nullptr before __init__
  Object* object;
  Handle* prev;  ///< all handles of the process, for fork
  Handle* next;
  PyObject* weakrefs;

  template <class T>
  T& state() const noexcept {
    return *reinterpret_cast<T*>(object);
  }
};

/// An array's memory, or other bytes, in the arena.
struct SegmentObject {
  Handle handle;
  bool isolated;  ///< mapped for this process alone: what it writes, others do not see, and the other way round

  SegmentState& state() const noexcept { return handle.state<SegmentState>(); }
  char* data() const noexcept { return handle.view->arena.data_of(state()); }
  bool frozen() const noexcept { return state().frozen.load(std::memory_order_relaxed) != 0; }
};

/// The first handle of this process for which `f` is true, with the list locked; nullptr if there is none.
Handle* find_handle(bool (*f)(Handle*, const void*), const void* arg) noexcept;
PyTypeObject* segment_class() noexcept;
inline bool is_segment(const Handle* h) noexcept { return Py_TYPE(h) == segment_class(); }
/// Map a segment of this process alone from now on, if it can be written to. False: no memory for the mapping.
bool isolate(SegmentObject* s) noexcept;
/// A segment has been unpickled: make it this process's own where others hold it too. Takes over the reference, returns one.
PyObject* segment_received(PyObject* self) noexcept;

/// Whether a contiguous buffer's bytes are a segment's that nobody writes to any more.
bool is_frozen(const Py_buffer& view) noexcept;

/// The segment (a new reference) that has a contiguous buffer's bytes and will keep them: where they lie, or a copy. What this
/// process writes from now on, others do not see.
PyObject* place_view(const Py_buffer& from, u64* offset) noexcept;
/// The same for each of a list: (segment, offset, nbytes).
PyObject* place_all(PyObject* buffers) noexcept;
/// An object whose buffer is a part of a segment, whose reference is taken over.
PyObject* view_segment(PyObject* self, u64 offset, u64 n) noexcept;

/// While a message is decoded: how many cargoes on the way are the one that it came with, and will be gone in a moment.
extern thread_local u32 own_cargoes;

/// Have the handles that this thread pickles noted in `list`, whose reference is taken over; returns what was there before.
PyObject* swap_collector(PyObject* list) noexcept;

/// How often this process has been the child of a fork.
extern u32 fork_count;

/// An operation succeeded, and a signal handler raised on the way: its result comes first, the exception at the next
/// instruction of the main thread.
void defer_error() noexcept;

/// A wait that gives up the GIL before its first sleep and looks for signals after each.
class PyWaiter {
 public:
  explicit PyWaiter(i64 deadline) noexcept : waiter_(deadline, {&before_sleep, &interrupted, &gave_up, this}) {}
  PyWaiter(const PyWaiter&) = delete;
  PyWaiter& operator=(const PyWaiter&) = delete;
  ~PyWaiter() { resume(); }

  operator const Waiter&() const noexcept { return waiter_; }
  const Waiter& operator*() const noexcept { return waiter_; }
  const Waiter* operator->() const noexcept { return &waiter_; }

  /// Have the GIL again.
  void resume() noexcept {
    if (saved_ != nullptr) PyEval_RestoreThread(saved_);
    saved_ = nullptr;
  }

 private:
  static void before_sleep(void* self) noexcept {
    auto* w = static_cast<PyWaiter*>(self);
    if (w->saved_ == nullptr) w->saved_ = PyEval_SaveThread();
  }
  static bool interrupted(void* self) noexcept {
    auto* w = static_cast<PyWaiter*>(self);
    w->resume();
    const u32 forks = fork_count;
    w->raised_ = PyErr_CheckSignals() != 0;
    if (!w->raised_ && forks != fork_count) {
      // A signal handler forked and returned in the child: the wait was the parent's, with the parent's name.
      PyErr_SetString(PyExc_RuntimeError, "a signal handler forked: the child cannot go on with its parent's wait");
      w->raised_ = true;
    }
    return w->raised_;
  }
  static bool gave_up(void* self) noexcept { return static_cast<PyWaiter*>(self)->raised_; }

  Waiter waiter_;
  bool raised_ = false;
  PyThreadState* saved_ = nullptr;
};

/// For what must not be interrupted: gives up (and leaks until the process ends) when a stopped process is in the way.
inline const Waiter& patient() noexcept {
  static const Waiter w(0, {});
  return w;
}

/// `timeout` in seconds as a deadline: None for ever, negative or zero: do not wait. False with an exception set.
bool parse_timeout(PyObject* timeout, i64* deadline) noexcept;
/// The `(block=True, timeout=None)` of the standard library.
bool parse_wait(PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames, const char* function,
                i64* deadline) noexcept;

/// The current arena, made on first use. nullptr with an exception set.
View* current_view() noexcept;
View* find_view(u64 arena_id) noexcept;
bool has_views() noexcept;

/// Make `h` a new object of `size` bytes, the first `zeroed` of them zero. False with an exception set.
bool make_object(Handle* h, u64 size, Kind kind, u64 zeroed = UINT64_MAX) noexcept;
void release_handle(Handle* h) noexcept;
/// Set an exception and return false when `h` was never initialised.
bool check_handle(const Handle* h) noexcept;

PyObject* handle_reduce(PyObject* self, PyObject*) noexcept;
/// A handle of the object `block`, if it is still the one of that generation; nullptr with an exception that says why not.
PyObject* rebuild_handle(PyTypeObject* type, u64 arena_id, u32 block, u32 gen) noexcept;
void handle_dealloc(PyObject* self) noexcept;
/// What every type of handle has: weak references.
extern PyMemberDef handle_members[];

/// "Lock-17": how messages name an object.
PyObject* object_name(const Handle* h) noexcept;
/// "Process-3 pid 4711", or the like, of a tag's process.
PyObject* describe_tag(const View* v, Tag tag) noexcept;

/// procession._errors.<name>, a new reference.
PyObject* error_class(const char* name) noexcept;
PyObject* raise_no_memory(const View* v, u64 bytes) noexcept;

/// A Lock or RLock of ours directly, anything else by its methods. False with an exception set.
bool acquire_any_lock(PyObject* lock) noexcept;
bool release_any_lock(PyObject* lock) noexcept;

inline u64 this_thread() noexcept { return static_cast<u64>(PyThread_get_thread_ident()); }

// One a type; called by the module's init.
bool add_lock_types(PyObject* module) noexcept;
bool add_semaphore_types(PyObject* module) noexcept;
bool add_event_type(PyObject* module) noexcept;
bool add_condition_type(PyObject* module) noexcept;
bool add_barrier_type(PyObject* module) noexcept;
bool add_cells_type(PyObject* module) noexcept;
bool add_queue_types(PyObject* module) noexcept;
bool add_segment_type(PyObject* module) noexcept;
bool add_locked_attribute_type(PyObject* module) noexcept;
bool add_codec_functions(PyObject* module) noexcept;
bool add_payload_type(PyObject* module) noexcept;
bool add_array_functions(PyObject* module) noexcept;
bool add_dormant_functions(PyObject* module) noexcept;
bool add_lifeline_functions(PyObject* module) noexcept;
/// For a process that stands between its parent and that one's children: it dies with it, and hands the lifeline on.
void arm_inherited_lifeline() noexcept;
bool add_type(PyObject* module, PyType_Spec* spec, PyTypeObject** type, PyTypeObject* base = nullptr) noexcept;

}  // namespace procession::bind
