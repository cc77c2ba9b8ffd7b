// What the core needs of the operating system. Linux only; a port to another system starts and ends here.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace procession {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

template <class T>
using Atomic = std::atomic<T>;
static_assert(Atomic<u32>::is_always_lock_free && Atomic<u64>::is_always_lock_free);

/// Memory order of the stores that publish. The test of the tests weakens it, and ThreadSanitizer must object.
#ifdef PROCESSION_SEED_BUG_RELAXED_PUBLISH
constexpr auto kPublish = std::memory_order_relaxed;
#else
constexpr auto kPublish = std::memory_order_release;
#endif

constexpr i64 kForever = INT64_MAX;
constexpr i64 kMillisecond = 1'000'000;

/// Monotonic time in ns; the only clock the core reads, so that a step of the wall clock moves no deadline.
inline i64 now_ns() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return i64{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

inline void cpu_pause() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

constexpr u64 kHugePage = 2 << 20;

/// Four pages at a time, each a stream for the memory's controller, past the caches: no line of the target is fetched before it is
/// overwritten, and no other thrown out for it. `to`: aligned to 16 bytes.
inline void copy_in_streams(char* to, const char* from, u64 n) noexcept {
  u64 done = 0;
#if defined(__SSE2__)
  constexpr u64 kStreams = 4, kStream = 4096, kLine = 64;
  for (; n - done >= kStreams * kStream; done += kStreams * kStream) {
    for (u64 line = 0; line < kStream; line += kLine) {
      for (u64 stream = 0; stream < kStreams; ++stream) {
        const u64 at = done + stream * kStream + line;
        const auto* f = reinterpret_cast<const __m128i*>(from + at);
        auto* t = reinterpret_cast<__m128i*>(to + at);
        const __m128i a = _mm_loadu_si128(f), b = _mm_loadu_si128(f + 1);
        const __m128i c = _mm_loadu_si128(f + 2), d = _mm_loadu_si128(f + 3);
        _mm_stream_si128(t, a);
        _mm_stream_si128(t + 1, b);
        _mm_stream_si128(t + 2, c);
        _mm_stream_si128(t + 3, d);
      }
    }
  }
  _mm_sfence();  // these stores heed no release
#endif
  std::memcpy(to + done, from + done, n - done);
}

/// memcpy for what is large, where glibc (2.36) knows less of the machine. It uses `rep movsb` on Intel, which is no good there beyond
/// the caches, and not on AMD, where it is; and it believes in the sum of all caches of the package, 400 MB and more.
///
/// GB/s from one core to huge pages, 64 MB: Sapphire Rapids memcpy 6, streams 12; EPYC (Zen 4, L3 32 MB) memcpy 19, streams 14, `rep
/// movsb` 26. `to`: aligned to 16 bytes.
inline void copy_large(char* to, const char* from, u64 n) noexcept {
#if defined(__x86_64__)
  constexpr u64 kMovsb = 32 << 20, kStreams = 48 << 20;
  static const bool movsb = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kFastShortRepMov = 1 << 4;
    return __builtin_cpu_is("amd") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kFastShortRepMov) != 0;
  }();
  if (movsb && n >= kMovsb) {
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return;
  }
  if (!movsb && n >= kStreams) return copy_in_streams(to, from, n);
#endif
  std::memcpy(to, from, n);
}

/// A full barrier for "publish, then look for sleepers", right after a sequentially consistent read-modify-write.
/// On x86 that instruction is itself a full barrier; elsewhere the fence is real.
inline void fence_after_rmw() noexcept {
#if defined(__x86_64__)
  std::atomic_signal_fence(std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

/// Sleep while `word == seen`, for at most `ns` (kForever: no limit). Returns 0 when woken or the word differs, else errno.
/// The futex is a shared one (never FUTEX_PRIVATE_FLAG): its key is the page of the memfd, the same in every process.
inline int futex_wait(Atomic<u32>& word, u32 seen, i64 ns) noexcept {
  timespec t{static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
  const long r = syscall(SYS_futex, &word, FUTEX_WAIT, seen, ns == kForever ? nullptr : &t, nullptr, 0);
  return r == 0 || errno == EAGAIN ? 0 : errno;
}

/// Wake up to `n` sleepers; returns how many there were.
inline int futex_wake(Atomic<u32>& word, int n) noexcept {
  const long r = syscall(SYS_futex, &word, FUTEX_WAKE, n, nullptr, nullptr, 0);
  return r < 0 ? 0 : static_cast<int>(r);
}

/// What /proc/<pid>/stat says of a process; `found` is false where it cannot be read.
struct ProcStat {
  bool found = false;
  char state = '?';
  long threads = 0;
  u64 start_ticks = 0;  ///< field 22, since boot: with the pid it names one process for good
  u64 start_stack = 0;  ///< field 28: changes at exec (address space randomisation), not at fork; 0 without permission
  int exit_code = 0;    ///< field 52, as of waitpid; readable for a zombie of our own user
};

inline ProcStat read_proc_stat(pid_t pid) noexcept {
  ProcStat s;
  char path[40];
  std::snprintf(path, sizeof path, "/proc/%d/stat", static_cast<int>(pid));
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return s;
  char text[1024];
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  if (n <= 0) return s;
  text[n] = '\0';
  const char* p = std::strrchr(text, ')');  // the name may hold spaces and parentheses
  if (p == nullptr || p[1] == '\0') return s;
  p += 2;
  s.state = *p;
  for (int field = 3; *p != '\0'; ++field) {
    if (field == 20) s.threads = std::strtol(p, nullptr, 10);
    if (field == 22) s.start_ticks = std::strtoull(p, nullptr, 10);
    if (field == 28) s.start_stack = std::strtoull(p, nullptr, 10);
    if (field == 52) s.exit_code = std::atoi(p);
    while (*p != '\0' && *p != ' ') ++p;
    while (*p == ' ') ++p;
  }
  s.found = true;
  return s;
}

/// True only when the process is gone for certain: unknown counts as alive, for robbing the living is worse than waiting.
/// A zombie is dead (it holds nothing and will not run), unless other threads of it still run.
inline bool process_is_gone(pid_t pid, u64 start_ticks, u64 start_stack) noexcept {
  if (kill(pid, 0) != 0 && errno == ESRCH) return true;
  const ProcStat s = read_proc_stat(pid);
  if (!s.found) return false;
  if (start_ticks != 0 && s.start_ticks != start_ticks) return true;                      // the pid was reused
  if (start_stack > 1 && s.start_stack > 1 && s.start_stack != start_stack) return true;  // it has called exec
  return (s.state == 'Z' || s.state == 'X' || s.state == 'x') && s.threads <= 1;
}

inline u64 pid_namespace() noexcept {
  struct stat st;
  return stat("/proc/self/ns/pid", &st) == 0 ? static_cast<u64>(st.st_ino) : 0;
}

/// The one that children will be in: another after unshare(CLONE_NEWPID). Nobody's where it cannot be known (it has no
/// process yet, or Linux is older than 4.12).
inline u64 pid_namespace_of_children() noexcept {
  struct stat st;
  return stat("/proc/self/ns/pid_for_children", &st) == 0 ? static_cast<u64>(st.st_ino) : UINT64_MAX;
}

#ifdef PROCESSION_CRASH_POINTS
/// Test builds: a named place at which a test can kill or stop the process (native/tests, tests/crash).
void crash_point(const char* name) noexcept;
#define CRASH_POINT(name) ::procession::crash_point(name)
#else
#define CRASH_POINT(name) ((void)0)
#endif

}  // namespace procession
