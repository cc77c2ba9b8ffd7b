#include "codec.hpp"

#include <utility>

#include "buffer.hpp"

namespace procession::bind {
namespace {

bool main_by_value = false;
PyObject* payload_type = nullptr;  // once its module has been imported
PyObject* spare_list = nullptr;    // for the handles of the next pickle

}  // namespace

// --- compact form -------------------------------------------------------------------------------------------------------
//
// One letter a value, then its bytes, little-endian. Only objects whose type is exactly one of the letters' below: an
// instance of a subclass, or anything else, makes the writer give up, and the value is pickled as a whole.
// A list, dict or set that occurs twice (or in itself) must arrive as one object: the writer gives up there too.
//
//   N None | T True | F False | i 8-byte int | b 1-byte int | j u16 long int | d 8-byte float
//   a u16 ASCII text | s u16 text | y u16 bytes | t u16 tuple | l u16 list | m u16 dict
//   P a payload without handles: bytes, u16 segments, each arena, block, generation, offset, length

namespace {

/// Borrowed; nullptr with an exception set.
PyObject* payload_class() noexcept {
  if (payload_type == nullptr) Py_XDECREF(PyImport_ImportModule("procession._wire.payload"));  // which says what it is
  return payload_type;
}

struct SegmentEntry {
  u64 arena, offset, length;
  u32 block, gen;
};

}  // namespace

class CompactWriter {
 public:
  explicit CompactWriter(Encoded& e) noexcept
      : e_(e), at_(e.buffer_), begin_(e.buffer_), end_(e.buffer_ + sizeof e.buffer_) {}

  /// The value as a whole; on failure nothing has been done to it.
  bool write_all(PyObject* v) noexcept {
    const bool ok = write(v, 0);
    if (!ok) Py_CLEAR(e_.handles_);
    for (int i = 0; ok && i < payloads_; ++i) {
      PyObject* r = PyObject_CallMethod(payload_[i], "given", nullptr);
      if (r == nullptr) PyErr_Clear();
      Py_XDECREF(r);
    }
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
    if (payload_type != nullptr && reinterpret_cast<PyObject*>(t) == payload_type) return write_payload(v);
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

  u64 size() const noexcept { return static_cast<u64>(at_ - begin_); }

 private:
  static constexpr int kDepth = 8, kContainers = 16;

  bool fixed(char letter, const void* data, size_t n) noexcept {
    if (static_cast<size_t>(end_ - at_) < n + 1) return false;
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
    if (end_ - at_ < n + 3) return false;
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
    if (n > UINT16_MAX || static_cast<size_t>(end_ - at_) < n + 3) return false;
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
    PyObject* data = PyObject_GetAttrString(v, "data");
    PyObject* buffers = PyObject_GetAttrString(v, "buffers");
    PyObject* handles = PyObject_GetAttrString(v, "handles");
    const bool plain = data != nullptr && buffers != nullptr && handles != nullptr && PyBytes_CheckExact(data) &&
                       PyList_CheckExact(buffers) && PyObject_Size(handles) == 0 && payloads_ < kContainers;
    const bool ok = plain && fixed('P', nullptr, 0) && bytes('y', PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)) &&
                    write_segments(buffers);
    Py_XDECREF(data);
    Py_XDECREF(buffers);
    Py_XDECREF(handles);
    if (ok) payload_[payloads_++] = v;
    if (PyErr_Occurred()) PyErr_Clear();
    return ok;
  }

  bool write_segments(PyObject* buffers) noexcept {
    if (!count('l', PyList_GET_SIZE(buffers))) return false;
    if (e_.handles_ == nullptr && (e_.handles_ = PyList_New(0)) == nullptr) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(buffers); ++i) {
      PyObject* segment = nullptr;
      unsigned long long offset = 0, length = 0;
      if (!PyArg_ParseTuple(PyList_GET_ITEM(buffers, i), "O!KK", segment_class(), &segment, &offset, &length))
        return false;
      const Handle* h = reinterpret_cast<Handle*>(segment);
      if (!check_handle(h)) return false;
      const u32 block = h->object->block;
      const SegmentEntry entry{h->view->arena.id(), offset, length, block,
                               h->view->arena.block(block).gen.load(std::memory_order_relaxed)};
      if (!fixed('g', &entry, sizeof entry) || PyList_Append(e_.handles_, segment) != 0) return false;
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
  PyObject* payload_[kContainers];
  int payloads_ = 0;
};

namespace {

class CompactReader {
 public:
  CompactReader(const char* data, u64 len) noexcept : at_(data), end_(data + len) {}

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
      case 'P': return read_payload();
      default: return damaged();
    }
  }

