// Segment: bytes in the arena that are written once and read in place, whoever reads them.
#include "handle.hpp"

namespace procession::bind {
namespace {

PyTypeObject* segment_type = nullptr;

SegmentObject* segment(PyObject* self) noexcept { return reinterpret_cast<SegmentObject*>(self); }

constexpr u64 kLongCopy = 1 << 20;  // from here on a copy takes longer than handing the GIL over

bool make(SegmentObject* s, u64 length) noexcept {
  // A page at least, so that there is something to map.
  if (!make_object(&s->handle, kSegmentData + std::max(length, kPage), Kind::kSegment, sizeof(SegmentState)))
    return false;
  s->state().length = length;
  return true;
}

int init(PyObject* self, PyObject* args, PyObject* kwargs) noexcept {
  static const char* names[] = {"nbytes", nullptr};
  Py_ssize_t nbytes = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "n", const_cast<char**>(names), &nbytes)) return -1;
  if (nbytes < 0) {
    PyErr_Format(PyExc_ValueError, "a segment cannot have %zd bytes", nbytes);
    return -1;
  }
  return make(segment(self), static_cast<u64>(nbytes)) ? 0 : -1;
}

/// Copy into a segment that nobody else reads yet. Pages that the kernel has to bring are written through the file: no fault,
/// no zeroing, 3 GB/s in place of 1.
void copy_in(SegmentObject* s, u64 offset, const void* from, u64 n) noexcept {
  Arena& arena = s->handle.view->arena;
  const Block& block = arena.block(s->handle.object->block);
  char* to = s->data() + offset;
  u64 done = 0;
  if (n >= kLongCopy) arena.make_huge(s->state(), n);
  if (n >= kLongCopy && block.warm != 0 && offset % 16 == 0) {
    copy_large(to, static_cast<const char*>(from), n);
    return;
  }
  if (block.warm == 0) {
    const u64 at = block.off + kSegmentData + offset;
    while (done < n) {
      const ssize_t w =
          pwrite(arena.fd(), static_cast<const char*>(from) + done, n - done, static_cast<off_t>(at + done));
      if (w <= 0) break;  // a limit on files, or so: the mapping still works
      done += static_cast<u64>(w);
    }
  }
  std::memcpy(to + done, static_cast<const char*>(from) + done, n - done);
}

void fill_from(SegmentObject* s, u64 offset, const Py_buffer& from) noexcept {
  const u64 n = static_cast<u64>(from.len);
  PyThreadState* saved = n >= kLongCopy ? PyEval_SaveThread() : nullptr;
  copy_in(s, offset, from.buf, n);
  if (saved != nullptr) PyEval_RestoreThread(saved);
}

bool check_writable(SegmentObject* s) noexcept {
  if (!check_handle(&s->handle)) return false;
  if (!s->frozen()) return true;
  PyErr_SetString(PyExc_BufferError, "the segment is frozen: other processes read it");
  return false;
}

PyObject* fill(PyObject* self, PyObject* args) noexcept {
  SegmentObject* s = segment(self);
  Py_buffer from;
  Py_ssize_t offset = 0;
  if (!PyArg_ParseTuple(args, "y*|n", &from, &offset)) return nullptr;
  const u64 n = static_cast<u64>(from.len);
  bool ok = check_writable(s);
  if (ok && (offset < 0 || static_cast<u64>(offset) + n > s->state().length)) {
    PyErr_Format(PyExc_ValueError, "%zd bytes from offset %zd on do not fit into a segment of %llu", from.len, offset,
                 static_cast<unsigned long long>(s->state().length));
    ok = false;
  }
  if (ok) fill_from(s, static_cast<u64>(offset), from);
  PyBuffer_Release(&from);
  return ok ? Py_NewRef(Py_None) : nullptr;
}

/// Before many writes to memory that has been used before.
PyObject* populate(PyObject* self, PyObject*) noexcept {
  SegmentObject* s = segment(self);
  if (!check_writable(s)) return nullptr;
  Arena& arena = s->handle.view->arena;
  if (arena.block(s->handle.object->block).warm != 0) {
    Py_BEGIN_ALLOW_THREADS arena.make_huge(s->state(), s->state().length);
    arena.populate(s->state(), true);
    Py_END_ALLOW_THREADS
  }
  Py_RETURN_NONE;
}

PyObject* zero(PyObject* self, PyObject*) noexcept {
  SegmentObject* s = segment(self);
  if (!check_writable(s)) return nullptr;
  if (s->handle.view->arena.block(s->handle.object->block).warm != 0) {  // else the kernel has
    Py_BEGIN_ALLOW_THREADS std::memset(s->data(), 0, s->state().length);
    Py_END_ALLOW_THREADS
  }
  Py_RETURN_NONE;
}

