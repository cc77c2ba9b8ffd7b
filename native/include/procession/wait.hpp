// How a thread of the family waits: spin a little, yield while that is cheap, then sleep in bounded slices.
#pragma once

#include <algorithm>

#include "platform.hpp"

namespace procession {

enum class Wait : u8 { kReady, kTimeout, kInterrupted };

/// Policy and way out of one blocking call.
///
/// Every sleep is a slice: a wake-up may have gone to a process that died before it acted, and a signal may have been
/// taken by another thread, so the sleeper looks for itself now and then. `hooks` is how the core, which knows no Python,
/// lets its caller give up the GIL before the first sleep and look for signals after each.
class Waiter {
 public:
  struct Hooks {
    void (*before_sleep)(void*) = nullptr;  ///< called before anything that may take long; idempotent
    bool (*interrupted)(void*) = nullptr;   ///< called when a sleep ended early or at its slice; true: give up
    bool (*gave_up)(void*) = nullptr;       ///< whether `interrupted` has said so before in this call
    void* self = nullptr;
  };

  Waiter() = default;
  Waiter(i64 deadline, Hooks hooks) noexcept : deadline_(deadline), hooks_(hooks) {}

  i64 deadline() const noexcept { return deadline_; }
  bool may_wait() const noexcept { return deadline_ != 0; }

  bool is_hurried() const noexcept { return deadline_ == kHurried; }

  /// For collect(), which walks over everybody's objects: it takes what is free or a dead process's, and waits for nobody.
  static Waiter hurried() noexcept { return Waiter(kHurried, {}); }
  void before_sleep() const noexcept {
    if (hooks_.before_sleep != nullptr) hooks_.before_sleep(hooks_.self);
  }

  /// The same wait without the look for signals: for what is done under an internal mutex (I6: no Python runs there; a
  /// signal handler that uses the same object would wait for its own process).
  Waiter undisturbed() const noexcept {
    Waiter w = *this;
    w.hooks_.interrupted = nullptr;
    w.hooks_.gave_up = nullptr;
    return w;
  }

  /// Neither signals nor a deadline: for what has to be finished. Still gives up the GIL, which the one waited for may need.
  Waiter steady() const noexcept {
    Waiter w = undisturbed();
    w.deadline_ = kForever;
    return w;
  }

  /// Sleep on `word == seen` until woken, the end of a slice, the deadline or a signal.
  /// kReady means: look again (woken, or the slice has ended).
  Wait sleep(Atomic<u32>& word, u32 seen, i64 slice, i64 deadline) const noexcept {
    i64 ns = slices_enabled() ? slice : kForever;
    if (deadline != kForever) {
      const i64 left = deadline - now_ns();
      if (left <= 0) return Wait::kTimeout;
      ns = std::min(ns, left);
    }
    // A signal that ended one of this call's earlier waits ends this one too: it must not be swallowed on the way.
    if (hooks_.gave_up != nullptr && hooks_.gave_up(hooks_.self)) return Wait::kInterrupted;
    before_sleep();
    const int error = futex_wait(word, seen, ns);
    if (error != 0 && hooks_.interrupted != nullptr && hooks_.interrupted(hooks_.self)) return Wait::kInterrupted;
    return Wait::kReady;
  }

  /// Tests switch slices off so that a lost wake-up hangs instead of being masked.
  static bool slices_enabled() noexcept { return slices_flag().load(std::memory_order_relaxed); }
  static Atomic<bool>& slices_flag() noexcept {
    static Atomic<bool> flag{true};
    return flag;
  }

 private:
  static constexpr i64 kHurried = -1;
  i64 deadline_ = kForever;
  Hooks hooks_{};
};

/// Owner-death is noticed at the end of a slice, so this bounds how long survivors stand still.
#ifndef PROCESSION_LOCK_SLICE  // tests that kill thousands of holders have no time for it
#define PROCESSION_LOCK_SLICE (20 * kMillisecond)
#endif
constexpr i64 kLockSlice = PROCESSION_LOCK_SLICE;
/// An idle getter wakes this often at most; measured 5 us a wake-up, so 50 idle processes cost 0.25 % of a CPU.
constexpr i64 kIdleSliceMax = 100 * kMillisecond;

/// Growing slices for waits that no death needs to end: 10, 20, 40, 80, 100, 100 ms.
class IdleSlice {
 public:
  i64 next() noexcept {
    const i64 s = slice_;
    slice_ = std::min(slice_ * 2, kIdleSliceMax);
    return s;
  }

 private:
  i64 slice_ = 10 * kMillisecond;
};

inline bool one_cpu() noexcept {
  static const bool one = sysconf(_SC_NPROCESSORS_ONLN) < 2;
  return one;
}

/// Spin for up to `ns`, then say whether `ready()`. In ns, never in counts: `pause` is 25 ns here and 3 ns elsewhere.
///
/// Spinning pays when the other side runs on another core, and delays it when it waits for ours. Which of the two holds is
/// learned: after kSpinCredit failures in a row, only every 16th call spins, until one succeeds.
template <class Ready>
bool spin_for(i64 ns, Ready&& ready) noexcept {
  constexpr i32 kSpinCredit = 4, kSpinRetry = 16;
  static Atomic<i32> credit{kSpinCredit};
  if (ready()) return true;
  if (one_cpu()) return false;
  const i32 c = credit.load(std::memory_order_relaxed);
  if (c <= 0 && c > -kSpinRetry) {
    credit.store(c - 1, std::memory_order_relaxed);
    return false;
  }
  const i64 end = now_ns() + ns;
  do {
    for (int i = 0; i < 6; ++i) {
      cpu_pause();
      if (ready()) {
        credit.store(kSpinCredit, std::memory_order_relaxed);
        return true;
      }
    }
  } while (now_ns() < end);
  credit.store(c > 0 ? c - 1 : 0, std::memory_order_relaxed);
  return false;
}

/// Give the CPU away while that returns at once (nobody else wants it) for up to `ns`; a slow yield means that another
/// process ran in our place, and then sleeping is cheaper for everybody.
template <class Ready>
bool yield_for(i64 ns, Ready&& ready) noexcept {
  constexpr i64 kSlowYield = 4'000;  // ns; a yield with nobody waiting takes 250-600
  i64 t = now_ns();
  const i64 end = t + ns;
  while (t < end) {
    sched_yield();
    if (ready()) return true;
    const i64 u = now_ns();
    if (u - t > kSlowYield) return false;
    t = u;
  }
  return false;
}

}  // namespace procession
