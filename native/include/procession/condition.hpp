// The waiting half of Condition: a FIFO of waiters, each told by name.
#pragma once

#include "arena.hpp"

namespace procession {

/// Each waiting thread has an entry; its value is seq << 2 | state and is the futex it sleeps on.
///
///   empty (tag 0) --enqueue--> kWaiting --notify--> kNotified --the waiter, once it has the lock--> empty
///                                  \--timeout, signal----------------------> empty
///
/// notify() picks the n lowest seq. A waiter that dies with its notification untaken is found by the next one that looks
/// (a slice, or the next notify), and the notification goes to the next in line: it is never eaten by a corpse.
struct ConditionState {
  Object object;
  Mutex guard;
  u32 seq;
  Roster waiters;
};

class ConditionOps {
 public:
  static constexpr u32 kWaiting = 1, kNotified = 2, kStateMask = 3;

  ConditionOps(Arena& arena, Tag me) noexcept : arena_(arena), me_(me) {}

  /// Join the line; the caller holds the condition's lock. nullptr: interrupted, or the arena is full.
  RosterEntry* enqueue(ConditionState& c, const Waiter& waiter) const noexcept {
    if (!lock(c, waiter)) return nullptr;
    RosterEntry* e = arena_.empty_entry(me_, c.waiters, c.object.block, waiter.undisturbed());
    if (e != nullptr) {
      e->value.store(c.seq++ << 2 | kWaiting, std::memory_order_relaxed);
      e->tag.store(me_, std::memory_order_release);
    }
    c.guard.unlock();
    return e;
  }

  /// Wait to be notified, without the condition's lock. kReady: notified, and still in the line until leave(), so that a
  /// kill before the waiter has the lock again passes the notification on. Otherwise it is out of the line.
  Wait await_notice(ConditionState& c, RosterEntry& e, const Waiter& waiter) const noexcept {
    Wait r = Wait::kReady;
    const u32 waiting = e.value.load(std::memory_order_relaxed);
    if ((waiting & kStateMask) == kWaiting && waiter.may_wait()) {
      spin_for(3'000, [&] { return e.value.load(std::memory_order_acquire) != waiting; });
    }
    for (IdleSlice slice; (e.value.load(std::memory_order_acquire) & kStateMask) == kWaiting;) {
      // On the value that says kWaiting: read anew it might say kNotified by now, and nothing would end that sleep.
      r = waiter.may_wait() ? waiter.sleep(e.value, waiting, slice.next(), waiter.deadline()) : Wait::kTimeout;
      if (r != Wait::kReady) break;
      if ((e.value.load(std::memory_order_acquire) & kStateMask) == kWaiting) sweep(c, waiter);
    }
    if (r == Wait::kReady) return r;
    // Leaving early: a notification that came meanwhile is taken after a timeout, and handed on after a signal.
    lock(c, waiter.steady());
    const bool notified = (e.value.load(std::memory_order_relaxed) & kStateMask) == kNotified;
    const bool taken = notified && r == Wait::kTimeout;
    if (!taken) step_out(c, e);
    c.guard.unlock();
    return taken ? Wait::kReady : r;
  }

  /// Out of the line after kReady; a notification that is not `taken` goes to the next.
  void leave(ConditionState& c, RosterEntry& e, bool taken, const Waiter& waiter = {}) const noexcept {
    if (taken) {
      e.tag.store(0, std::memory_order_release);
      return;
    }
    lock(c, waiter.steady());
    step_out(c, e);
    c.guard.unlock();
  }

  /// Both, for waiters that have no lock to take.
  Wait wait(ConditionState& c, RosterEntry& e, const Waiter& waiter) const noexcept {
    const Wait r = await_notice(c, e, waiter);
    if (r == Wait::kReady) leave(c, e, true);
    return r;
  }

  /// Wake the `n` that have waited longest. Returns how many there were, -1 when interrupted.
  i32 notify(ConditionState& c, u32 n, const Waiter& waiter) const noexcept {
    i32 told = 0;
    while (n != 0) {
      if (!lock(c, waiter)) return -1;
      Batch batch;
      bury_dead(c, batch, false);
      const u32 inherited = batch.n;
      while (!batch.full() && n != 0 && tell_first(c, batch)) --n;
      const bool more = batch.full();
      c.guard.unlock();
      batch.wake();
      told += static_cast<i32>(batch.n - inherited);
      if (!more) break;
    }
    return told;
  }

  /// Look for dead waiters; hand on the notifications they did not take.
  void sweep(ConditionState& c, const Waiter& waiter, bool* busy = nullptr) const noexcept {
    bool dead = false;
    Tag known = me_;  // neighbours are often of one process: ask the kernel once
    arena_.for_each(c.waiters, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_acquire);
      if (t != 0 && t != known && arena_.gone(t, true)) dead = true;
      if (t != 0) known = t;
    });
    if (!dead) return;
    for (bool more = true; more;) {
      if (!lock(c, waiter)) {
        if (busy != nullptr) *busy = true;
        return;
      }
      Batch batch;
      bury_dead(c, batch, true);
      more = batch.full();
      c.guard.unlock();
      batch.wake();
    }
  }