PyObject* freeze(PyObject* self, PyObject*) noexcept {
  SegmentObject* s = segment(self);
  if (!check_handle(&s->handle)) return nullptr;
  if (s->isolated) {
    PyErr_SetString(PyExc_BufferError,
                    "the segment is this process's own by now: what others would read is an older state");
    return nullptr;
  }
  s->state().frozen.store(1, std::memory_order_release);
  Py_RETURN_NONE;
}

/// This process's segment that has these bytes, borrowed; nullptr (no exception) if none has.
SegmentObject* find_segment(const char* begin, u64 n) noexcept {
  struct Range {
    const char* begin;
    u64 n;
  } const range{begin, n};
  const auto holds = [](Handle* h, const void* p) {
    if (!is_segment(h)) return false;
    const auto& r = *static_cast<const Range*>(p);
    const auto* s = reinterpret_cast<SegmentObject*>(h);
    return s->data() <= r.begin && r.begin + r.n <= s->data() + s->state().length;
  };
  View* v = has_views() ? current_view() : nullptr;
  if (v == nullptr || !v->arena.contains(begin)) return nullptr;
  return reinterpret_cast<SegmentObject*>(find_handle(holds, &range));
}

PyObject* find(PyObject*, PyObject* arg) noexcept {
  Py_buffer view;
  if (PyObject_GetBuffer(arg, &view, PyBUF_SIMPLE) != 0) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  const char* begin = static_cast<const char*>(view.buf);
  SegmentObject* found = find_segment(begin, static_cast<u64>(view.len));
  PyBuffer_Release(&view);
  if (found == nullptr) Py_RETURN_NONE;
  return Py_BuildValue("On", reinterpret_cast<PyObject*>(found), static_cast<Py_ssize_t>(begin - found->data()));
}

PyObject* new_segment(u64 length) noexcept {
  PyObject* self = segment_type->tp_alloc(segment_type, 0);
  if (self != nullptr && !make(segment(self), length)) Py_CLEAR(self);
  return self;
}

PyObject* place(PyObject*, PyObject* arg) noexcept {
  Py_buffer from;
  u64 offset = 0;
  if (PyObject_GetBuffer(arg, &from, PyBUF_ANY_CONTIGUOUS) != 0) return nullptr;
  PyObject* segment = place_view(from, &offset);
  const auto n = static_cast<unsigned long long>(from.len);
  PyBuffer_Release(&from);
  return segment == nullptr ? nullptr : Py_BuildValue("NKK", segment, static_cast<unsigned long long>(offset), n);
}

int get_buffer(PyObject* self, Py_buffer* view, int flags) noexcept {
  SegmentObject* s = segment(self);
  if (!check_handle(&s->handle)) {
    view->obj = nullptr;
    return -1;
  }
  return PyBuffer_FillInfo(view, self, s->data(), static_cast<Py_ssize_t>(s->state().length), s->frozen(), flags);
}

Py_ssize_t length(PyObject* self) noexcept {
  SegmentObject* s = segment(self);
  return check_handle(&s->handle) ? static_cast<Py_ssize_t>(s->state().length) : -1;
}

PyObject* get_frozen(PyObject* self, void*) noexcept {
  return check_handle(&segment(self)->handle) ? PyBool_FromLong(segment(self)->frozen()) : nullptr;
}
PyObject* get_isolated(PyObject* self, void*) noexcept { return PyBool_FromLong(segment(self)->isolated); }

void dealloc(PyObject* self) noexcept {
  SegmentObject* s = segment(self);
  // The block's next user here must see what others write to it. If that cannot be, it has none: it stays held.
  if (s->handle.object != nullptr && s->isolated && !s->handle.view->arena.map_segment(s->state(), true)) {
    s->handle.object->pinned.store(1, std::memory_order_relaxed);
  }
  handle_dealloc(self);
}

