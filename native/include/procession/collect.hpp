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
    // Their messages first: a cargo whose ring is gone would be found by nobody, and its owner is the queue still.
    ops.for_each_cargo(q, [&](u32 c) {
      u32 owner = kOwnedByQueue;
      if (block(c).owner.compare_exchange_strong(owner, me)) unload_cargo(me, c, waiter);
    });
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
  // The next tenant is judged by its own start: a claimer that has not written it yet must not look like a reused pid.
  s.start_ticks.store(0, std::memory_order_relaxed);
  s.start_stack.store(0, std::memory_order_relaxed);
  s.set_tenant({Slot::make(gen + 1, SlotState::kFree), 0});
}

/// Who has left: found dead, said goodbye and ended, or never came to the slot a fork reserved for it.
inline u32 Arena::find_departed(Tag* left, u32 most) noexcept {
  constexpr u64 kReservation =
      10'000'000'000;  // ns; a child needs a millisecond; one that was stopped claims a slot anew
  Header& h = header();
  u32 n = 0;
  for (u32 i = 1; i < h.slot_end.load(std::memory_order_relaxed) && n < most; ++i) {
    Slot& s = slots()[i];
    const Slot::Tenant t = s.tenant();
    const Tag tag = make_tag(Slot::gen_of(t.word), i);
    const u32 dead = Slot::make(slot_gen(tag), SlotState::kDead);
    switch (Slot::state_of(t.word)) {
      case SlotState::kReserved:
        if (t.pid < 0) {  // the child has not come yet
          const u64 age = static_cast<u64>(now_ns()) - s.start_ticks.load(std::memory_order_relaxed);
          if (age > kReservation && s.replace_tenant(t, {dead, 0})) left[n++] = tag;
        } else if (s.pidns == pid_namespace() && process_is_gone(t.pid, 0, 0) && s.replace_tenant(t, {dead, t.pid})) {
          left[n++] = tag;  // it has swapped in its pid, and died before it was live
        }
        break;
      case SlotState::kFree:
        // Died between taking the slot and going live (or reserving it): nothing is in its name.
        if (t.pid != 0 && pids_mean_the_same() && process_is_gone(std::abs(t.pid), 0, 0))
          s.replace_tenant(t, {t.word, 0});
        break;
      default:
        // Without a pid: a reservation that was given up.
        if (t.pid == 0 || (gone(tag, true) && slot_process_gone(s))) left[n++] = tag;
    }
  }
  return n;
}

/// Keep an object from being destroyed by others while collect() looks into it. One collector at a time: what a killed one
/// left inspected, the next takes up.
inline bool Arena::inspect(u32 i) noexcept {
  u32 owner = kOwnedByHolders;
  return block(i).owner.compare_exchange_strong(owner, kInspected) || owner == kInspected;
}

/// Let go of it, or destroy it if nobody holds it any more. False: its guard is taken, so it stays inspected for now.
inline bool Arena::end_inspection(Tag me, u32 i, const Tag* left, u32 n, const Waiter& waiter) noexcept {
  Object& o = at<Object>(i);
  if (!lock_guard(me, o, waiter)) return false;
  bool held = is_kept(o);
  for_each(o.holders, [&](RosterEntry& e) {
    const Tag t = e.tag.load(std::memory_order_acquire);
    // Who said goodbye counts until its slot is given back, and that comes last: `left` knows better.
    held = held || (t != 0 && !gone(t, false) && std::find(left, left + n, t) == left + n);
  });
  block(i).owner.store(held ? kOwnedByHolders : me, std::memory_order_release);
  o.guard.unlock();
  if (!held) destroy(me, i, Waiter(0, {}));
  return true;
}

/// `f(tag)` for each living holder of an object; returns whether messages carry it.
template <class F>
bool Arena::look_at_holders(Tag me, u32 i, const Waiter& waiter, F&& f) noexcept {
  Header& h = header();
  if (h.collect.lock(slots(), me, waiter) == Locked::kNo) return false;
  bool carried = false;
  if (inspect(i)) {
    Object& o = at<Object>(i);
    if (lock_guard(me, o, Waiter::hurried())) {
      for_each(o.holders, [&](RosterEntry& e) {
        const Tag t = e.tag.load(std::memory_order_acquire);
        if (t != 0 && !gone(t, false)) f(t);
      });
      carried = o.cargoes.load(std::memory_order_relaxed) != 0;
      o.guard.unlock();
    }
    end_inspection(me, i, nullptr, 0, waiter);
  }
  h.collect.unlock();
  return carried;
}

/// What the departed held of one object. False: somebody is inside it; the departed keep their slots until another time.
inline bool Arena::settle_object(Tag me, u32 i, const Tag* left, u32 n) noexcept {
  if (!inspect(i)) return true;
  const Waiter waiter = Waiter::hurried();
  bool busy = false;
  switch (block(i).kind) {
    case Kind::kLock:
    case Kind::kRLock: {
      UserLock& l = at<UserLock>(i);
      const Tag holder = l.word.load(std::memory_order_acquire) & kTagMask;
      const bool has_left = holder != 0 && std::find(left, left + n, holder) != left + n;
      if (has_left && fate(holder, false) == Owner::kDied) orphan_lock(l, slots()[slot_index(holder)], holder);
      if ((l.word.load(std::memory_order_relaxed) & kTagMask) == kOrphaned) futex_wake(l.word, 1);
      break;
    }
    case Kind::kSemaphore:
    case Kind::kBoundedSemaphore: SemaphoreOps(*this, me).reclaim(at<SemaphoreState>(i), waiter, &busy); break;
    case Kind::kCondition: ConditionOps(*this, me).sweep(at<ConditionState>(i), waiter, &busy); break;
    case Kind::kBarrier: BarrierOps(*this, me).sweep(at<BarrierState>(i), waiter, &busy); break;
    case Kind::kJoinableQueue: QueueOps(*this, me).scavenge(at<QueueState>(i), waiter, &busy); break;
    default: break;
  }
  return end_inspection(me, i, left, n, waiter) && !busy;
}