 private:
  /// Those told under one hold of the guard, to be woken after it.
  struct Batch {
    RosterEntry* entry[16];
    u32 n = 0;
    bool full() const noexcept { return n == 16; }
    void wake() const noexcept {
      for (u32 i = 0; i < n; ++i) futex_wake(entry[i]->value, 1);
    }
  };

  /// Under guard: tell the one that has waited longest. False when nobody waits.
  bool tell_first(ConditionState& c, Batch& batch) const noexcept {
    RosterEntry* first = nullptr;
    arena_.for_each(c.waiters, [&](RosterEntry& e) {
      const u32 v = e.value.load(std::memory_order_relaxed);
      if (e.tag.load(std::memory_order_relaxed) == 0 || (v & kStateMask) != kWaiting) return;
      if (first == nullptr || static_cast<i32>(v - first->value.load(std::memory_order_relaxed)) < 0) first = &e;
    });
    if (first == nullptr) return false;
    first->value.store((first->value.load(std::memory_order_relaxed) & ~kStateMask) | kNotified,
                       std::memory_order_release);
    batch.entry[batch.n++] = first;
    return true;
  }

  /// Under guard: empty the entries of the dead. A notification one of them did not take goes to the next in line first: if
  /// we are killed in between, it is given twice, not lost.
  void bury_dead(ConditionState& c, Batch& batch, bool ask_kernel) const noexcept {
    // The dead that wait go first, or one of them could be told.
    for (const u32 state : {kWaiting, kNotified}) {
      arena_.for_each(c.waiters, [&](RosterEntry& e) {
        const Tag t = e.tag.load(std::memory_order_relaxed);
        if (t == 0 || t == me_ || (e.value.load(std::memory_order_relaxed) & kStateMask) != state) return;
        if (!arena_.gone(t, ask_kernel) || (state == kNotified && batch.full())) return;
        if (state == kNotified) tell_first(c, batch);
        e.tag.store(0, std::memory_order_release);
      });
    }
  }

  /// Under guard: out of the line without the notification, which goes to the next first: as in bury_dead().
  void step_out(ConditionState& c, RosterEntry& e) const noexcept {
    Batch batch;
    if ((e.value.load(std::memory_order_relaxed) & kStateMask) == kNotified) tell_first(c, batch);
    e.tag.store(0, std::memory_order_release);
    batch.wake();
  }

  bool lock(ConditionState& c, const Waiter& waiter) const noexcept {
    return c.guard.lock(arena_.slots(), me_, waiter) !=
           Locked::kNo;  // every store leaves a good state: nothing to repair
  }

  Arena& arena_;
  Tag me_;
};

}  // namespace procession
