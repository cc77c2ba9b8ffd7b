#include "codec.hpp"

#include <array>
#include <utility>

#include "buffer.hpp"
#include "pickler.hpp"

namespace procession::bind {
namespace {

bool main_by_value = false;
PyObject* spare_list = nullptr;  // for the handles of the next pickle

}  // namespace

bool is_plain(PyObject* v) noexcept {
  PyTypeObject* t = Py_TYPE(v);
  return t == &PyLong_Type || t == &PyFloat_Type || t == &PyUnicode_Type || t == &PyBytes_Type || t == &PyBool_Type ||
         v == Py_None;
}

// --- compact form -------------------------------------------------------------------------------------------------------
//
// One letter a value, then its bytes, little-endian. Only objects whose type is exactly one of the letters' below: an
// instance of a subclass, or anything else, makes the writer give up, and the value is pickled as a whole.
// A list or dict that occurs twice (or in itself) must arrive as one object: the writer gives up there too.
//
//   N None | T True | F False | i 8-byte int | b 1-byte int | j u16 long int | d 8-byte float
//   a u16 ASCII text | s u16 text | y u16 bytes | t u16 tuple | l u16 list | m u16 dict
//   A an array: its form, then u16 bytes, a segment, or x and the u64 number of a payload's segment
//   R u16: the array of that number, once more
//   P a payload without handles: bytes, u16 segments, each arena, block, generation, offset, length

namespace {

struct SegmentEntry {
  u64 arena, offset, length;
  u32 block, gen;
};

SegmentEntry entry_of(PyObject* segment, u64 offset, u64 length) noexcept {
  const Handle* h = reinterpret_cast<Handle*>(segment);
  const u32 block = h->object->block;
  return {h->view->arena.id(), offset, length, block, h->view->arena.block(block).gen.load(std::memory_order_relaxed)};
}

}  // namespace

class CompactWriter {
 public:
  /// The segments of large arrays become handles of the message; or go into the list `beside`.
  explicit CompactWriter(Encoded& e, PyObject* beside = nullptr) noexcept
      : e_(e), at_(e.buffer_), begin_(e.buffer_), end_(e.buffer_ + sizeof e.buffer_), beside_(beside) {}
  CompactWriter(const CompactWriter&) = delete;
  CompactWriter& operator=(const CompactWriter&) = delete;
  ~CompactWriter() {
    for (Large& large : large_) PyBuffer_Release(&large.view);
    for (int i = 0; i < arrays_; ++i) Py_DECREF(array_[i]);
    for (int i = 0; i < payloads_; ++i) Py_DECREF(payload_[i]);
  }

  /// The value as a whole; on failure nothing has been done to it. An exception is set only where the memory for its arrays
  /// is not to be had.
  bool write_all(PyObject* v) noexcept {
    const bool ok = write(v, 0) && place_arrays();
    if (!ok) Py_CLEAR(e_.handles_);
    for (int i = 0; ok && i < payloads_; ++i) payload_given(payload_[i]);
    return ok;
  }

  bool write(PyObject* v, int depth) noexcept {
    PyTypeObject* t = Py_TYPE(v);
    if (t == &PyLong_Type) return write_int(v);
    if (t == &PyUnicode_Type) {
      if (PyUnicode_IS_COMPACT_ASCII(v))
        return bytes('a', static_cast<const char*>(PyUnicode_DATA(v)), PyUnicode_GET_LENGTH(v));
      Py_ssize_t n = 0;
      const char* text = PyUnicode_AsUTF8AndSize(v, &n);
      if (text != nullptr) return bytes('s', text, n);
      PyErr_Clear();  // a lone surrogate: pickle knows how
      return false;
    }
    if (t == &PyFloat_Type) {
      const double d = PyFloat_AS_DOUBLE(v);
      return fixed('d', &d, sizeof d);
    }
    if (v == Py_None) return fixed('N', nullptr, 0);
    if (t == &PyBool_Type) return fixed(v == Py_True ? 'T' : 'F', nullptr, 0);
    if (t == &PyBytes_Type) return bytes('y', PyBytes_AS_STRING(v), PyBytes_GET_SIZE(v));
    if (depth > kDepth) return false;
    if (array_reducer(reinterpret_cast<PyObject*>(t)) != nullptr) return write_array(v);
    if (is_payload(v)) return beside_ == nullptr && write_payload(v);
    if (t == &PyTuple_Type) {
      const Py_ssize_t n = PyTuple_GET_SIZE(v);
      if (!count('t', n)) return false;
      for (Py_ssize_t i = 0; i < n; ++i) {
        if (!write(PyTuple_GET_ITEM(v, i), depth + 1)) return false;
      }
      return true;
    }
    if (t == &PyList_Type) {
      if (!once(v) || !count('l', PyList_GET_SIZE(v))) return false;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(v); ++i) {
        if (!write(PyList_GET_ITEM(v, i), depth + 1)) return false;
      }
      return true;
    }
    if (t == &PyDict_Type) {
      if (!once(v) || !count('m', PyDict_GET_SIZE(v))) return false;
      PyObject *key, *value;
      for (Py_ssize_t i = 0; PyDict_Next(v, &i, &key, &value);) {
        if (!write(key, depth + 1) || !write(value, depth + 1)) return false;
      }
      return true;
    }
    return false;
  }

