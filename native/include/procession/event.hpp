// Event: one flag.
#pragma once

#include "arena.hpp"

namespace procession {

struct EventState {
  Object object;
  Atomic<u32> flag;
  EventCount sleepers;
};

class EventOps {
 public:
  static bool is_set(const EventState& e) noexcept { return e.flag.load(std::memory_order_acquire) != 0; }

  static void set(EventState& e) noexcept {
    e.flag.exchange(1, std::memory_order_seq_cst);
    fence_after_rmw();
    e.sleepers.notify(INT32_MAX);
  }

  static void clear(EventState& e) noexcept { e.flag.store(0, std::memory_order_seq_cst); }

  /// A set() that is followed at once by a clear() may be missed by a waiter that has not run in between, as in the stdlib.
  static Wait wait(EventState& e, const Waiter& waiter) noexcept {
    if (is_set(e)) return Wait::kReady;
    if (!waiter.may_wait()) return Wait::kTimeout;
    if (spin_for(kSpin, [&] { return is_set(e); })) return Wait::kReady;
    waiter.before_sleep();
    if (yield_for(kYield, [&] { return is_set(e); })) return Wait::kReady;
    for (IdleSlice slice;;) {
      const u32 key = e.sleepers.prepare();
      if (is_set(e)) return Wait::kReady;
      const Wait r = e.sleepers.sleep(key, waiter, slice.next());
      if (is_set(e)) return Wait::kReady;
      if (r != Wait::kReady) return r;
    }
  }

 private:
  static constexpr i64 kSpin = 3'000, kYield = 20'000;  // ns; measured: spin 3 us, then yield while that is fast
};

}  // namespace procession