PyMethodDef methods[] = {
    {"fill", fill, METH_VARARGS, "fill(buffer, offset=0)\n\nCopy bytes in; without the GIL when there are many."},
    {"zero", zero, METH_NOARGS, "Set all bytes to 0; new pages of the kernel's are not touched."},
    {"populate", populate, METH_NOARGS, "Have its pages mapped at once, if they are in memory."},
    {"freeze", freeze, METH_NOARGS, "From now on nobody writes to it: all processes read the same memory."},
    {"find", find, METH_O | METH_STATIC,
     "find(buffer) -> (segment, offset) | None\n\nWhere this process's memory is a segment's."},
    {"place", place, METH_O | METH_STATIC,
     "place(buffer) -> (segment, offset, nbytes)\n\nThe segment that has these bytes and will keep them, for a handle "
     "of "
     "it that is to be sent: where they lie, or a copy. What this process writes from now on, others do not see."},
    {"__reduce__", handle_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef getset[] = {
    {"frozen", get_frozen, nullptr, "Whether it is never written to again.", nullptr},
    {"isolated", get_isolated, nullptr, "Whether what this process writes is its own.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, handle_members},
    {Py_bf_getbuffer, reinterpret_cast<void*>(get_buffer)},
    {Py_sq_length, reinterpret_cast<void*>(length)},
    {Py_tp_doc,
     const_cast<char*>("Segment(nbytes)\n--\n\nBytes in the family's memory. Freed when no process holds it.")},
    {0, nullptr},
};
PyType_Spec spec{"procession._native.Segment", sizeof(SegmentObject), 0, Py_TPFLAGS_DEFAULT, slots};

}  // namespace

thread_local u32 own_cargoes = 0;

PyTypeObject* segment_class() noexcept { return segment_type; }

bool isolate(SegmentObject* s) noexcept {
  if (s->isolated || s->frozen()) return true;
  s->isolated = s->handle.view->arena.map_segment(s->state(), false);
  return s->isolated;
}

bool is_frozen(const Py_buffer& view) noexcept {
  const SegmentObject* found = find_segment(static_cast<const char*>(view.buf), static_cast<u64>(view.len));
  return found != nullptr && found->frozen();
}

PyObject* place_view(const Py_buffer& from, u64* offset) noexcept {
  const u64 n = static_cast<u64>(from.len);
  *offset = 0;
  PyObject* result = nullptr;
  SegmentObject* found = find_segment(static_cast<const char*>(from.buf), n);
  // To map pages privately, and shared again later, takes longer than to copy them up to about this. Of what may be written to, a
  // small part is not worth that its owner pays for its next write to any other.
  constexpr u64 kWorthMapping = 8 << 20;
  const u64 length = found == nullptr ? 0 : found->state().length;
  const bool worth = length >= kWorthMapping && n * 2 >= length;
  if (found != nullptr && (found->frozen() || (worth && !found->isolated && isolate(found)))) {
    *offset = static_cast<u64>(static_cast<const char*>(from.buf) - found->data());
    result = Py_NewRef(reinterpret_cast<PyObject*>(found));
  }
  while (result == nullptr && (result = new_segment(n)) != nullptr) {
    fill_from(segment(result), 0, from);
    // Another thread may have forked meanwhile: then some of it is this process's alone.
    if (segment(result)->isolated) Py_CLEAR(result);
  }
  return result;
}

PyObject* place_all(PyObject* buffers) noexcept {
  PyObject* list = PyList_New(PyList_GET_SIZE(buffers));
  for (Py_ssize_t i = 0; list != nullptr && i < PyList_GET_SIZE(buffers); ++i) {
    PyObject* each = place(nullptr, PyList_GET_ITEM(buffers, i));
    if (each == nullptr) Py_CLEAR(list);
    else PyList_SET_ITEM(list, i, each);
  }
  return list;
}

PyObject* view_segment(PyObject* self, u64 offset, u64 n) noexcept {
  if (offset == 0 && n == segment(self)->state().length) return self;
  PyObject* view = PyMemoryView_FromObject(self);
  PyObject* begin = PyLong_FromUnsignedLongLong(offset);
  PyObject* end = PyLong_FromUnsignedLongLong(offset + n);
  PyObject* slice = begin == nullptr || end == nullptr ? nullptr : PySlice_New(begin, end, nullptr);
  PyObject* part = view == nullptr || slice == nullptr ? nullptr : PyObject_GetItem(view, slice);
  for (PyObject* each : {self, view, begin, end, slice}) Py_XDECREF(each);
  return part;
}

PyObject* segment_received(PyObject* self) noexcept {
  SegmentObject* s = segment(self);
  if (s->frozen()) return self;
  Arena& arena = s->handle.view->arena;
  // This process has it already, at the same address, and may have changed it since it was sent: only the file still has that.
  const auto same = [](Handle* h, const void* p) {
    return h != p && is_segment(h) && h->object == static_cast<const Handle*>(p)->object;
  };
  if (find_handle(same, &s->handle) == nullptr) {
    if (!arena.is_shared(s->handle.view->me, *s->handle.object, own_cargoes, patient())) return self;
    if (isolate(s)) {
      arena.populate(s->state(), false);
      return self;
    }
  }
  PyObject* own = new_segment(s->state().length);
  if (own != nullptr) {
    const u64 n = s->state().length;
    const u64 at = arena.block(s->handle.object->block).off + kSegmentData;
    u64 done = 0;
    Py_BEGIN_ALLOW_THREADS while (done < n) {
      const ssize_t r = pread(arena.fd(), segment(own)->data() + done, n - done, static_cast<off_t>(at + done));
      if (r <= 0) break;
      done += static_cast<u64>(r);
    }
    Py_END_ALLOW_THREADS if (done < n) {
      PyErr_SetFromErrno(PyExc_OSError);
      Py_CLEAR(own);
    }
  }
  Py_DECREF(self);
  return own;
}

bool add_segment_type(PyObject* module) noexcept { return add_type(module, &spec, &segment_type); }

}  // namespace procession::bind
