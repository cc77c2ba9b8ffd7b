// Lock and RLock: one word that names the holder.
#pragma once

#include "arena.hpp"

namespace procession {

enum class Acquired : u8 { kNo, kYes, kOwnerDied, kInterrupted };

/// word: 0 | waiters bit | tag of the process that acquired it. Any process may release (as with a POSIX semaphore).
///
/// Barging: whoever comes first after a release gets it. A process that ended by its bootstrap keeps its locks (hand-over
/// to a process that will release is legal); one that was killed loses them to the next acquirer, which is told so.
struct UserLock {
  Object object;
  Atomic<u32> word;
  u32 count;             ///< RLock: depth, written by the holder only
  Atomic<u64> thread;    ///< RLock: thread of the holder
  Atomic<i32> died_pid;  ///< who died holding it: for the message, valid while the word is kOrphaned
  Atomic<i32> died_exit;
  Atomic<u32> died_exit_known;
  char died_name[36];
};
static_assert(sizeof(UserLock) <= 128);

class LockOps {
 public:
  LockOps(Arena& arena, Tag me) noexcept : arena_(arena), me_(me) {}

  bool try_acquire(UserLock& l) const noexcept {
    u32 w = 0;
    return l.word.compare_exchange_strong(w, me_, std::memory_order_acquire, std::memory_order_relaxed);
  }

  /// `died`: tag of the holder that died, when the result is kOwnerDied.
  Acquired acquire(UserLock& l, const Waiter& waiter, Tag* died) const noexcept {
    if (try_acquire(l)) return Acquired::kYes;
    if (waiter.may_wait() &&
        spin_for(kSpin, [&] { return l.word.load(std::memory_order_relaxed) == 0 && try_acquire(l); })) {
      return Acquired::kYes;
    }
    for (bool first = true;; first = false) {
      u32 w = l.word.load(std::memory_order_relaxed);
      const Tag owner = w & kTagMask;
      if (owner == 0) {
        if (l.word.compare_exchange_strong(w, me_ | kWaiters, std::memory_order_acquire)) return Acquired::kYes;
        continue;
      }
      const bool ask = waiter.may_wait() ? !first : arena_.may_ask_kernel();
      if (arena_.fate(owner, ask) == Owner::kDied) {
        if (l.word.compare_exchange_strong(w, me_ | kWaiters, std::memory_order_acquire)) {
          *died = owner;
          return Acquired::kOwnerDied;
        }
        continue;
      }
      if (!waiter.may_wait()) return Acquired::kNo;
      if (!(w & kWaiters) && !l.word.compare_exchange_strong(w, w | kWaiters)) continue;
      switch (waiter.sleep(l.word, w | kWaiters, kLockSlice, waiter.deadline())) {
        case Wait::kTimeout: return Acquired::kNo;
        case Wait::kInterrupted: return Acquired::kInterrupted;
        case Wait::kReady: break;
      }
    }
  }

  /// False when it was not held.
  bool release(UserLock& l) const noexcept {
    u32 w = l.word.load(std::memory_order_relaxed);
    do {
      if ((w & kTagMask) == 0) return false;
    } while (!l.word.compare_exchange_weak(w, 0, std::memory_order_seq_cst));
    if (w & kWaiters) futex_wake(l.word, 1);
    return true;
  }

  bool held_by_me(const UserLock& l) const noexcept {
    return (l.word.load(std::memory_order_relaxed) & kTagMask) == me_;
  }

 private:
  /// A holder that runs is mostly gone within this; measured: 4 us of spinning is what a futex sleep and wake cost.
  static constexpr i64 kSpin = 4'000;
  Arena& arena_;
  Tag me_;
};

/// collect(): the holder died and its slot is about to be used again: keep what the message needs, and mark the lock.
inline void orphan_lock(UserLock& l, const Slot& s, Tag dead) noexcept {
  u32 w = l.word.load(std::memory_order_relaxed);
  if ((w & kTagMask) != dead) return;
  l.died_pid.store(s.pid.load(std::memory_order_relaxed), std::memory_order_relaxed);
  l.died_exit.store(s.exit_code.load(std::memory_order_relaxed), std::memory_order_relaxed);
  l.died_exit_known.store(s.exit_known.load(std::memory_order_relaxed), std::memory_order_relaxed);
  std::memcpy(l.died_name, s.name, sizeof l.died_name - 1);
  while ((w & kTagMask) == dead && !l.word.compare_exchange_weak(w, (w & kWaiters) | kOrphaned)) {}
}

}  // namespace procession