 private:
  PyObject* read_payload() noexcept {
    PyObject* data = read();
    ++at_;  // 'l'
    const u16 n = get<u16>();
    PyObject* buffers = data == nullptr ? nullptr : PyList_New(n);
    for (u16 i = 0; buffers != nullptr && i < n; ++i) {
      ++at_;  // 'g'
      const auto entry = get<SegmentEntry>();
      PyObject* segment = rebuild_handle(segment_class(), entry.arena, entry.block, entry.gen);
      PyObject* each = segment == nullptr
                           ? nullptr
                           : Py_BuildValue("(NKK)", segment, static_cast<unsigned long long>(entry.offset),
                                           static_cast<unsigned long long>(entry.length));
      if (each == nullptr) Py_CLEAR(buffers);
      else PyList_SET_ITEM(buffers, i, each);
    }
    PyObject* cls = buffers == nullptr ? nullptr : payload_class();
    PyObject* payload = cls == nullptr ? nullptr : PyObject_CallFunctionObjArgs(cls, data, buffers, nullptr);
    Py_XDECREF(data);
    Py_XDECREF(buffers);
    return payload;
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
};

// --- pickle -------------------------------------------------------------------------------------------------------------
//
// What ForkingPickler.dumps does (the reducers that multiprocessing and torch register apply), without its Python class and
// its ChainMap: one C pickler is kept and used again. `Sink` is its file, `Reducers` its dispatch table.

struct Sink {
  PyObject ob_base;
  PyObject* first;    ///< most pickles come in one piece
  PyObject* others;   ///< a list, for those that do not
  PyObject* buffers;  ///< a list of those that are not in it, and go as segments; nullptr if there are none
};

/// Shorter buffers are copied into the message: a segment costs a page, a mapping and some 10 us.
constexpr Py_ssize_t kLeastOutside = 64 << 10;

/// The pickler asks whether a buffer goes into the pickle.
PyObject* sink_buffer(PyObject* self, PyObject* buffer) noexcept {
  auto* s = reinterpret_cast<Sink*>(self);
  const Py_buffer* view = PyPickleBuffer_GetBuffer(buffer);
  if (view == nullptr) return nullptr;
  if (view->len < kLeastOutside || PyBuffer_IsContiguous(view, 'A') == 0) Py_RETURN_TRUE;
  if (s->buffers == nullptr && (s->buffers = PyList_New(0)) == nullptr) return nullptr;
  return PyList_Append(s->buffers, buffer) != 0 ? nullptr : Py_NewRef(Py_False);
}

PyObject* sink_write(PyObject* self, PyObject* data) noexcept {
  auto* s = reinterpret_cast<Sink*>(self);
  // The pickler reuses nothing it hands out as bytes; anything else (a memoryview of the caller's buffer) is copied now.
  PyObject* piece = PyBytes_CheckExact(data) ? Py_NewRef(data) : PyBytes_FromObject(data);
  if (piece == nullptr) return nullptr;
  const Py_ssize_t n = PyBytes_GET_SIZE(piece);
  if (s->first == nullptr) {
    s->first = piece;
    return PyLong_FromSsize_t(n);
  }
  if (s->others == nullptr) s->others = PyList_New(0);
  const int failed = s->others == nullptr ? -1 : PyList_Append(s->others, piece);
  Py_DECREF(piece);
  return failed != 0 ? nullptr : PyLong_FromSsize_t(n);
}

PyMethodDef sink_methods[] = {
    {"write", sink_write, METH_O, nullptr}, {"buffer", sink_buffer, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};

void sink_dealloc(PyObject* self) noexcept {
  auto* s = reinterpret_cast<Sink*>(self);
  Py_XDECREF(s->first);
  Py_XDECREF(s->others);
  Py_XDECREF(s->buffers);
  PyObject_Free(self);
}

PyTypeObject make_sink_type() noexcept {
  PyTypeObject t{};
  t.ob_base.ob_base.ob_refcnt = 1;
  t.tp_name = "procession._native._Sink";
  t.tp_basicsize = sizeof(Sink);
  t.tp_dealloc = sink_dealloc;
  t.tp_methods = sink_methods;
  t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  return t;
}
PyTypeObject sink_type = make_sink_type();

struct Names {
  PyObject *pickler_type, *loads, *copyreg_table, *extra_reducers, *reduce, *reduce_ex, *protocol;
};
Names names{};

/// What the pickler asks for a type's reducer: multiprocessing's table, then copyreg's, as they are at that moment (torch
/// and others register, and replace, while the program runs).
PyObject* reducer_of(PyObject*, PyObject* type) noexcept {
  for (PyObject* table : {names.extra_reducers, names.copyreg_table}) {
    PyObject* found = PyDict_GetItemWithError(table, type);
    if (found != nullptr) return Py_NewRef(found);
    if (PyErr_Occurred()) return nullptr;
  }
  // A miss would be a KeyError made and dropped for every instance, some 150 ns; what the pickler does after it is to call
  // __reduce_ex__, except for classes.
  if (PyType_Check(type) && !PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(type), &PyType_Type))
    return Py_NewRef(names.reduce);
  PyErr_SetObject(PyExc_KeyError, type);
  return nullptr;
}

PyObject* reduce(PyObject*, PyObject* value) noexcept {
  return PyObject_CallMethodObjArgs(value, names.reduce_ex, names.protocol, nullptr);
}
PyMethodDef reduce_method = {"_reduce", reduce, METH_O, nullptr};

PyMappingMethods reducers_mapping{nullptr, reducer_of, nullptr};

PyTypeObject make_reducers_type() noexcept {
  PyTypeObject t{};
  t.ob_base.ob_base.ob_refcnt = 1;
  t.tp_name = "procession._native._Reducers";
  t.tp_basicsize = sizeof(PyObject);
  t.tp_dealloc = [](PyObject* self) { PyObject_Free(self); };
  t.tp_as_mapping = &reducers_mapping;
  t.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
  return t;
}
PyTypeObject reducers_type = make_reducers_type();

/// A pickler with its file and table. One is kept; a nested dump (a reducer that puts into a queue) makes another.
struct Pickler {
  PyObject* pickler = nullptr;
  PyObject* dump = nullptr;
  PyObject* clear_memo = nullptr;
  PyObject* sink = nullptr;

