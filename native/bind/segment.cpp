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
  const Arena& arena = s->handle.view->arena;
  const Block& block = arena.block(s->handle.object->block);
  char* to = s->data() + offset;
  u64 done = 0;
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
  if (ok && n >= kLongCopy) {
    Py_BEGIN_ALLOW_THREADS copy_in(s, static_cast<u64>(offset), from.buf, n);
    Py_END_ALLOW_THREADS
  } else if (ok) {
    copy_in(s, static_cast<u64>(offset), from.buf, n);
  }
  PyBuffer_Release(&from);
  return ok ? Py_NewRef(Py_None) : nullptr;
}

/// Before many writes to memory that has been used before.
PyObject* populate(PyObject* self, PyObject*) noexcept {
  SegmentObject* s = segment(self);
  if (!check_writable(s)) return nullptr;
  if (s->handle.view->arena.block(s->handle.object->block).warm != 0) s->handle.view->arena.populate(s->state(), true);
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

/// Before a handle of it goes to another process: False: what is in the arena is not what this process sees.
PyObject* give(PyObject* self, PyObject*) noexcept {
  SegmentObject* s = segment(self);
  if (!check_handle(&s->handle)) return nullptr;
  if (s->frozen()) Py_RETURN_TRUE;
  return PyBool_FromLong(!s->isolated && isolate(s));
}

PyObject* find(PyObject*, PyObject* arg) noexcept {
  Py_buffer view;
  if (PyObject_GetBuffer(arg, &view, PyBUF_SIMPLE) != 0) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  struct Range {
    const char* begin;
    u64 n;
  } range{static_cast<const char*>(view.buf), static_cast<u64>(view.len)};
  PyBuffer_Release(&view);
  const auto holds = [](Handle* h, const void* p) {
    if (!is_segment(h)) return false;
    const auto& r = *static_cast<const Range*>(p);
    const auto* s = reinterpret_cast<SegmentObject*>(h);
    return s->data() <= r.begin && r.begin + r.n <= s->data() + s->state().length;
  };
  View* v = has_views() ? current_view() : nullptr;
  if (v == nullptr || !v->arena.contains(range.begin)) Py_RETURN_NONE;
  Handle* h = find_handle(holds, &range);
  if (h == nullptr) Py_RETURN_NONE;
  const Py_ssize_t offset = range.begin - reinterpret_cast<SegmentObject*>(h)->data();
  return Py_BuildValue("On", reinterpret_cast<PyObject*>(h), offset);
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
    {"give", give, METH_NOARGS,
     "give() -> bool\n\nTo be called before a handle is sent: what this process writes from now on, others do not see. "
     "False: that has been so for a while, and the bytes must be copied."},
    {"find", find, METH_O | METH_STATIC,
     "find(buffer) -> (segment, offset) | None\n\nWhere this process's memory is a segment's."},
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
  PyObject* own = segment_type->tp_alloc(segment_type, 0);
  if (own != nullptr && !make(segment(own), s->state().length)) Py_CLEAR(own);
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