/// A ring, record, chunk or cargo: free it if its object is gone, or if its departed owner never linked it.
inline bool Arena::settle_part(Tag me, u32 i, bool owner_left, const Tag* left, u32 n) noexcept {
  Block& b = block(i);
  u32 owner = b.owner.load(std::memory_order_acquire);
  const u32 parent = b.parent;
  const bool has_parent =
      parent != 0 && block(parent).gen.load(std::memory_order_relaxed) == b.parent_gen && is_live_object(parent);
  if (!owner_left) {  // a part of an object: free it only if that one is no more
    const auto orphan = [&] {
      const Block& p = block(b.parent);
      return b.owner.load(std::memory_order_acquire) == kOwnedByQueue &&
             (p.owner.load(std::memory_order_acquire) == 0 || p.gen.load(std::memory_order_relaxed) != b.parent_gen);
    };
    if (!orphan()) return true;
    // Looked at again where no block is freed and used anew: kOwnedByQueue does not say whose part it is.
    Header& h = header();
    const Locked l = h.alloc.lock(slots(), me, Waiter::hurried());
    if (l == Locked::kNo) return false;
    if (l == Locked::kRecovered) rebuild_free_lists();
    const bool mine = orphan();
    if (mine) b.owner.store(me, std::memory_order_release);
    h.alloc.unlock();
    if (mine) discard(me, i);
    return true;
  }
  // Somebody alive takes its object apart, and this with it where it is linked: not ours to free; we look again later.
  const Tag taker = parent == 0 ? 0 : block(parent).owner.load(std::memory_order_acquire);
  if (taker != 0 && taker != me && slot_index(taker) < kMaxSlots && !gone(taker, false) &&
      std::find(left, left + n, taker) == left + n &&
      block(parent).gen.load(std::memory_order_relaxed) == b.parent_gen) {
    return false;
  }
  bool in_use = false;
  bool busy = false;
  const Waiter waiter = Waiter::hurried();
  if (has_parent && inspect(parent)) {
    if (b.kind == Kind::kRing || b.kind == Kind::kRecord || b.kind == Kind::kCargo) {
      QueueState& q = at<QueueState>(parent);
      busy = !QueueOps(*this, me).find_part(q, i, &in_use);
    } else if (b.kind == Kind::kRosterChunk) {
      in_use = roster_reaches(parent, i);
    }
    busy = !end_inspection(me, parent, left, n, waiter) || busy;
  }
  if (busy) return false;
  if (in_use) {
    b.owner.compare_exchange_strong(owner, kOwnedByQueue);
  } else if (b.owner.compare_exchange_strong(owner, me)) {
    // An object that its destroyer left half taken apart: its parts are found by their parent's being gone.
    discard(me, i);
  }
  return true;
}

/// Free a part that is `me`'s.
inline void Arena::discard(Tag me, u32 i) noexcept {
  if (block(i).kind == Kind::kCargo) unload_cargo(me, i, Waiter(0, {}));
  else free(me, i, Waiter(0, {}));
}

/// Is `chunk` linked in one of the rosters of `object`? Their chains only grow while the object lives.
inline bool Arena::roster_reaches(u32 object, u32 chunk) noexcept {
  const auto in = [&](Roster& r) {
    u32 c = r.more.load(std::memory_order_acquire);
    while (c != 0 && c != chunk) c = at<RosterChunk>(c).next.load(std::memory_order_acquire);
    return c != 0;
  };
  if (in(at<Object>(object).holders)) return true;
  switch (block(object).kind) {
    case Kind::kSemaphore:
    case Kind::kBoundedSemaphore: return in(at<SemaphoreState>(object).permits);
    case Kind::kCondition: return in(at<ConditionState>(object).waiters);
    case Kind::kBarrier: return in(at<BarrierState>(object).waiters);
    default: return false;
  }
}

inline u32 Arena::collect(Tag me, const Waiter& caller) noexcept {
  Header& h = header();
  if (h.collect.lock(slots(), me, caller) == Locked::kNo) return 0;
  h.departures.store(0, std::memory_order_relaxed);
  constexpr u32 kAtOnce = 1024;
  Tag left[kAtOnce];
  const u32 n = find_departed(left, kAtOnce);
  bool settled = true;
  const u32 nblocks = n == 0 ? 0 : h.nblocks.load(std::memory_order_acquire);
  // An object that its destroyer left half taken apart may have parts below it in the table: they take a second round.
  bool again = true;
  for (int round = 0; round < 2 && again; ++round) {
    again = false;
    for (u32 i = 1; i < nblocks; ++i) {
      const u32 owner = block(i).owner.load(std::memory_order_acquire);
      if (owner == 0) continue;
      if (owner == kOwnedByHolders || owner == kInspected) {
        settled = settle_object(me, i, left, n) && settled;
      } else if (owner == kOwnedByQueue) {
        settled = settle_part(me, i, false, left, n) && settled;
      } else if (std::find(left, left + n, owner & kTagMask) != left + n) {
        again = again || block(i).parent == 0;
        settled = settle_part(me, i, true, left, n) && settled;
      }
    }
  }
  // A slot that is given back too early turns its dead tenant into one that left in good order.
  for (u32 i = 0; settled && i < n; ++i) release_slot(slot_index(left[i]));
  if (!settled) h.departures.fetch_add(1, std::memory_order_relaxed);
  h.collect.unlock();
  return settled ? n : 0;
}

}  // namespace procession