  /// A payload of a pickle and its buffers' segments.
  bool write_parts(PyObject* data, PyObject* placed) noexcept {
    return make_room(PyBytes_GET_SIZE(data) + 4) && fixed('P', nullptr, 0) &&
           bytes('y', PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)) && write_segments(placed);
  }

  /// What has been written is what is sent.
  void done(Coding coding) noexcept {
    e_.coding_ = coding;
    e_.data_ = begin_;
    e_.len_ = static_cast<u64>(at_ - begin_);
  }

 private:
  static constexpr int kDepth = 8, kPayloads = 16, kContainers = 256, kArrays = 256;

  bool fixed(char letter, const void* data, size_t n) noexcept {
    if (!has_room(static_cast<Py_ssize_t>(n + 1))) return false;
    *at_++ = letter;
    if (n != 0) std::memcpy(at_, data, n);
    at_ += n;
    return true;
  }

  bool count(char letter, Py_ssize_t n) noexcept {
    const u16 n16 = static_cast<u16>(n);
    return n <= UINT16_MAX && fixed(letter, &n16, sizeof n16);
  }

  bool bytes(char letter, const char* data, Py_ssize_t n) noexcept {
    if (n > UINT16_MAX || !has_room(n + 3)) return false;
    *at_++ = letter;
    const u16 n16 = static_cast<u16>(n);
    std::memcpy(at_, &n16, sizeof n16);
    std::memcpy(at_ + sizeof n16, data, static_cast<size_t>(n));
    at_ += sizeof n16 + n;
    return true;
  }

  bool write_int(PyObject* v) noexcept {
    int overflow = 0;
    const long long n = PyLong_AsLongLongAndOverflow(v, &overflow);
    if (overflow != 0) return write_long(v);
    if (n >= -128 && n <= 127) {
      const signed char c = static_cast<signed char>(n);
      return fixed('b', &c, 1);
    }
    return fixed('i', &n, sizeof n);
  }

  /// Two's complement, as int.to_bytes(…, 'little', signed=True).
  bool write_long(PyObject* v) noexcept {
    const size_t n = _PyLong_NumBits(v) / 8 + 1;
    if (n > UINT16_MAX || !has_room(static_cast<Py_ssize_t>(n + 3))) return false;
    *at_++ = 'j';
    const u16 n16 = static_cast<u16>(n);
    std::memcpy(at_, &n16, sizeof n16);
    auto* to = reinterpret_cast<unsigned char*>(at_ + sizeof n16);
#if PY_VERSION_HEX >= 0x030D0000
    const int failed = _PyLong_AsByteArray(reinterpret_cast<PyLongObject*>(v), to, n, 1, 1, 1);
#else
    const int failed = _PyLong_AsByteArray(reinterpret_cast<PyLongObject*>(v), to, n, 1, 1);
#endif
    if (failed != 0) PyErr_Clear();
    at_ += sizeof n16 + n;
    return failed == 0;
  }

  bool write_payload(PyObject* v) noexcept {
    const Payload* p = reinterpret_cast<Payload*>(v);
    const bool has_handles = p->handles != nullptr && PyObject_Size(p->handles) != 0;
    if (has_handles || p->buffers == nullptr || payloads_ == kPayloads || !write_parts(p->data, p->buffers)) {
      if (PyErr_Occurred()) PyErr_Clear();
      return false;
    }
    payload_[payloads_++] = Py_NewRef(v);
    return true;
  }

  bool write_array(PyObject* v) noexcept {
    for (u16 i = 0; i < arrays_; ++i) {
      if (array_[i] == v) return make_room(3) && fixed('R', &i, sizeof i);
    }
    ArrayForm form;
    Py_buffer view;
    if (arrays_ == kArrays || !describe_array(v, &form, &view)) return false;
    array_[arrays_++] = Py_NewRef(v);
    const bool large = view.len >= kLeastOutside || is_frozen(view);
    if (write_array(form, view, large) && (!large || large_.push({view, at_ - begin_ - entry_size()}))) {
      if (!large) PyBuffer_Release(&view);
      return true;
    }
    PyBuffer_Release(&view);
    return false;
  }

  bool write_array(const ArrayForm& form, const Py_buffer& view, bool large) noexcept {
    const char head[] = {form.letter, form.fortran, static_cast<char>(form.dimensions)};
    const u64 shape = form.dimensions * sizeof form.shape[0];
    const Py_ssize_t size = large ? entry_size() : 2 + view.len;
    if (!make_room(static_cast<Py_ssize_t>(3 + sizeof head + shape) + size)) return false;
    fixed('A', head, sizeof head);
    fixed('g', form.shape, shape);
    if (!large) return bytes('y', static_cast<const char*>(view.buf), view.len);
    const SegmentEntry later{};
    return fixed(beside_ != nullptr ? 'x' : 'g', &later, static_cast<size_t>(size));
  }

  /// What is said of a segment.
  Py_ssize_t entry_size() const noexcept { return beside_ != nullptr ? sizeof(u64) : sizeof(SegmentEntry); }

  /// What is neither an array nor beside one is better off with pickle when it is long.
  bool has_room(Py_ssize_t n) noexcept { return end_ - at_ >= n || (beside_ != nullptr && make_room(n)); }

  bool make_room(Py_ssize_t n) noexcept {
    constexpr Py_ssize_t kMost = 128 << 10;
    if (end_ - at_ >= n) return true;
    const Py_ssize_t had = at_ - begin_;
    const Py_ssize_t capacity = std::max(had + n + Encoded::kCompactMax, std::min(2 * had, kMost));
    PyObject* room = capacity <= kMost ? PyBytes_FromStringAndSize(nullptr, capacity) : nullptr;
    if (room == nullptr) return false;
    std::memcpy(PyBytes_AS_STRING(room), begin_, static_cast<size_t>(had));
    begin_ = PyBytes_AS_STRING(room);
    at_ = begin_ + had;
    end_ = begin_ + capacity;
    Py_XSETREF(e_.keep_, room);
    return true;
  }

  /// Large arrays, once all else is written: to copy them for nothing would be dear. Other threads run meanwhile.
  bool place_arrays() noexcept {
    for (const Large& large : large_) {
      u64 offset = 0;
      PyObject* segment = place_view(large.view, &offset);
      if (segment == nullptr) return false;
      const u64 length = static_cast<u64>(large.view.len);
      if (!(beside_ != nullptr ? put_beside(segment, offset, length, begin_ + large.at)
                               : put_inside(segment, offset, length, begin_ + large.at)))
        return false;
    }
    return true;
  }

  /// Takes over the reference, as the next does.
  bool put_inside(PyObject* segment, u64 offset, u64 length, char* to) noexcept {
    const SegmentEntry entry = entry_of(segment, offset, length);
    std::memcpy(to, &entry, sizeof entry);
    const bool ok = e_.hold_handle(segment);
    Py_DECREF(segment);
    return ok;
  }

  bool put_beside(PyObject* segment, u64 offset, u64 length, char* to) noexcept {
    const u64 number = static_cast<u64>(PyList_GET_SIZE(beside_));
    std::memcpy(to, &number, sizeof number);
    PyObject* part =
        Py_BuildValue("NKK", segment, static_cast<unsigned long long>(offset), static_cast<unsigned long long>(length));
    const bool ok = part != nullptr && PyList_Append(beside_, part) == 0;
    Py_XDECREF(part);
    return ok;
  }

  bool write_segments(PyObject* buffers) noexcept {
    const Py_ssize_t n = PyList_GET_SIZE(buffers);
    if (!make_room(3 + n * static_cast<Py_ssize_t>(1 + sizeof(SegmentEntry))) || !count('l', n)) return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
      Part part;
      if (!parse_part(PyList_GET_ITEM(buffers, i), &part)) return false;
      PyObject* segment = reinterpret_cast<PyObject*>(part.segment);
      const SegmentEntry entry = entry_of(segment, part.offset, part.length);
      if (!fixed('g', &entry, sizeof entry) || !e_.hold_handle(segment)) return false;
    }
    return true;
  }

  bool once(PyObject* v) noexcept {
    for (int i = 0; i < containers_; ++i) {
      if (container_[i] == v) return false;
    }
    if (containers_ == kContainers) return false;
    container_[containers_++] = v;
    return true;
  }

  Encoded& e_;
  char* at_;
  char* begin_;
  char* end_;
  PyObject* container_[kContainers];
  int containers_ = 0;
  PyObject* payload_[kPayloads];
  int payloads_ = 0;
  PyObject* array_[kArrays];
  u16 arrays_ = 0;
  struct Large {
    Py_buffer view;  ///< as it was when its form was written; another thread cannot change that while this is held
    Py_ssize_t at;   ///< where it is to be said which segment it is in
  };
  Buffer<Large> large_;
  PyObject* beside_;
};