  void destroy() noexcept {
    Py_CLEAR(pickler);
    Py_CLEAR(dump);
    Py_CLEAR(clear_memo);
    Py_CLEAR(sink);
  }
};
Pickler spare;

PyObject* import_from(const char* module, const char* name) noexcept {
  PyObject* m = PyImport_ImportModule(module);
  PyObject* r = m == nullptr ? nullptr : PyObject_GetAttrString(m, name);
  Py_XDECREF(m);
  return r;
}

bool find_names() noexcept {
  if (names.extra_reducers != nullptr) return true;
  if (PyType_Ready(&sink_type) != 0 || PyType_Ready(&reducers_type) != 0) return false;
  names.pickler_type = import_from("_pickle", "Pickler");
  names.copyreg_table = import_from("copyreg", "dispatch_table");
  // Where there are connections, their module has registered its reducers; 5 ms to import it for nothing.
  PyObject* forking = import_from("multiprocessing.reduction", "ForkingPickler");
  PyObject* extra = forking == nullptr ? nullptr : PyObject_GetAttrString(forking, "_extra_reducers");
  Py_XDECREF(forking);
  names.reduce = PyCFunction_New(&reduce_method, nullptr);
  names.reduce_ex = PyUnicode_InternFromString("__reduce_ex__");
  PyObject* protocol = import_from("pickle", "HIGHEST_PROTOCOL");
  names.protocol = protocol;
  if (names.reduce == nullptr || names.reduce_ex == nullptr || protocol == nullptr) return false;
  if (names.pickler_type == nullptr || names.copyreg_table == nullptr || extra == nullptr) return false;
  names.extra_reducers = extra;
  return true;
}

bool make_pickler(Pickler& p) noexcept {
  p.sink = reinterpret_cast<PyObject*>(PyObject_New(Sink, &sink_type));
  if (p.sink == nullptr) return false;
  auto* s = reinterpret_cast<Sink*>(p.sink);
  s->first = s->others = s->buffers = nullptr;
  PyObject* callback = PyObject_GetAttrString(p.sink, "buffer");
  p.pickler =
      callback == nullptr ? nullptr : PyObject_CallFunction(names.pickler_type, "OiOO", p.sink, -1, Py_True, callback);
  Py_XDECREF(callback);
  PyObject* table = p.pickler == nullptr ? nullptr : PyObject_New(PyObject, &reducers_type);
  const bool ok = table != nullptr && PyObject_SetAttrString(p.pickler, "dispatch_table", table) == 0 &&
                  (p.dump = PyObject_GetAttrString(p.pickler, "dump")) != nullptr &&
                  (p.clear_memo = PyObject_GetAttrString(p.pickler, "clear_memo")) != nullptr;
  Py_XDECREF(table);
  return ok;
}

/// Bytes of `value`, a new reference; nullptr with the pickler's exception. `*buffers` is what is not in it, or nullptr.
PyObject* plain_pickle(PyObject* value, PyObject** buffers) noexcept {
  if (!find_names()) return nullptr;
  Pickler p = spare;
  spare = Pickler{};
  if (p.pickler == nullptr && !make_pickler(p)) {
    p.destroy();
    return nullptr;
  }
  PyObject* r = PyObject_CallOneArg(p.dump, value);
  auto* s = reinterpret_cast<Sink*>(p.sink);
  PyObject* bytes = nullptr;
  if (r != nullptr) {
    Py_DECREF(r);
    r = PyObject_CallNoArgs(p.clear_memo);
    Py_XDECREF(r);
    bytes = std::exchange(s->first, nullptr);
    if (bytes != nullptr && s->others != nullptr) {
      PyObject* empty = PyBytes_FromStringAndSize("", 0);
      PyList_Insert(s->others, 0, bytes);
      Py_SETREF(bytes, empty == nullptr ? nullptr : PyObject_CallMethod(empty, "join", "O", s->others));
      Py_XDECREF(empty);
    }
    Py_CLEAR(s->others);
    *buffers = std::exchange(s->buffers, nullptr);
  }
  if (bytes == nullptr || spare.pickler != nullptr) {
    p.destroy();  // after an error its state is not to be trusted
  } else {
    spare = p;
  }
  return bytes;
}

}  // namespace

void set_main_by_value(bool on) noexcept { main_by_value = on; }

void set_payload_class(PyObject* type) noexcept { Py_XSETREF(payload_type, Py_NewRef(type)); }

PyObject* pickle_beside(PyObject* value) noexcept {
  PyObject* buffers = nullptr;
  PyObject* data = plain_pickle(value, &buffers);
  if (data == nullptr || buffers == nullptr) return data;
  return Py_BuildValue("(NN)", data, buffers);
}

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
  PyObject* plain = plain_pickle(value, &buffers);
  // Spawned children cannot import this __main__: what is named there goes by value. A false alarm only costs time.
  const bool names_main =
      plain != nullptr && main_by_value &&
      memmem(PyBytes_AS_STRING(plain), static_cast<size_t>(PyBytes_GET_SIZE(plain)), "__main__", 8) != nullptr;
  bool ok = plain != nullptr && !names_main;
  if (ok && buffers == nullptr) {
    ok = hold(plain, Coding::kPickle);
  } else if (ok) {
    // They lie beside it: what is sent is both, in the form that procession._wire.payload gives them.
    PyObject* seal = import_from("procession._wire.payload", "seal");
    PyObject* payload = seal == nullptr ? nullptr : PyObject_CallFunctionObjArgs(seal, plain, buffers, nullptr);
    Py_XDECREF(seal);
    Py_DECREF(plain);
    ok = payload != nullptr && hold_payload(payload);
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

/// Takes over the reference.
bool Encoded::hold_payload(PyObject* payload) noexcept {
  CompactWriter w(*this);
  if (w.write_all(payload)) {
    Py_DECREF(payload);
    coding_ = Coding::kPayload;
    data_ = buffer_;
    len_ = w.size();
    return true;
  }
  PyObject* none = nullptr;
  PyObject* bytes = plain_pickle(payload, &none);
  Py_XDECREF(none);
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

bool Encoded::encode(PyObject* value) noexcept {
  if (PyBytes_CheckExact(value)) return hold(Py_NewRef(value), Coding::kBytes);
  CompactWriter w(*this);
  if (w.write_all(value)) {
    coding_ = Coding::kCompact;
    data_ = buffer_;
    len_ = w.size();
    return true;
  }
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
      if (names.loads == nullptr && (names.loads = import_from("_pickle", "loads")) == nullptr) return nullptr;
      PyObject* bytes =
          whole != nullptr ? Py_NewRef(whole) : PyBytes_FromStringAndSize(p, static_cast<Py_ssize_t>(len));
      PyObject* r = bytes == nullptr ? nullptr : PyObject_CallOneArg(names.loads, bytes);
      Py_XDECREF(bytes);
      return r;
    }
    case Coding::kPayload: {
      const Coding form = len != 0 && *p == 'P' ? Coding::kCompact : Coding::kPickle;
      PyObject* payload = decode(static_cast<u8>(form), data, len, whole);
      PyObject* r = payload == nullptr ? nullptr : PyObject_CallMethod(payload, "load", nullptr);
      Py_XDECREF(payload);
      return r;
    }
  }
  PyErr_SetString(PyExc_SystemError, "procession: a message of an unknown kind; this is a bug, please report it");
  return nullptr;
}

}  // namespace procession::bind
