// Barrier: a generation that ends when enough have come, or when one of them cannot.
#pragma once

#include "arena.hpp"

namespace procession {

/// Every waiter has an entry: its value says what became of the waiter's own generation, so that a waiter which wakes late,
/// generations later, still reads its own outcome. How many wait is the number of entries that say kWaiting: nothing to
/// repair after a kill. A process that dies while it waits, or while it runs the action, breaks the barrier.
struct BarrierState {
  Object object;
  Mutex guard;
  u32 parties;
  Atomic<u32> broken;
  Atomic<u32> runner;  ///< tag of the process that runs the action, 0 for none
  u32 ending;          ///< outcome being written into the entries: whoever recovers `guard` finishes it
  EventCount sleepers;
  Roster waiters;
};

class BarrierOps {
 public:
  static constexpr u32 kWaiting = 1, kReleased = 2, kBroken = 3;

  enum class Arrival : u8 { kWaits, kLast, kBroken, kBusy, kFull, kInterrupted };

  BarrierOps(Arena& arena, Tag me) noexcept : arena_(arena), me_(me) {}

  /// Come to the barrier. kWaits: `entry` and `index` are set, go on to wait(). kLast: run the action (the others stay),
  /// then finish(); without an action everybody has been released already. kBusy: the action of the last generation runs.
  Arrival arrive(BarrierState& b, bool action, RosterEntry** entry, u32* index, const Waiter& waiter) const noexcept {
    // The last to come must not count the dead. Asking costs 7 us each, so rounds that follow fast are not all checked.
    if (b.parties > 1 && waiting_locked(b) + 1 >= b.parties && arena_.may_ask_kernel()) sweep(b, waiter);
    if (!lock(b, waiter)) return Arrival::kInterrupted;
    Arrival r = Arrival::kWaits;
    if (b.broken.load(std::memory_order_relaxed) != 0) {
      r = Arrival::kBroken;
    } else if (b.runner.load(std::memory_order_relaxed) != 0) {
      r = Arrival::kBusy;
    } else if ((*index = waiting_locked(b)) + 1 == b.parties) {
      r = Arrival::kLast;
      if (action) {
        b.runner.store(me_, std::memory_order_release);
      } else {
        end_generation(b, kReleased);
      }
    } else if ((*entry = arena_.empty_entry(me_, b.waiters, b.object.block, waiter.undisturbed())) != nullptr) {
      (*entry)->value.store(kWaiting, std::memory_order_relaxed);
      (*entry)->tag.store(me_, std::memory_order_release);
    } else {
      r = Arrival::kFull;
    }
    b.guard.unlock();
    if (r == Arrival::kLast && !action) wake(b);
    return r;
  }

  /// The action has run: release the others, or break the barrier. False: it was reset or broken meanwhile.
  bool finish(BarrierState& b, bool broken, const Waiter& waiter) const noexcept {
    lock(b, waiter.steady());
    const bool mine = b.runner.load(std::memory_order_relaxed) == me_;
    if (mine) {
      if (broken) b.broken.store(1, std::memory_order_release);
      end_generation(b, broken ? kBroken : kReleased);
      b.runner.store(0,
                     std::memory_order_relaxed);  // last: killed before, we are a runner that died, and sweep() sees it
    }
    b.guard.unlock();
    if (mine) wake(b);
    return mine;
  }