namespace {

/// What an object uses in place, of a payload's buffers.
PyObject* view_part(PyObject* buffers, Py_ssize_t i) noexcept {
  Part part;
  if (!parse_part(PyList_GET_ITEM(buffers, i), &part)) return nullptr;
  return view_segment(Py_NewRef(reinterpret_cast<PyObject*>(part.segment)), part.offset, part.length);
}

class CompactReader {
 public:
  /// `buffers`: the segments that are beside it, a list of (segment, offset, length).
  CompactReader(const char* data, u64 len, PyObject* buffers = nullptr) noexcept
      : at_(data), end_(data + len), buffers_(buffers) {}

  /// Of a message that is a payload: what Payload.load() returns.
  PyObject* load() noexcept {
    ++at_;  // 'P'
    PyObject* data = read();
    PyObject* buffers = data == nullptr ? nullptr : read_segments(view_segment);
    PyObject* value = buffers == nullptr ? nullptr : unpickle(data, buffers);
    Py_XDECREF(data);
    Py_XDECREF(buffers);
    return value;
  }

  PyObject* read() noexcept {
    if (at_ >= end_) return damaged();
    switch (*at_++) {
      case 'N': return Py_NewRef(Py_None);
      case 'T': return Py_NewRef(Py_True);
      case 'F': return Py_NewRef(Py_False);
      case 'b': return PyLong_FromLong(static_cast<signed char>(*at_++));
      case 'i': return PyLong_FromLongLong(get<long long>());
      case 'd': return PyFloat_FromDouble(get<double>());
      case 'j': {
        const u16 n = get<u16>();
        const char* p = at_;
        at_ += n;
        return at_ > end_ ? damaged() : _PyLong_FromByteArray(reinterpret_cast<const unsigned char*>(p), n, 1, 1);
      }
      case 'a': {
        const u16 n = get<u16>();
        const char* p = at_;
        at_ += n;
        if (at_ > end_) return damaged();
        PyObject* v = PyUnicode_New(n, 127);
        if (v != nullptr && n != 0) std::memcpy(PyUnicode_DATA(v), p, n);
        return v;
      }
      case 's': {
        const u16 n = get<u16>();
        const char* p = at_;
        at_ += n;
        return at_ > end_ ? damaged() : PyUnicode_DecodeUTF8(p, n, nullptr);
      }
      case 'y': {
        const u16 n = get<u16>();
        const char* p = at_;
        at_ += n;
        return at_ > end_ ? damaged() : PyBytes_FromStringAndSize(p, n);
      }
      case 't': {
        const u16 n = get<u16>();
        PyObject* v = PyTuple_New(n);
        for (u16 i = 0; v != nullptr && i < n; ++i) {
          PyObject* x = read();
          if (x == nullptr) {
            Py_CLEAR(v);
          } else {
            PyTuple_SET_ITEM(v, i, x);
          }
        }
        return v;
      }
      case 'l': {
        const u16 n = get<u16>();
        PyObject* v = PyList_New(n);
        for (u16 i = 0; v != nullptr && i < n; ++i) {
          PyObject* x = read();
          if (x == nullptr) {
            Py_CLEAR(v);
          } else {
            PyList_SET_ITEM(v, i, x);
          }
        }
        return v;
      }
      case 'm': {
        const u16 n = get<u16>();
        PyObject* v = PyDict_New();
        for (u16 i = 0; v != nullptr && i < n; ++i) {
          PyObject* key = read();
          PyObject* value = key == nullptr ? nullptr : read();
          if (value == nullptr || PyDict_SetItem(v, key, value) != 0) Py_CLEAR(v);
          Py_XDECREF(key);
          Py_XDECREF(value);
        }
        return v;
      }
      case 'A': {
        PyObject* v = read_array();
        if (arrays_ < static_cast<int>(std::size(array_))) array_[arrays_++] = v;
        return v;
      }
      case 'R': {
        const u16 i = get<u16>();
        return i < arrays_ ? Py_NewRef(array_[i]) : damaged();
      }
      case 'P': return read_payload();
      default: return damaged();
    }
  }

