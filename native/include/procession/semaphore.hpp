// Semaphore and BoundedSemaphore: a count, and who holds how many of its permits.
#pragma once

#include "arena.hpp"

namespace procession {

/// `value` permits are free. A permit taken by `with`, or from a BoundedSemaphore, is written down under its process in
/// `permits`, and comes back when that process is killed. A bare acquire() of a Semaphore is not written down: the release
/// may be another process's business (signalling), as with POSIX semaphores.
///
/// Truth under `guard`: total (free permits + written-down ones) and the entries; `value` is total minus the entries, a
/// cache that recovery of `guard` makes anew.
struct SemaphoreState {
  Object object;
  Mutex guard;
  Atomic<i32> value;
  i32 total;
  i32 bound;  ///< BoundedSemaphore: the initial value; else INT32_MAX
  EventCount sleepers;
  Atomic<u32> returned;  ///< permits given back by collect() or a waiter since somebody last asked
  Roster permits;
};

class SemaphoreOps {
 public:
  SemaphoreOps(Arena& arena, Tag me) noexcept : arena_(arena), me_(me) {}

  /// One permit; `scoped` writes it down as held by this process.
  Wait acquire(SemaphoreState& s, bool scoped, const Waiter& waiter) const noexcept {
    Wait r = take(s, scoped, waiter);
    if (r != Wait::kTimeout) return r;
    if (!waiter.may_wait()) {
      if (!arena_.may_ask_kernel()) return r;
      reclaim(s, waiter);
      return take(s, scoped, waiter);
    }
    if (spin_for(kSpin, [&] { return s.value.load(std::memory_order_relaxed) > 0; })) {
      if ((r = take(s, scoped, waiter)) != Wait::kTimeout) return r;
    }
    for (;;) {
      const u32 key = s.sleepers.prepare();
      if ((r = take(s, scoped, waiter)) != Wait::kTimeout) return r;
      if ((r = s.sleepers.sleep(key, waiter, kLockSlice)) != Wait::kReady) {
        const Wait last = r == Wait::kTimeout ? take(s, scoped, waiter) : r;
        return last == Wait::kReady ? last : r;
      }
      if (s.value.load(std::memory_order_relaxed) <= 0) reclaim(s, waiter);
    }
  }

  enum class Released : u8 { kYes, kTooMany, kInterrupted };

  Released release(SemaphoreState& s, bool scoped, const Waiter& waiter) const noexcept {
    if (!lock(s, waiter)) return Released::kInterrupted;
    if (s.value.load(std::memory_order_relaxed) >= s.bound) {
      s.guard.unlock();
      return Released::kTooMany;
    }
    // A written-down permit first: one's own, or, where none is, any (released by another than its taker).
    RosterEntry* mine = nullptr;
    RosterEntry* any = nullptr;
    if (scoped) {
      arena_.for_each(s.permits, [&](RosterEntry& e) {
        if (e.tag.load(std::memory_order_relaxed) == 0 || e.value.load(std::memory_order_relaxed) == 0) return;
        (e.tag.load(std::memory_order_relaxed) == me_ ? mine : any) = &e;
      });
      if (mine == nullptr) mine = any;
    }
    if (mine != nullptr) {
      give(*mine, 1);
    } else {
      s.total += 1;
    }
    CRASH_POINT("semaphore.before_value");
    s.value.store(s.value.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    s.guard.unlock();
    fence_after_rmw();
    s.sleepers.notify(1);
    return Released::kYes;
  }

  /// Free permits; a holder of the guard that died has its half-done count mended first.
  i32 value(SemaphoreState& s, const Waiter& waiter) const noexcept {
    if (s.guard.holder() != 0 && lock(s, waiter)) s.guard.unlock();
    return s.value.load(std::memory_order_acquire);
  }

  /// Permits of processes that died come back. True when there were some.
  bool reclaim(SemaphoreState& s, const Waiter& waiter, bool* busy = nullptr) const noexcept {
    // One that died in release() may have left a permit that `value` does not count yet: lock() counts anew.
    const Tag holder = s.guard.holder();
    bool dead = holder != 0 && holder != me_ && arena_.gone(holder, true);
    arena_.for_each(s.permits, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_acquire);
      dead = dead || (t != 0 && t != me_ && arena_.fate(t, true) == Owner::kDied);
    });
    if (!dead) return false;
    if (!lock(s, waiter)) {
      if (busy != nullptr) *busy = true;
      return false;
    }
    u32 back = 0;
    arena_.for_each(s.permits, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_relaxed);
      if (t != 0 && t != me_ && arena_.fate(t, false) == Owner::kDied) {
        back += e.value.load(std::memory_order_relaxed);
        e.tag.store(0, std::memory_order_relaxed);
      }
    });
    recount(s);
    s.returned.fetch_add(back, std::memory_order_relaxed);
    s.guard.unlock();
    fence_after_rmw();
    if (back != 0) s.sleepers.notify(INT32_MAX);
    return back != 0;
  }

 private:
  bool lock(SemaphoreState& s, const Waiter& waiter) const noexcept {
    const Locked l = s.guard.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kRecovered) recount(s);
    return l != Locked::kNo;
  }

  void recount(SemaphoreState& s) const noexcept {
    i64 held = 0;
    arena_.for_each(s.permits, [&](RosterEntry& e) {
      if (e.tag.load(std::memory_order_relaxed) != 0) held += e.value.load(std::memory_order_relaxed);
    });
    s.value.store(static_cast<i32>(s.total - held), std::memory_order_relaxed);
  }

  static void give(RosterEntry& e, u32 n) noexcept {
    const u32 had = e.value.load(std::memory_order_relaxed);
    e.value.store(had - n, std::memory_order_relaxed);
    if (had == n) e.tag.store(0, std::memory_order_relaxed);
  }

  Wait take(SemaphoreState& s, bool scoped, const Waiter& waiter) const noexcept {
    if (s.value.load(std::memory_order_relaxed) <= 0) {
      // Only a dead holder of the guard can have left the count wrong.
      if (s.guard.holder() == 0 || !arena_.gone(s.guard.holder(), false)) return Wait::kTimeout;
    }
    if (!lock(s, waiter)) return Wait::kInterrupted;
    const i32 v = s.value.load(std::memory_order_relaxed);
    if (v <= 0) {
      s.guard.unlock();
      return Wait::kTimeout;
    }
    // Departed processes' entries are not used again here: they say which permits are to come back.
    RosterEntry* e =
        scoped ? arena_.roster_entry(me_, s.permits, s.object.block, me_, false, waiter.undisturbed()) : nullptr;
    if (e != nullptr) {
      const bool mine = e->tag.load(std::memory_order_relaxed) == me_;
      e->value.store((mine ? e->value.load(std::memory_order_relaxed) : 0) + 1, std::memory_order_relaxed);
      e->tag.store(me_, std::memory_order_relaxed);
    } else {
      s.total -= 1;
    }
    CRASH_POINT("semaphore.before_value");
    s.value.store(v - 1, std::memory_order_relaxed);
    s.guard.unlock();
    return Wait::kReady;
  }

  static constexpr i64 kSpin = 3'000;
  Arena& arena_;
  Tag me_;
};

}  // namespace procession