  /// Wait for one's generation to end; kReleased or kBroken in `outcome`. A timeout or a signal breaks the barrier.
  Wait wait(BarrierState& b, RosterEntry& e, u32* outcome, const Waiter& waiter) const noexcept {
    const auto over = [&] { return e.value.load(std::memory_order_acquire) != kWaiting; };
    Wait r = Wait::kReady;
    if (!spin_for(3'000, over)) {
      waiter.before_sleep();
      if (!yield_for(20'000, over)) {
        for (IdleSlice slice; !over();) {
          const u32 key = b.sleepers.prepare();
          if (over()) break;
          r = b.sleepers.sleep(key, waiter, slice.next());
          if (over()) {
            r = Wait::kReady;
            break;
          }
          if (r != Wait::kReady) break;
          sweep(b, waiter);
        }
      }
    }
    if (r != Wait::kReady) {
      lock(b, waiter.steady());
      if (over()) {
        r = r == Wait::kTimeout ? Wait::kReady : r;
      } else {
        b.broken.store(1, std::memory_order_release);
        end_generation(b, kBroken);
      }
      b.guard.unlock();
      wake(b);
    }
    *outcome = e.value.load(std::memory_order_relaxed);
    e.tag.store(0, std::memory_order_release);
    return r;
  }

  /// Wait while another process runs the action of the generation before.
  Wait wait_idle(BarrierState& b, const Waiter& waiter) const noexcept {
    const u32 key = b.sleepers.prepare();
    if (b.runner.load(std::memory_order_acquire) == 0) return Wait::kReady;
    const Wait r = b.sleepers.sleep(key, waiter, 10 * kMillisecond);
    sweep(b, waiter);
    return r;
  }

  void abort(BarrierState& b, const Waiter& waiter) const noexcept { stop(b, true, waiter); }
  void reset(BarrierState& b, const Waiter& waiter) const noexcept { stop(b, false, waiter); }
  u32 waiting(BarrierState& b) const noexcept { return waiting_locked(b); }

  /// A dead waiter will never go on, so this generation cannot do what it was for: break the barrier.
  void sweep(BarrierState& b, const Waiter& waiter, bool* busy = nullptr) const noexcept {
    const Tag runner = b.runner.load(std::memory_order_acquire);
    bool dead = runner != 0 && arena_.gone(runner, true);
    // The last to come may have died while it ended the generation, some of us told and some not: lock() finishes that.
    const Tag holder = b.guard.holder();
    dead = dead || (holder != 0 && holder != me_ && arena_.gone(holder, true));
    Tag known = me_;
    arena_.for_each(b.waiters, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_acquire);
      if (t != 0 && t != known && e.value.load(std::memory_order_relaxed) == kWaiting && arena_.gone(t, true))
        dead = true;
      if (t != 0) known = t;
    });
    if (!dead) return;
    if (!lock(b, waiter)) {
      if (busy != nullptr) *busy = true;
      return;
    }
    // Look again under the guard: the entry may have been used anew since.
    dead =
        b.runner.load(std::memory_order_relaxed) != 0 && arena_.gone(b.runner.load(std::memory_order_relaxed), false);
    arena_.for_each(b.waiters, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_relaxed);
      if (t != 0 && t != me_ && e.value.load(std::memory_order_relaxed) == kWaiting && arena_.gone(t, false))
        dead = true;
    });
    if (dead) {
      b.broken.store(1, std::memory_order_release);
      end_generation(b, kBroken);
      b.runner.store(0, std::memory_order_relaxed);
    }
    b.guard.unlock();
    if (dead) wake(b);
  }

 private:
  bool lock(BarrierState& b, const Waiter& waiter) const noexcept {
    const Locked l = b.guard.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kRecovered && b.ending != 0) {
      end_generation(b, b.ending);
      wake(b);
    }
    return l != Locked::kNo;
  }

  u32 waiting_locked(BarrierState& b) const noexcept {
    u32 n = 0;
    arena_.for_each(b.waiters, [&](RosterEntry& e) {
      if (e.tag.load(std::memory_order_relaxed) != 0 && e.value.load(std::memory_order_relaxed) == kWaiting) ++n;
    });
    return n;
  }

  void end_generation(BarrierState& b, u32 outcome) const noexcept {
    b.ending = outcome;
    arena_.for_each(b.waiters, [&](RosterEntry& e) {
      if (e.tag.load(std::memory_order_relaxed) != 0 && e.value.load(std::memory_order_relaxed) == kWaiting) {
        e.value.store(outcome, std::memory_order_release);
      } else if (e.tag.load(std::memory_order_relaxed) != 0 &&
                 arena_.gone(e.tag.load(std::memory_order_relaxed), false)) {
        e.tag.store(0, std::memory_order_relaxed);
      }
    });
    b.ending = 0;
  }

  static void wake(BarrierState& b) noexcept {
    fence_after_rmw();
    b.sleepers.notify(INT32_MAX);
  }

  void stop(BarrierState& b, bool broken, const Waiter& waiter) const noexcept {
    lock(b, waiter.steady());
    b.broken.store(broken ? 1 : 0, std::memory_order_release);
    end_generation(b, kBroken);
    b.runner.store(0, std::memory_order_relaxed);
    b.guard.unlock();
    wake(b);
  }

  Arena& arena_;
  Tag me_;
};

}  // namespace procession