 private:
  /// A list of what `each` makes of a segment (whose reference it takes over), where its bytes begin and how many they are.
  PyObject* read_segments(PyObject* (*each)(PyObject*, u64, u64)) noexcept {
    ++at_;  // 'l'
    const u16 n = get<u16>();
    PyObject* list = PyList_New(n);
    for (u16 i = 0; list != nullptr && i < n; ++i) {
      ++at_;  // 'g'
      PyObject* v = read_segment(each);
      if (v == nullptr) Py_CLEAR(list);
      else PyList_SET_ITEM(list, i, v);
    }
    return list;
  }

  PyObject* read_array() noexcept {
    ArrayForm form{};
    const auto head = get<std::array<char, 3>>();
    form.letter = head[0];
    form.fortran = head[1] != 0;
    form.dimensions = static_cast<u8>(head[2]);
    ++at_;  // 'g'
    if (form.dimensions > kMostDimensions || end_ - at_ < form.dimensions * static_cast<Py_ssize_t>(sizeof(i64)) + 1)
      return damaged();
    std::memcpy(form.shape, at_, form.dimensions * sizeof(i64));
    at_ += form.dimensions * sizeof(i64);
    if (*at_++ == 'y') {
      const u16 n = get<u16>();
      const char* p = at_;
      at_ += n;
      return at_ > end_ ? damaged() : copy_array(form, p, n);
    }
    --at_;
    PyObject* segment = *at_++ == 'x' ? buffer(get<u64>()) : read_segment(view_segment);
    PyObject* array = segment == nullptr ? nullptr : make_array(form, segment);
    Py_XDECREF(segment);
    return array;
  }

