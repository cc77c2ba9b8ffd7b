// Pickles as multiprocessing makes them, large buffers left out.
#pragma once

#include "handle.hpp"

namespace procession::bind {

/// Shorter buffers are copied into the message: a segment costs a page, a mapping and some 5 us.
constexpr Py_ssize_t kLeastOutside = 64 << 10;

/// `value` as ForkingPickler.dumps pickles it; nullptr with the pickler's exception. Contiguous buffers (protocol 5) of `least`
/// bytes and more are left out: they come as a list in `*buffers`, which is nullptr when there are none.
PyObject* pickle(PyObject* value, Py_ssize_t least, PyObject** buffers) noexcept;

/// pickle.loads(data, buffers=buffers), the latter unless nullptr.
PyObject* unpickle(PyObject* data, PyObject* buffers) noexcept;

/// A new reference; nullptr with an exception set.
PyObject* import_from(const char* module, const char* name) noexcept;

/// A list of ints with 64 bits at most, or of floats, as bytes; nullptr, with or without an exception, for any other.
PyObject* pack_numbers(PyObject* list) noexcept;
/// Whether bytes that begin so are from there: no pickle does.
bool is_numbers(char letter) noexcept;
PyObject* unpack_numbers(const char* data, Py_ssize_t length) noexcept;

// NumPy arrays, without NumPy's own detour: array.cpp.

constexpr int kMostDimensions = 8;

/// What an array is, beside its elements.
struct ArrayForm {
  char letter;  ///< of the elements' type, see array.cpp
  bool fortran;
  u8 dimensions;
  i64 shape[kMostDimensions];
};

/// How a pickle has an array: as a call of a function of this extension, which takes a quarter of the time that NumPy's own
/// takes. The reducer, borrowed; nullptr (no exception) when `type` is not numpy.ndarray.
PyObject* array_reducer(PyObject* type) noexcept;
/// Whether somebody has registered another reducer for it.
bool has_reducer(PyObject* type) noexcept;
/// True when the object is an array that the form can tell all of; then `view` is to be released. No exception.
bool describe_array(PyObject* v, ArrayForm* form, Py_buffer* view) noexcept;
/// An array that uses `buffer` in place; with its own memory, not set yet, when that is nullptr.
PyObject* make_array(const ArrayForm& form, PyObject* buffer) noexcept;
/// The same, with a copy of `n` bytes.
PyObject* copy_array(const ArrayForm& form, const char* data, u64 n) noexcept;

}  // namespace procession::bind
