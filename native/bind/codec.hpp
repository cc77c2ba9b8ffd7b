// Values to bytes and back: plain types in a compact form of our own, everything else by pickle.
#pragma once

#include "handle.hpp"

namespace procession::bind {

/// What a message's bytes are. Part of the arena's layout.
enum class Coding : u8 { kPickle = 0, kBytes = 1, kCompact = 2, kText = 3, kPayload = 4 };

/// One value ready to be put. `data` points into `buffer`, or into the object that `keep` holds.
class Encoded {
 public:
  Encoded() = default;
  Encoded(const Encoded&) = delete;
  Encoded& operator=(const Encoded&) = delete;
  ~Encoded() {
    Py_XDECREF(keep_);
    Py_XDECREF(handles_);
  }

  /// False with an exception set.
  bool encode(PyObject* value) noexcept;
  /// Whether `data` lies in this object, and goes with it.
  bool is_inside() const noexcept { return data_ == buffer_; }
  /// What keeps `data` alive otherwise: a new reference.
  PyObject* keeper() const noexcept { return Py_NewRef(keep_); }
  /// The handles in it, a list, whose objects must be kept until the message has been read; nullptr if there are none.
  PyObject* handles() const noexcept { return handles_; }
  Outgoing outgoing() const noexcept { return {static_cast<u8>(coding_), data_, static_cast<u32>(len_)}; }

 private:
  friend class CompactWriter;
  /// Larger values cost more to pickle than pickle's start-up, and fit no stack.
  static constexpr u32 kCompactMax = 1024;
  bool hold_handle(PyObject* handle) noexcept;
  bool pickle(PyObject* value) noexcept;
  bool hold_with(PyObject* data, PyObject* buffers) noexcept;
  bool hold_payload(PyObject* payload) noexcept;
  bool hold_pickled(PyObject* payload) noexcept;
  bool pickle_by_value(PyObject* value) noexcept;
  bool hold(PyObject* bytes, Coding coding) noexcept;
  friend u32 load(Encoded& e, View* v, u32 parent) noexcept;

  Coding coding_ = Coding::kCompact;
  const void* data_ = nullptr;
  u64 len_ = 0;
  PyObject* keep_ = nullptr;
  PyObject* handles_ = nullptr;
  char buffer_[kCompactMax];
};

/// The value that `data` stands for; `whole` may be the bytes object that `data` is all of (it is not copied then).
PyObject* decode(u8 coding, const void* data, u64 len, PyObject* whole) noexcept;

/// Put the handles into a cargo for a message of the queue `parent`, and let go of them here: the receiver finds itself the only
/// holder of what is sent away. Its block; 0 if there are none, or with an exception set.
u32 load(Encoded& e, View* v, u32 parent) noexcept;

/// The copy of a number, text, bytes or None runs nobody's code.
bool is_plain(PyObject* v) noexcept;

/// A pickle (or what _pack() makes), and what lies beside it: see its docstring.
struct Payload {
  PyObject ob_base;
  PyObject* data;     ///< bytes
  PyObject* buffers;  ///< a list of (segment, offset, length); nullptr when it has been given away
  PyObject* handles;  ///< a sequence; nullptr when there are none
  bool lasting;
};
bool is_payload(PyObject* v) noexcept;
/// A new reference.
PyObject* make_payload(PyObject* data, PyObject* buffers) noexcept;
/// It is on its way.
void payload_given(PyObject* payload) noexcept;

/// One of a payload's buffers; the segment is borrowed.
struct Part {
  SegmentObject* segment;
  u64 offset, length;
};
/// False with an exception set.
bool parse_part(PyObject* part, Part* into) noexcept;

/// The value that bytes, a pickle or what _pack() makes, stand for, with a payload's buffers; nullptr if there are none.
PyObject* unpack(PyObject* data, PyObject* buffers) noexcept;

/// When true, what pickle would name in __main__ travels by value: spawned children cannot import it (a notebook, -c).
void set_main_by_value(bool on) noexcept;

}  // namespace procession::bind