  PyObject* read_segment(PyObject* (*each)(PyObject*, u64, u64)) noexcept {
    const auto entry = get<SegmentEntry>();
    PyObject* segment = rebuild_handle(segment_class(), entry.arena, entry.block, entry.gen);
    return segment == nullptr ? nullptr : each(segment, entry.offset, entry.length);
  }

  PyObject* read_payload() noexcept {
    PyObject* data = read();
    PyObject* buffers = data == nullptr ? nullptr : read_segments([](PyObject* segment, u64 offset, u64 n) {
      return Py_BuildValue("(NKK)", segment, static_cast<unsigned long long>(offset),
                           static_cast<unsigned long long>(n));
    });
    PyObject* payload = buffers == nullptr ? nullptr : make_payload(data, buffers);
    Py_XDECREF(data);
    Py_XDECREF(buffers);
    return payload;
  }

  /// Of a payload: what an array uses in place.
  PyObject* buffer(u64 number) noexcept {
    if (buffers_ == nullptr || number >= static_cast<u64>(PyList_GET_SIZE(buffers_))) return damaged();
    return view_part(buffers_, static_cast<Py_ssize_t>(number));
  }

  template <class T>
  T get() noexcept {
    T v{};
    if (end_ - at_ >= static_cast<Py_ssize_t>(sizeof v)) std::memcpy(&v, at_, sizeof v);
    at_ += sizeof v;
    return v;
  }

  static PyObject* damaged() noexcept {
    PyErr_SetString(PyExc_SystemError, "procession: a message is damaged; this is a bug, please report it");
    return nullptr;
  }

  const char* at_;
  const char* end_;
  PyObject* buffers_;
  PyObject* array_[256];  // borrowed: what is being read has them
  int arrays_ = 0;
};

}  // namespace

void set_main_by_value(bool on) noexcept { main_by_value = on; }

bool Encoded::hold(PyObject* bytes, Coding coding) noexcept {
  Py_XSETREF(keep_, bytes);
  coding_ = coding;
  data_ = PyBytes_AS_STRING(bytes);
  len_ = static_cast<u64>(PyBytes_GET_SIZE(bytes));
  if (len_ <= UINT32_MAX - 64) return true;
  PyErr_Format(PyExc_ValueError, "a message of %zd bytes is too long: the limit is 4 GiB", PyBytes_GET_SIZE(bytes));
  return false;
}

