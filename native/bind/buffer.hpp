// A growing array of plain values that says so when memory runs out: the extension is built without C++ exceptions, since the
// interpreter ends daemon threads by unwinding through our frames.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace procession::bind {

template <class T>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  /// False: no memory; what was there stays.
  bool reserve(size_t n) noexcept {
    if (n <= capacity_) return true;
    const size_t capacity = n < 2 * capacity_ ? 2 * capacity_ : n;
    void* p = std::realloc(static_cast<void*>(data_), capacity * sizeof(T));
    if (p == nullptr) return false;
    data_ = static_cast<T*>(p);
    capacity_ = capacity;
    return true;
  }

  bool append(const T* from, size_t n) noexcept {
    if (!reserve(size_ + n)) return false;
    std::memcpy(static_cast<void*>(data_ + size_), from, n * sizeof(T));
    size_ += n;
    return true;
  }
  bool push(const T& value) noexcept { return append(&value, 1); }

  T* data() noexcept { return data_; }
  T& operator[](size_t i) noexcept { return data_[i]; }
  T& back() noexcept { return data_[size_ - 1]; }
  T* begin() noexcept { return data_; }
  T* end() noexcept { return data_ + size_; }
  size_t size() const noexcept { return size_; }
  size_t capacity() const noexcept { return capacity_; }
  bool empty() const noexcept { return size_ == 0; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
  size_t capacity_ = 0;
};

}  // namespace procession::bind
