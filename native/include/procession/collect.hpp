// What departed processes left, given back.
#pragma once

#include "barrier.hpp"
#include "condition.hpp"
#include "event.hpp"
#include "lock.hpp"
#include "queue.hpp"
#include "semaphore.hpp"

namespace procession {

inline void Arena::destroy(Tag me, u32 i, const Waiter& waiter) noexcept {
  const Kind kind = block(i).kind;
  const auto free_chunks = [&](Roster& r) {
    for (u32 c = r.more.load(std::memory_order_acquire); c != 0;) {
      const u32 next = at<RosterChunk>(c).next.load(std::memory_order_relaxed);
      free(me, c, waiter);
      c = next;
    }
  };
  free_chunks(at<Object>(i).holders);
  if (kind == Kind::kSemaphore || kind == Kind::kBoundedSemaphore) free_chunks(at<SemaphoreState>(i).permits);
  if (kind == Kind::kCondition) free_chunks(at<ConditionState>(i).waiters);
  if (kind == Kind::kBarrier) free_chunks(at<BarrierState>(i).waiters);
  if (kind == Kind::kQueue || kind == Kind::kJoinableQueue) {
    QueueState& q = at<QueueState>(i);
    const QueueOps ops(*this, me);
    for (u32 r = q.get_ring.load(std::memory_order_acquire);;) {
      const u32 next = ops.ring_at(q, r).next.load(std::memory_order_acquire);
      if (r != 0) free(me, r, waiter);
      if (next == 0) break;
      r = next;
    }
    for (u32 r = q.in_hand.load(std::memory_order_acquire); r != 0;) {
      const u32 next = ops.record(r).next.load(std::memory_order_relaxed);
      free(me, r, waiter);
      r = next;
    }
  }
  free(me, i, waiter);
}

inline void Arena::release_slot(u32 i) noexcept {
  Slot& s = slots()[i];
  const u32 gen = Slot::gen_of(s.word.load(std::memory_order_relaxed));
  s.word.store(Slot::make(gen + 1, SlotState::kFree), std::memory_order_release);
  s.pid.store(0, std::memory_order_release);  // last: it is what claims a slot
}

inline u32 Arena::collect(Tag me, const Waiter& caller) noexcept {
  Header& h = header();
  if (h.collect.lock(slots(), me, caller) == Locked::kNo) return 0;
  const Waiter waiter = caller.undisturbed();
  h.departures.store(0, std::memory_order_relaxed);

  // Who has left? Found dead, or said goodbye and ended.
  constexpr u32 kAtOnce = 1024;
  u32 left[kAtOnce];
  u32 n = 0;
  for (u32 i = 1; i < h.slot_end.load(std::memory_order_relaxed) && n < kAtOnce; ++i) {
    Slot& s = slots()[i];
    if (s.pid.load(std::memory_order_acquire) <= 0) continue;
    const u32 w = s.word.load(std::memory_order_acquire);
    const SlotState state = Slot::state_of(w);
    if (state == SlotState::kFree || state == SlotState::kReserved) {
      // Died between taking the slot and going live: nothing is in its name.
      if (state == SlotState::kFree && slot_process_gone(s)) s.pid.store(0, std::memory_order_release);
      continue;
    }
    if (gone(make_tag(Slot::gen_of(w), i), true) && slot_process_gone(s)) left[n++] = make_tag(Slot::gen_of(w), i);
  }
  if (n == 0) {
    h.collect.unlock();
    return 0;
  }
  const auto has_left = [&](Tag t) {
    if (t == 0 || slot_index(t) == 0 || slot_index(t) >= kMaxSlots) return false;
    for (u32 i = 0; i < n; ++i) {
      if (left[i] == t) return true;
    }
    return false;
  };

  const u32 nblocks = h.nblocks.load(std::memory_order_acquire);
  for (u32 i = 1; i < nblocks; ++i) {
    Block& b = block(i);
    const u32 owner = b.owner.load(std::memory_order_acquire);
    if (owner == 0) continue;
    if (owner == kOwnedByHolders) {
      Object& o = at<Object>(i);
      if (b.kind == Kind::kLock || b.kind == Kind::kRLock) {
        UserLock& l = at<UserLock>(i);
        const Tag holder = l.word.load(std::memory_order_acquire) & kTagMask;
        if (has_left(holder) && fate(holder, false) == Owner::kDied)
          orphan_lock(l, slots()[slot_index(holder)], holder);
        if ((l.word.load(std::memory_order_relaxed) & kTagMask) == kOrphaned) futex_wake(l.word, 1);
      } else if (b.kind == Kind::kSemaphore || b.kind == Kind::kBoundedSemaphore) {
        SemaphoreOps(*this, me).reclaim(at<SemaphoreState>(i), waiter);
      } else if (b.kind == Kind::kCondition) {
        ConditionOps(*this, me).sweep(at<ConditionState>(i), waiter);
      } else if (b.kind == Kind::kBarrier) {
        BarrierOps(*this, me).sweep(at<BarrierState>(i), waiter);
      } else if (b.kind == Kind::kJoinableQueue) {
        QueueOps(*this, me).scavenge(at<QueueState>(i), waiter);
      }
      if (o.pinned.load(std::memory_order_relaxed) != 0) continue;
      bool held = false;
      for_each(o.holders, [&](RosterEntry& e) {
        const Tag t = e.tag.load(std::memory_order_acquire);
        held = held || (t != 0 && !gone(t, false) && !has_left(t));
      });
      if (held) continue;
      // Under the guard, so that of two finders one destroys.
      if (o.guard.lock(slots(), me, waiter) == Locked::kNo) continue;
      u32 expected = kOwnedByHolders;
      const bool mine = b.owner.compare_exchange_strong(expected, me);
      o.guard.unlock();
      if (mine) destroy(me, i, waiter);
    } else if (owner == kOwnedByQueue) {
      const Block& p = block(b.parent);
      if (p.owner.load(std::memory_order_acquire) == 0 || p.gen.load(std::memory_order_relaxed) != b.parent_gen) {
        u32 expected = owner;
        if (b.owner.compare_exchange_strong(expected, me)) free(me, i, waiter);
      }
    } else if (has_left(owner)) {
      const Block& p = block(b.parent);
      const bool parent_lives = b.parent != 0 && p.owner.load(std::memory_order_acquire) == kOwnedByHolders &&
                                p.gen.load(std::memory_order_relaxed) == b.parent_gen;
      bool in_use = false;
      if (parent_lives && (b.kind == Kind::kRing || b.kind == Kind::kRecord)) {
        QueueState& q = at<QueueState>(b.parent);
        const QueueOps ops(*this, me);
        const Locked put = q.put_lock.lock(slots(), me, waiter);
        if (put == Locked::kNo) continue;
        if (put == Locked::kRecovered) ops.repair_put(q);
        const Locked get = q.get_lock.lock(slots(), me, waiter);
        if (get == Locked::kRecovered) ops.repair_get(q);
        in_use = get == Locked::kNo || ops.reachable(q, i);
        if (get != Locked::kNo) q.get_lock.unlock();
        q.put_lock.unlock();
      } else if (parent_lives && b.kind == Kind::kRosterChunk) {
        in_use = true;  // linked before its owner was changed, or lost with at most one object's life
      }
      u32 expected = owner;
      if (in_use) {
        b.owner.compare_exchange_strong(expected, kOwnedByQueue);
      } else if (b.owner.compare_exchange_strong(expected, me)) {
        free(me, i, waiter);
      }
    }
  }
  for (u32 i = 0; i < n; ++i) release_slot(slot_index(left[i]));
  h.collect.unlock();
  return n;
}

}  // namespace procession