bool Encoded::pickle(PyObject* value) noexcept {
  PyObject* noted = std::exchange(spare_list, nullptr);
  if (noted == nullptr && (noted = PyList_New(0)) == nullptr) return false;
  PyObject* outer = swap_collector(Py_NewRef(noted));
  PyObject* buffers = nullptr;
  PyObject* plain = procession::bind::pickle(value, kLeastOutside, &buffers);
  // Spawned children cannot import this __main__: what is named there goes by value. A false alarm only costs time.
  const bool names_main =
      plain != nullptr && main_by_value &&
      memmem(PyBytes_AS_STRING(plain), static_cast<size_t>(PyBytes_GET_SIZE(plain)), "__main__", 8) != nullptr;
  bool ok = plain != nullptr && !names_main;
  if (ok && buffers == nullptr) {
    ok = hold(plain, Coding::kPickle);
  } else if (ok) {
    ok = hold_with(plain, buffers);
  } else if (names_main || PyErr_ExceptionMatches(PyExc_Exception)) {
    Py_XDECREF(plain);
    PyErr_Clear();
    PyList_SetSlice(noted, 0, PyList_GET_SIZE(noted), nullptr);
    ok = pickle_by_value(value);
  }
  Py_XDECREF(buffers);
  Py_XDECREF(swap_collector(outer));
  if (ok && outer != nullptr) {  // a pickle within another: they go with that one
    ok = PyList_SetSlice(outer, PyList_GET_SIZE(outer), PyList_GET_SIZE(outer), noted) == 0;
  }
  if (ok && PyList_GET_SIZE(noted) != 0) {
    if (handles_ != nullptr) ok = PyList_SetSlice(noted, 0, 0, handles_) == 0;
    Py_XSETREF(handles_, noted);
  } else if (spare_list == nullptr && PyList_GET_SIZE(noted) == 0) {
    spare_list = noted;
  } else {
    Py_DECREF(noted);
  }
  return ok;
}

/// A pickle and the buffers that are not in it, in the form of a payload. Takes over the reference to the pickle.
bool Encoded::hold_with(PyObject* data, PyObject* buffers) noexcept {
  PyObject* placed = place_all(buffers);
  if (placed == nullptr) {
    Py_DECREF(data);
    return false;
  }
  CompactWriter w(*this);
  bool ok = w.write_parts(data, placed);
  if (ok) {
    w.done(Coding::kPayload);
  } else if (!PyErr_Occurred()) {
    Py_CLEAR(handles_);
    PyObject* payload = make_payload(data, placed);
    ok = payload != nullptr && hold_pickled(payload);
  }
  Py_DECREF(data);
  Py_DECREF(placed);
  return ok;
}

/// Takes over the reference.
bool Encoded::hold_payload(PyObject* payload) noexcept {
  CompactWriter w(*this);
  if (w.write_all(payload)) {
    Py_DECREF(payload);
    w.done(Coding::kPayload);
    return true;
  }
  return hold_pickled(payload);
}

/// Takes over the reference.
bool Encoded::hold_pickled(PyObject* payload) noexcept {
  PyObject* none = nullptr;
  PyObject* bytes = procession::bind::pickle(payload, PY_SSIZE_T_MAX, &none);
  Py_DECREF(payload);
  return bytes != nullptr && hold(bytes, Coding::kPayload);
}

/// Lambdas, closures, what lives in __main__ only; or the error, with a note that says which part is at fault.
bool Encoded::pickle_by_value(PyObject* value) noexcept {
  PyObject* dumps = import_from("procession._wire.codec", "dumps");
  PyObject* args = dumps == nullptr ? nullptr : PyTuple_Pack(1, value);
  PyObject* kwargs =
      args == nullptr ? nullptr : Py_BuildValue("{s:O}", "main_by_value", main_by_value ? Py_True : Py_False);
  PyObject* data = kwargs == nullptr ? nullptr : PyObject_Call(dumps, args, kwargs);
  Py_XDECREF(dumps);
  Py_XDECREF(args);
  Py_XDECREF(kwargs);
  if (data == nullptr) return false;
  return PyBytes_CheckExact(data) ? hold(data, Coding::kPickle) : hold_payload(data);
}

u32 load(Encoded& e, View* v, u32 parent) noexcept {
  PyObject* list = std::exchange(e.handles_, nullptr);
  if (list == nullptr) return 0;
  Buffer<Object*> objects;
  bool ok = true;
  for (Py_ssize_t i = 0; ok && i < PyList_GET_SIZE(list); ++i) {
    Handle* h = reinterpret_cast<Handle*>(PyList_GET_ITEM(list, i));
    if (h->view !=
        v) {  // of another arena, which this process has by fork: as good as a handle to an unknown destination
      h->object->pinned.store(1, std::memory_order_relaxed);
    } else {
      ok = objects.push(h->object);
    }
  }
  u32 cargo = 0;
  if (ok && objects.size() != 0) {
    cargo = v->arena.load_cargo(v->me, parent, objects.data(), static_cast<u32>(objects.size()), patient());
    if (cargo == 0 && v->arena.collect(v->me, patient()) != 0)
      cargo = v->arena.load_cargo(v->me, parent, objects.data(), static_cast<u32>(objects.size()), patient());
    if (cargo == 0) raise_no_memory(v, sizeof(Cargo) + objects.size() * sizeof(Cargo::Entry));
  } else if (!ok) {
    PyErr_NoMemory();
  }
  Py_DECREF(list);
  return cargo;
}

