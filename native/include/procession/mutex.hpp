// The internal mutex: short critical sections of the core itself, taken over when the holder dies.
#pragma once

#include "slots.hpp"
#include "wait.hpp"

namespace procession {

enum class Locked : u8 {
  kNo,  ///< interrupted, or the way out of the wait was taken
  kYes,
  kRecovered,  ///< held now, and the former holder died inside: repair what the mutex protects
};

/// One word: 0 | waiters bit | tag of the holder.
///
/// Source: Ulrich Drepper, "Futexes Are Tricky" (mutex 2), with the holder's tag in place of 1 and 2.
/// A holder that is killed leaves its tag; whoever waits finds out at the end of a slice and swaps the tag for its own.
/// I6: under a Mutex no Python runs, nothing blocks, nothing is allocated outside the arena.
class Mutex {
 public:
  Locked lock(Slot* slots, Tag me, const Waiter& waiter) noexcept {
    u32 w = 0;
    if (word_.compare_exchange_strong(w, me, std::memory_order_acquire, std::memory_order_relaxed)) return Locked::kYes;
    return lock_slow(slots, me, waiter);
  }

  void unlock() noexcept {
    if (word_.exchange(0, std::memory_order_seq_cst) & kWaiters) futex_wake(word_, 1);
  }

  Tag holder() const noexcept { return word_.load(std::memory_order_acquire) & kTagMask; }

 private:
  Locked lock_slow(Slot* slots, Tag me, const Waiter& waiter) noexcept {
    // Critical sections take some 20 ns, long copies apart: a holder that keeps running is gone within a microsecond.
    const bool took = spin_for(2'000, [&] {
      u32 w = word_.load(std::memory_order_relaxed);
      return (w & kTagMask) == 0 && word_.compare_exchange_strong(w, me | w, std::memory_order_acquire);
    });
    if (took) return Locked::kYes;
    if (waiter.is_hurried()) {
      u32 w = word_.load(std::memory_order_relaxed);
      if ((w & kTagMask) == 0) {
        return word_.compare_exchange_strong(w, me | w, std::memory_order_acquire) ? Locked::kYes : Locked::kNo;
      }
      const bool gone = (w & kTagMask) != me && left_for_good(slots, w & kTagMask, true);
      return gone && word_.compare_exchange_strong(w, me | kWaiters, std::memory_order_acquire) ? Locked::kRecovered
                                                                                                : Locked::kNo;
    }
    // A call with a deadline may be late by this much when a holder was stopped (SIGSTOP) inside; without a deadline
    // there is the holder's return, its death, or a signal.
    const i64 deadline =
        waiter.deadline() == kForever ? kForever : std::max(waiter.deadline(), now_ns() + 1'000 * kMillisecond);
    for (;;) {
      u32 w = word_.load(std::memory_order_relaxed);
      if ((w & kTagMask) == 0) {
        // Others may sleep too: keep the bit until an unlock finds nobody.
        if (word_.compare_exchange_strong(w, me | kWaiters, std::memory_order_acquire)) return Locked::kYes;
        continue;
      }
      if (!(w & kWaiters) && !word_.compare_exchange_strong(w, w | kWaiters)) continue;
      w |= kWaiters;
      const Wait r = waiter.sleep(word_, w, kLockSlice, deadline);
      if (r == Wait::kInterrupted || r == Wait::kTimeout) return Locked::kNo;
      if (word_.load(std::memory_order_relaxed) == w && left_for_good(slots, w & kTagMask, true) &&
          word_.compare_exchange_strong(w, me | kWaiters, std::memory_order_acquire)) {
        return Locked::kRecovered;
      }
    }
  }

  Atomic<u32> word_;
};

/// Threads announce that they sleep; publishers look, and pay for a wake-up only then.
///
/// Word: bit 0 = somebody may sleep, the rest counts sleeps and wakes.
///   sleeper:   key = prepare(); look again at what is awaited; sleep(key)
///   publisher: publish; full barrier; notify()
/// A sleeper changes the word (+2) even when the bit is set, so that a publisher's "nobody woke, clear the bit" fails
/// when a sleeper came in between. A publisher clears the bit only when the kernel found nobody. Clearing before the wake
/// loses wake-ups with two publishers, and a count of sleepers drifts when one is killed: see docs/crash-safety.md and the
/// model in native/tests/model.
class EventCount {
 public:
  u32 prepare() noexcept {
    u32 w = word_.load(std::memory_order_relaxed);
    while (!word_.compare_exchange_weak(w, (w + 2) | 1, std::memory_order_seq_cst)) {}
    fence_after_rmw();  // the look at what is awaited comes after
    return (w + 2) | 1;
  }

  Wait sleep(u32 key, const Waiter& waiter, i64 slice) noexcept {
    return waiter.sleep(word_, key, slice, waiter.deadline());
  }

  /// After a publication and a full barrier.
  void notify(int n) noexcept {
    if (word_.load(std::memory_order_seq_cst) & 1) wake(n);
  }

  bool has_sleepers() const noexcept { return word_.load(std::memory_order_relaxed) & 1; }

 private:
  void wake(int n) noexcept {
    const u32 w = word_.fetch_add(2, std::memory_order_seq_cst) + 2;
    if (futex_wake(word_, n) == 0) {
      u32 seen = w;
      word_.compare_exchange_strong(seen, w & ~1u, std::memory_order_seq_cst);
    }
  }

  Atomic<u32> word_;
};

}  // namespace procession