bool Encoded::hold_handle(PyObject* handle) noexcept {
  if (handles_ == nullptr) handles_ = PyList_New(0);
  return handles_ != nullptr && PyList_Append(handles_, handle) == 0;
}

bool Encoded::encode(PyObject* value) noexcept {
  if (PyBytes_CheckExact(value)) return hold(Py_NewRef(value), Coding::kBytes);
  CompactWriter w(*this);
  if (w.write_all(value)) {
    w.done(Coding::kCompact);
    return true;
  }
  if (PyErr_Occurred()) return false;
  if (PyUnicode_CheckExact(value)) {
    Py_ssize_t n = 0;
    const char* text = PyUnicode_AsUTF8AndSize(value, &n);
    if (text != nullptr && n <= UINT32_MAX - 64) {
      keep_ = Py_NewRef(value);
      coding_ = Coding::kText;
      data_ = text;
      len_ = static_cast<u64>(n);
      return true;
    }
    PyErr_Clear();
  }
  return pickle(value);
}

PyObject* decode(u8 coding, const void* data, u64 len, PyObject* whole) noexcept {
  const char* p = static_cast<const char*>(data);
  switch (static_cast<Coding>(coding)) {
    case Coding::kCompact: return CompactReader(p, len).read();
    case Coding::kText: return PyUnicode_DecodeUTF8(p, static_cast<Py_ssize_t>(len), nullptr);
    case Coding::kBytes:
      return whole != nullptr ? Py_NewRef(whole) : PyBytes_FromStringAndSize(p, static_cast<Py_ssize_t>(len));
    case Coding::kPickle: {
      PyObject* bytes =
          whole != nullptr ? Py_NewRef(whole) : PyBytes_FromStringAndSize(p, static_cast<Py_ssize_t>(len));
      PyObject* r = bytes == nullptr ? nullptr : unpickle(bytes, nullptr);
      Py_XDECREF(bytes);
      return r;
    }
    case Coding::kPayload: {
      if (len != 0 && *p == 'P') return CompactReader(p, len).load();
      PyObject* payload = decode(static_cast<u8>(Coding::kPickle), data, len, whole);
      PyObject* r = payload == nullptr ? nullptr : PyObject_CallMethod(payload, "load", nullptr);
      Py_XDECREF(payload);
      return r;
    }
  }
  PyErr_SetString(PyExc_SystemError, "procession: a message of an unknown kind; this is a bug, please report it");
  return nullptr;
}

PyObject* unpack(PyObject* data, PyObject* buffers) noexcept {
  const char* p = PyBytes_AS_STRING(data);
  const Py_ssize_t n = PyBytes_GET_SIZE(data);
  const bool is_pickle = static_cast<unsigned char>(*p) == 0x80;
  if (!is_pickle) return is_numbers(*p) ? unpack_numbers(p, n) : CompactReader(p, static_cast<u64>(n), buffers).read();
  if (buffers == nullptr) return unpickle(data, nullptr);
  PyObject* views = PyList_New(PyList_GET_SIZE(buffers));
  for (Py_ssize_t i = 0; views != nullptr && i < PyList_GET_SIZE(buffers); ++i) {
    PyObject* view = view_part(buffers, i);
    if (view == nullptr) Py_CLEAR(views);
    else PyList_SET_ITEM(views, i, view);
  }
  PyObject* value = views == nullptr ? nullptr : unpickle(data, views);
  Py_XDECREF(views);
  return value;
}

// --- for the pool -------------------------------------------------------------------------------------------------------

namespace {

/// Of a value of which all is in the compact form: its bytes, or a payload.
PyObject* packed(CompactWriter& w, const Encoded& e, PyObject* beside) noexcept {
  w.done(Coding::kCompact);
  const Outgoing out = e.outgoing();
  PyObject* data = PyBytes_FromStringAndSize(static_cast<const char*>(out.data), out.len);
  if (data == nullptr || PyList_GET_SIZE(beside) == 0) return data;
  PyObject* payload = make_payload(data, beside);
  Py_DECREF(data);
  return payload;
}

/// Whether there is an array where there would be one: among the first of the parts. An attempt for nothing costs as much as pickle.
bool seems_to_hold_arrays(PyObject* v, int depth) noexcept {
  constexpr Py_ssize_t kParts = 8;
  if (array_reducer(reinterpret_cast<PyObject*>(Py_TYPE(v))) != nullptr) return true;
  if (depth == 3) return false;
  if (PyDict_CheckExact(v)) {
    PyObject *key, *value;
    Py_ssize_t at = 0;
    for (Py_ssize_t i = 0; i < kParts && PyDict_Next(v, &at, &key, &value); ++i) {
      if (seems_to_hold_arrays(value, depth + 1)) return true;
    }
    return false;
  }
  if (!PyTuple_CheckExact(v) && !PyList_CheckExact(v)) return false;
  for (Py_ssize_t i = 0; i < std::min(kParts, PySequence_Fast_GET_SIZE(v)); ++i) {
    if (seems_to_hold_arrays(PySequence_Fast_GET_ITEM(v, i), depth + 1)) return true;
  }
  return false;
}

PyObject* pack(PyObject*, PyObject* value) noexcept {
  PyObject* numbers = pack_numbers(value);
  if (numbers != nullptr || PyErr_Occurred()) return numbers;
  if (!seems_to_hold_arrays(value, 0)) Py_RETURN_NONE;
  PyObject* beside = PyList_New(0);
  if (beside == nullptr) return nullptr;
  Encoded e;
  CompactWriter w(e, beside);
  PyObject* r = nullptr;
  if (w.write_all(value)) {
    r = packed(w, e, beside);
  } else if (!PyErr_Occurred()) {
    r = Py_NewRef(Py_None);
  }
  Py_DECREF(beside);
  return r;
}

/// How much memory a value takes beside a message that it is in; -1 when to copy it may run somebody's code.
i64 weight(PyObject* v, int depth) noexcept {
  if (is_plain(v)) return 0;
  ArrayForm form;
  Py_buffer view;
  if (describe_array(v, &form, &view)) {
    const bool beside = view.len >= kLeastOutside && !is_frozen(view);
    const i64 n = beside ? view.len : 0;
    PyBuffer_Release(&view);
    return n;
  }
  if (depth != 0 || !PyTuple_CheckExact(v) || PyTuple_GET_SIZE(v) > 8) return -1;
  i64 sum = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(v); ++i) {
    const i64 n = weight(PyTuple_GET_ITEM(v, i), 1);
    if (n < 0) return n;
    sum += n;
  }
  return sum;
}

PyObject* weigh(PyObject*, PyObject* value) noexcept { return PyLong_FromLongLong(weight(value, 0)); }

PyObject* py_unpack(PyObject*, PyObject* data) noexcept {
  if (PyBytes_CheckExact(data)) return unpack(data, nullptr);
  return PyErr_Format(PyExc_TypeError, "_unpack() takes bytes, not %s", Py_TYPE(data)->tp_name);
}

PyObject* py_set_main_by_value(PyObject*, PyObject* arg) noexcept {
  const int on = PyObject_IsTrue(arg);
  if (on < 0) return nullptr;
  set_main_by_value(on != 0);
  Py_RETURN_NONE;
}
PyObject* py_pickle_beside(PyObject*, PyObject* args) noexcept {
  PyObject *value, *buffers = nullptr;
  Py_ssize_t least = kLeastOutside;
  if (!PyArg_ParseTuple(args, "O|n", &value, &least)) return nullptr;
  PyObject* data = procession::bind::pickle(value, least, &buffers);
  if (data == nullptr) return nullptr;
  return buffers != nullptr ? Py_BuildValue("NN", data, buffers) : Py_BuildValue("N()", data);
}
PyMethodDef functions[] = {
    {"_pack", pack, METH_O,
     "_pack(value) -> bytes | Payload | None\n--\n\nPack a list of ints of 64 bits or of floats, or what has NumPy "
     "arrays in it, at most 256 of them, and otherwise little; None for anything else."},
    {"_unpack", py_unpack, METH_O, "_unpack(bytes)\n--\n\nReturn what _pack() packed, or was pickled."},
    {"_weigh", weigh, METH_O,
     "_weigh(value) -> int\n--\n\nHow many bytes a value takes beside the message that it is a part of; -1 unless it "
     "is plain: numbers, text, bytes, NumPy arrays of numbers and short tuples of those, whose copy runs nobody's "
     "code."},
    {"pickle_beside", py_pickle_beside, METH_VARARGS,
     "pickle_beside(obj, least=65536) -> (bytes, buffers)\n\nPickle as a queue does; buffers of `least` bytes and more "
     "are "
     "left out."},
    {"set_main_by_value", py_set_main_by_value, METH_O, "Whether queues send what is defined in __main__ by value."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_codec_functions(PyObject* module) noexcept { return PyModule_AddFunctions(module, functions) == 0; }

}  // namespace procession::bind
