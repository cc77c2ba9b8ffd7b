// The queue: two locks, a chain of rings, one publishing store a side.
#pragma once

#include <bit>

#include "arena.hpp"

namespace procession {

/// Messages lie in a ring as header + payload, padded to 8 bytes and never wrapped: a kWrap header fills a tail too short.
struct Message {
  u32 len;
  u8 kind;  ///< the codec's business, except kWrap
  u8 flags;
  u16 unused;

  /// The block of the cargo that goes with it, 0 for none; it is in the first 8 bytes of the payload.
  u32 cargo() const noexcept {
    u32 block = 0;
    if (flags & kCarries) std::memcpy(&block, this + 1, sizeof block);
    return block;
  }
  const char* payload() const noexcept { return reinterpret_cast<const char*>(this + 1) + prefix(); }
  u32 payload_len() const noexcept { return len - prefix(); }
  u32 prefix() const noexcept { return flags & kCarries ? kPrefix : 0; }

  static constexpr u8 kCarries = 1;
  static constexpr u32 kPrefix = 8;
};
constexpr u8 kWrap = 0xff;

/// A ring's ends are one word each: messages ever (high half) and position in units of 8 bytes (low half), so that one
/// store publishes both (pitfall 13). Positions run on modulo 2^32; a ring holds 2^k units.
///
/// head: written under the put lock only; storing it is the commit of put. tail: under the get lock; the commit of get.
/// Bytes in [tail, head) are complete and never change (I3). `next` is set once, when the ring is full: from then on `head`
/// stays as it is.
struct Ring {
  u32 block;  ///< 0: the small ring inside the queue's own block
  u32 units;
  Atomic<u32> next;
  u32 unused;
  alignas(64) Atomic<u64> head;
  Atomic<u32> tail_seen;  ///< producers' cache of tail's position
  alignas(64) Atomic<u64> tail;
  Atomic<u32> head_seen;  ///< consumers' cache of head's position
  alignas(64) char data[];
};
static_assert(sizeof(Ring) == 192);

constexpr u64 make_end(u32 count, u32 pos) noexcept { return u64{count} << 32 | pos; }
constexpr u32 end_count(u64 e) noexcept { return static_cast<u32>(e >> 32); }
constexpr u32 end_pos(u64 e) noexcept { return static_cast<u32>(e); }

/// A selectable end: somebody polls a pipe for this queue (connection.wait, asyncio). Whoever puts or gets writes a byte
/// to it, found through /proc/<pid>/fd/<fd>, when it is armed. What is found there must still be that pipe: the number may
/// belong to a file by now, and a byte written to it would damage it.
struct Bell {
  Atomic<u32> tag;
  Atomic<i32> pid, fd;
  Atomic<u32> armed;  ///< kItems | kSpace
  Atomic<u64> inode;
};
constexpr u32 kBells = 6;
constexpr u32 kBellItems = 1, kBellSpace = 2;

constexpr u32 kQueueShutDown = 1, kQueueImmediate = 2;

struct QueueState {
  Object object;
  u32 maxsize;  ///< messages; 0: no limit
  Atomic<u32> flags;
  Atomic<u32> bells_armed;  ///< or of the bells' `armed`
  Bell bell[kBells];
  alignas(64) Mutex put_lock;
  Atomic<u32> put_ring;  ///< block of the ring that producers write; 0: the inline one
  Atomic<u32> nput;      ///< cache of head's count
  alignas(64) Mutex get_lock;
  Atomic<u32> get_ring;
  Atomic<u32> nget;  ///< cache of tail's count
  // JoinableQueue: items taken and not yet done, oldest first, under get_lock.
  Atomic<u32> in_hand;   ///< block of the first Record
  u32 in_hand_last;      ///< cache: the last one
  Atomic<u32> returned;  ///< cache: records whose holder died, to be delivered again
  alignas(64) EventCount getters;
  alignas(64) EventCount putters;
  EventCount joiners;
  alignas(64) Ring ring;  ///< the first, small ring, up to the end of the block
};

constexpr u32 kQueueBlock = 2048;
constexpr u32 kInlineUnits = 128;  // 1 KiB: an idle or low-traffic queue costs one 2 KiB block
static_assert(sizeof(QueueState) + kInlineUnits * 8 <= kQueueBlock);
constexpr u32 kSecondRing = 64 << 10;        // bytes; fits the L2 cache beside the program's own data
constexpr u32 kLargestRing = 16 << 20;       // a longer backlog is a chain of these, freed one by one as it drains
constexpr u32 kWarmUnits = (512 << 10) / 8;  // half of a usual L2 cache
constexpr u32 kCourtesyFrom = 64 << 10;      // from this size on, a producer lets a running consumer catch up first

/// A JoinableQueue's item in the hands of a consumer, kept until task_done(). `tag` 0: to be delivered again.
/// Valid once the ring's tail has passed `number`: a consumer killed before that never took it.
struct Record {
  Atomic<u32> next;
  Atomic<u32> tag;
  u32 number;
  u32 deliveries;
  Message message;
  char data[];
};

enum class Put : u8 { kDone, kFull, kShutDown, kNoMemory, kInterrupted };
enum class Get : u8 { kDone, kEmpty, kShutDown, kTooSmall, kNoMemory, kInterrupted };

/// One message to put; `parts` lets a caller avoid joining header bytes and a buffer.
struct Outgoing {
  u8 kind;
  const void* data;
  u32 len;
  u32 cargo = 0;  ///< from load_cargo(); the queue's once the message is in it

  u32 stored_len() const noexcept { return len + (cargo != 0 ? Message::kPrefix : 0); }
};

/// Where get() copies to: a message longer than `capacity` is left in place, and `len` says what is needed.
struct Incoming {
  void* data;
  u64 capacity;
  u32 len;
  u8 kind;
  u32 cargo =
      0;  ///< the taker's now, to be unloaded once its handles are held; of a JoinableQueue it stays the queue's
};

class QueueOps {
 public:
  QueueOps(Arena& arena, Tag me) noexcept : arena_(arena), me_(me) {}

  static void init(QueueState& q, u32 maxsize) noexcept {
    q.maxsize = maxsize;
    q.ring.units = kInlineUnits;
  }

  // --- put ------------------------------------------------------------------------------------------------------------

  /// Put `n` messages, all or as many as fit now; `*done` counts them. kFull: the rest found no room.
  Put try_put(QueueState& q, const Outgoing* m, u32 n, u32* done, const Waiter& waiter) const noexcept {
    const Locked l = q.put_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) return Put::kInterrupted;
    if (l == Locked::kRecovered) repair_put(q, waiter);
    Put result = Put::kDone;
    const u32 before = *done;
    if (q.flags.load(std::memory_order_relaxed) & kQueueShutDown) {
      result = Put::kShutDown;
    } else {
      Ring* r = &ring_at(q, q.put_ring.load(std::memory_order_relaxed));
      u64 h = r->head.load(std::memory_order_relaxed);
      const u32 first = end_count(h);
      u32 room = UINT32_MAX;
      if (q.maxsize != 0) { room = q.maxsize - std::min(q.maxsize, first - q.nget.load(std::memory_order_acquire)); }
      for (; *done < n; ++*done) {
        if (room-- == 0) {
          result = Put::kFull;
          break;
        }
        const Outgoing& o = m[*done];
        const u32 need = 1 + (o.stored_len() + 7) / 8;
        u32 at = place(*r, end_pos(h), need);
        if (at == kNoRoom) {
          // What was written so far becomes visible before the ring is left for good.
          r->head.store(h, std::memory_order_release);
          Ring* larger = grow(q, *r, need, waiter.undisturbed());
          if (larger == nullptr) {
            result = Put::kNoMemory;
            break;
          }
          write(*larger, 0, o);
          h = make_end(end_count(h) + 1, need);
          larger->head.store(h, std::memory_order_release);
          CRASH_POINT("put.before_link");
          r->next.store(larger->block, std::memory_order_release);  // the commit
          CRASH_POINT("put.after_link");
          adopt_ring(q, *larger);
          r = larger;
        } else {
          const u32 skip = at - end_pos(h);
          if (skip != 0) reinterpret_cast<Message*>(&r->data[(end_pos(h) & (r->units - 1)) * u64{8}])->kind = kWrap;
          write(*r, at, o);
          h = make_end(end_count(h) + 1, at + need);
        }
      }
      CRASH_POINT("put.before_commit");
      r->head.store(h, kPublish);  // the commit
      CRASH_POINT("put.after_commit");
      q.nput.store(end_count(h), std::memory_order_release);
      for (u32 i = before; i < *done; ++i) {
        u32 owner = me_;  // unless it has been taken already
        if (m[i].cargo != 0) arena_.block(m[i].cargo).owner.compare_exchange_strong(owner, kOwnedByQueue);
      }
    }
    q.put_lock.unlock();
    return result;
  }

  /// After one or more try_put(): tell who waits for items.
  void announce_items(QueueState& q, u32 n) const noexcept {
    fence_after_rmw();
    q.getters.notify(static_cast<int>(std::min<u32>(n, INT32_MAX)));
    if (q.bells_armed.load(std::memory_order_relaxed) & kBellItems) ring_bells(q, kBellItems);
  }

  Put put(QueueState& q, const Outgoing* m, u32 n, u32* done, const Waiter& waiter) const noexcept {
    *done = 0;
    courtesy(q, m[0].len, waiter);
    for (;;) {
      const u32 before = *done;
      Put r = try_put(q, m, n, done, waiter);
      if (*done != before) announce_items(q, *done - before);
      if (r == Put::kNoMemory && arena_.header().departures.load(std::memory_order_relaxed) != 0 &&
          arena_.collect(me_, waiter) != 0) {
        continue;
      }
      if (r != Put::kFull) return r;
      sync_get_side(q, waiter);
      if (!full(q)) continue;
      if (!waiter.may_wait()) return r;
      const auto room = [&] { return !full(q) || (q.flags.load(std::memory_order_relaxed) & kQueueShutDown); };
      if (spin_for(kSpin, room)) continue;
      waiter.before_sleep();
      if (yield_for(m[0].cargo == 0 ? kYield : kLongYield, room)) continue;
      for (IdleSlice slice;;) {
        const u32 key = q.putters.prepare();
        if (room()) break;
        const Wait w = q.putters.sleep(key, waiter, slice.next());
        if (w == Wait::kInterrupted) return Put::kInterrupted;
        sync_get_side(q, waiter);
        if (room()) break;
        if (w == Wait::kTimeout) return Put::kFull;
      }
    }
  }

  // --- get ------------------------------------------------------------------------------------------------------------

  /// Take the oldest message. Joinable: it stays recorded as in this process's hands until task_done().
  Get try_get(QueueState& q, bool joinable, Incoming& out, const Waiter& waiter) const noexcept {
    const Locked l = q.get_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) return Get::kInterrupted;
    if (l == Locked::kRecovered) repair_get(q);
    const Get r = get_locked(q, joinable, out, waiter);
    q.get_lock.unlock();
    return r;
  }

  /// As many messages as are there and fit, up to `n`, under one lock and with one commit a ring; not for JoinableQueue.
  /// Calls `take(message)` for each; it copies the payload and the cargo's number, and returns false when it has no room left.
  template <class Take>
  Get try_get_many(QueueState& q, u32 n, Take&& take, const Waiter& waiter) const noexcept {
    const Locked l = q.get_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) return Get::kInterrupted;
    if (l == Locked::kRecovered) repair_get(q);
    Get result = Get::kDone;
    for (u32 done = 0; done < n;) {
      Ring* r = nullptr;
      u32 pos = 0;
      if (!front(q, &r, &pos)) {
        if (done == 0) result = empty_result(q);
        break;
      }
      const u64 tail = r->tail.load(std::memory_order_relaxed);
      u32 count = end_count(tail);
      bool more = true;
      while (done < n && pos != r->head_seen.load(std::memory_order_relaxed)) {
        const Message& m = message_at(*r, pos);
        if (m.kind == kWrap) {
          pos += r->units - (pos & (r->units - 1));
          continue;
        }
        if (!(more = take(m))) break;
        take_cargo(m);
        pos += 1 + (m.len + 7) / 8;
        ++count;
        ++done;
      }
      if (count != end_count(tail)) {
        r->tail.store(make_end(count, pos), std::memory_order_release);  // the commit
        q.nget.store(count, std::memory_order_release);
      }
      if (!more) {
        if (done == 0) result = Get::kTooSmall;
        break;
      }
    }
    q.get_lock.unlock();
    return result;
  }

  /// After one or more successful gets: tell who waits for room.
  void announce_space(QueueState& q, u32 n) const noexcept {
    if (q.maxsize == 0) return;
    fence_after_rmw();
    q.putters.notify(static_cast<int>(std::min<u32>(n, INT32_MAX)));
    if (q.bells_armed.load(std::memory_order_relaxed) & kBellSpace) ring_bells(q, kBellSpace);
  }

  /// Wait until there may be something to take (kReady: try again), the queue was shut down, or the wait has to end.
  /// `large`: the messages carry arrays, and so the next one may be some 100 us away though its producer is at work.
  Wait wait_items(QueueState& q, bool joinable, const Waiter& waiter, bool large = false) const noexcept {
    const auto some = [&] { return may_have_items(q); };
    if (spin_for(kSpin, some)) return Wait::kReady;
    waiter.before_sleep();
    if (yield_for(large ? kLongYield : kYield, some)) return Wait::kReady;
    u32 slices = 0;
    for (IdleSlice slice;;) {
      const u32 key = q.getters.prepare();
      if (some()) return Wait::kReady;
      const Wait w = q.getters.sleep(key, waiter, slice.next());
      if (some()) return Wait::kReady;
      if (w != Wait::kReady) return w;
      if (joinable && scavenge(q, waiter)) return Wait::kReady;
      // Nothing to do for a second: neither for the memory that was kept for more of the same.
      if (++slices == kIdleSlices) arena_.trim(me_, Waiter::hurried());
    }
  }

  /// A lock-free look, as a hint: the next try_get() decides.
  bool may_have_items(QueueState& q) const noexcept {
    const u32 g = q.get_ring.load(std::memory_order_acquire);
    const Ring& r = ring_at(q, g);
    return end_pos(r.head.load(std::memory_order_acquire)) != end_pos(r.tail.load(std::memory_order_relaxed)) ||
           r.next.load(std::memory_order_acquire) != 0 ||
           q.get_ring.load(std::memory_order_relaxed) != g ||  // that ring was drained and left while we looked
           q.returned.load(std::memory_order_relaxed) != 0 ||
           (q.flags.load(std::memory_order_relaxed) & kQueueShutDown) != 0;
  }

  // --- state ----------------------------------------------------------------------------------------------------------

  /// Exact: with neither lock held the cached counts are the truth; with one held, its holder is waited for or its death
  /// repaired.
  i64 size(QueueState& q, bool joinable, const Waiter& waiter) const noexcept {
    for (;;) {
      if (q.put_lock.holder() != 0) {
        const Locked l = q.put_lock.lock(arena_.slots(), me_, waiter);
        if (l == Locked::kNo) return -1;
        if (l == Locked::kRecovered) repair_put(q, waiter);
        q.put_lock.unlock();
      }
      if (!sync_get_side(q, waiter)) return -1;
      const u32 got = q.nget.load(std::memory_order_acquire);
      const u32 put = q.nput.load(std::memory_order_acquire);
      // Again if a consumer came in between; or took an item whose producer has not counted it yet.
      if (q.nget.load(std::memory_order_acquire) != got || static_cast<i32>(put - got) < 0) continue;
      u32 n = put - got;
      if (n == 0 && joinable && q.in_hand.load(std::memory_order_relaxed) != 0) scavenge(q, waiter);
      if (joinable) n += q.returned.load(std::memory_order_relaxed);
      return n;
    }
  }

  bool full(const QueueState& q) const noexcept {
    return q.maxsize != 0 && static_cast<i32>(q.nput.load(std::memory_order_acquire) -
                                              q.nget.load(std::memory_order_acquire)) >= static_cast<i32>(q.maxsize);
  }

  /// No put succeeds from now on; get goes on until the queue is empty, or not at all when `immediate`.
  bool shut_down(QueueState& q, bool immediate, const Waiter& waiter) const noexcept {
    const Locked p = q.put_lock.lock(arena_.slots(), me_, waiter);
    if (p == Locked::kNo) return false;
    if (p == Locked::kRecovered) repair_put(q, waiter);
    q.flags.fetch_or(kQueueShutDown | (immediate ? kQueueImmediate : 0), std::memory_order_seq_cst);
    q.put_lock.unlock();
    if (immediate) {
      constexpr u32 kAtOnce = 64;
      u32 cargo[kAtOnce];
      for (u32 n = kAtOnce; n == kAtOnce;) {
        n = 0;
        const auto drop = [&](const Message& m) {
          const u32 c = m.cargo();
          if (c != 0 && n == kAtOnce) return false;
          if (c != 0) cargo[n++] = c;
          return true;
        };
        const Get r = try_get_many(q, UINT32_MAX, drop, waiter);
        for (u32 i = 0; i < n; ++i) arena_.unload_cargo(me_, cargo[i], Waiter(0, {}));
        if (r == Get::kInterrupted) return false;
      }
      while (drop_returned(q, waiter)) {}
    }
    fence_after_rmw();
    q.getters.notify(INT32_MAX);
    q.putters.notify(INT32_MAX);
    q.joiners.notify(INT32_MAX);
    if (q.bells_armed.load(std::memory_order_relaxed) != 0) ring_bells(q, kBellItems | kBellSpace);
    return true;
  }

  // --- JoinableQueue --------------------------------------------------------------------------------------------------

  enum class Done : u8 { kYes, kNone, kInterrupted };

  /// The oldest item this process has in hand is done; where it has none, the oldest of anybody's.
  Done task_done(QueueState& q, const Waiter& waiter) const noexcept {
    const Locked l = q.get_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) return Done::kInterrupted;
    if (l == Locked::kRecovered) repair_get(q);
    u32 mine = 0, before_mine = 0, any = 0, before_any = 0;
    for (u32 i = q.in_hand.load(std::memory_order_relaxed), before = 0; i != 0 && mine == 0;
         before = i, i = record(i).next.load(std::memory_order_relaxed)) {
      const Tag t = record(i).tag.load(std::memory_order_relaxed);
      if (t == me_) {
        mine = i;
        before_mine = before;
      } else if (t != 0 && any == 0) {
        any = i;
        before_any = before;
      }
    }
    if (mine == 0) {
      mine = any;
      before_mine = before_any;
    }
    if (mine == 0) {
      q.get_lock.unlock();
      return Done::kNone;
    }
    unlink(q, mine, before_mine);
    q.get_lock.unlock();
    free_record(mine);
    if (all_done(q)) {
      fence_after_rmw();
      q.joiners.notify(INT32_MAX);
    }
    return Done::kYes;
  }

  /// Wait until every item put has been taken and marked done.
  Wait join(QueueState& q, const Waiter& waiter) const noexcept {
    for (IdleSlice slice;;) {
      if (size(q, true, waiter) == 0 && all_done(q)) return Wait::kReady;
      const u32 key = q.joiners.prepare();
      if (all_done(q)) continue;
      const Wait w = q.joiners.sleep(key, waiter, slice.next());
      if (w == Wait::kInterrupted || (w == Wait::kTimeout && !all_done(q))) return w;
      scavenge(q, waiter);
    }
  }

  u32 unfinished(QueueState& q) const noexcept {
    u32 n = q.nput.load(std::memory_order_acquire) - q.nget.load(std::memory_order_acquire);
    for (u32 i = q.in_hand.load(std::memory_order_acquire); i != 0; i = record(i).next.load(std::memory_order_acquire))
      ++n;
    return n;
  }

  /// Items whose consumer died go back, to be delivered again. True when there are some.
  bool scavenge(QueueState& q, const Waiter& waiter, bool* busy = nullptr) const noexcept {
    if (q.in_hand.load(std::memory_order_relaxed) == 0) return false;
    const Locked l = q.get_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) {
      if (busy != nullptr) *busy = true;
      return false;
    }
    if (l == Locked::kRecovered) repair_get(q);
    const u32 back = return_items(q, true);
    q.get_lock.unlock();
    if (back == 0) return false;
    fence_after_rmw();
    q.getters.notify(static_cast<int>(back));
    if (q.bells_armed.load(std::memory_order_relaxed) & kBellItems) ring_bells(q, kBellItems);
    return true;
  }

  // --- bells ----------------------------------------------------------------------------------------------------------

  /// A bell of this process that rings `fd`, a pipe's writing end; -1 when all are taken by the living.
  int add_bell(QueueState& q, int fd) const noexcept {
    for (u32 i = 0; i < kBells; ++i) {
      Bell& b = q.bell[i];
      Tag t = b.tag.load(std::memory_order_acquire);
      if ((t == 0 || arena_.gone(t, true)) && b.tag.compare_exchange_strong(t, me_)) {
        b.armed.store(0, std::memory_order_relaxed);
        struct stat st;
        b.inode.store(fstat(fd, &st) == 0 ? st.st_ino : 0, std::memory_order_relaxed);
        b.pid.store(getpid(), std::memory_order_relaxed);
        b.fd.store(fd, std::memory_order_release);
        return static_cast<int>(i);
      }
    }
    return -1;
  }

  /// The next item (or room) after this rings. Look for what is there already after arming.
  void arm_bell(QueueState& q, int i, u32 what) const noexcept {
    q.bell[i].armed.fetch_or(what, std::memory_order_seq_cst);
    q.bells_armed.fetch_or(what, std::memory_order_seq_cst);
    fence_after_rmw();
  }

  void remove_bell(QueueState& q, int i) const noexcept {
    q.bell[i].armed.store(0, std::memory_order_relaxed);
    Tag t = me_;
    q.bell[i].tag.compare_exchange_strong(t, 0);
  }

  // --- repair, used by collect() too ----------------------------------------------------------------------------------

  /// A producer died inside: what it committed counts, what it did not is overwritten.
  /// It may have died between linking a ring and moving on to it; the get lock keeps consumers from freeing the old one
  /// while the chain is walked.
  void repair_put(QueueState& q, const Waiter& waiter) const noexcept {
    if (q.get_lock.lock(arena_.slots(), me_, waiter.steady()) == Locked::kRecovered) repair_get(q);
    repair_put_locked(q);
    q.get_lock.unlock();
  }

  /// With both locks held.
  void repair_put_locked(QueueState& q) const noexcept {
    Ring* r = &ring_at(q, q.put_ring.load(std::memory_order_relaxed));
    for (u32 next; (next = r->next.load(std::memory_order_acquire)) != 0;) {
      r = &ring_at(q, next);
      adopt_ring(q, *r);
    }
    q.nput.store(end_count(r->head.load(std::memory_order_relaxed)), std::memory_order_release);
  }

  /// collect(): is this ring or record linked? False: somebody is at work in the queue. The locks are taken without
  /// waiting, so their order does not matter.
  bool find_part(QueueState& q, u32 block, bool* in_use) const noexcept {
    const Waiter hurried = Waiter::hurried();
    const Locked get = q.get_lock.lock(arena_.slots(), me_, hurried);
    if (get == Locked::kNo) return false;
    if (get == Locked::kRecovered) repair_get(q);
    const Locked put = q.put_lock.lock(arena_.slots(), me_, hurried);
    if (put == Locked::kRecovered) repair_put_locked(q);
    if (put != Locked::kNo) {
      *in_use = reachable(q, block);
      q.put_lock.unlock();
    }
    q.get_lock.unlock();
    return put != Locked::kNo;
  }

  void repair_get(QueueState& q) const noexcept {
    const Ring& r = ring_at(q, q.get_ring.load(std::memory_order_relaxed));
    const u32 count = end_count(r.tail.load(std::memory_order_relaxed));
    q.nget.store(count, std::memory_order_release);
    u32 back = 0;
    for (u32 i = q.in_hand.load(std::memory_order_relaxed), before = 0, next = 0; i != 0; i = next) {
      Record& rec = record(i);
      next = rec.next.load(std::memory_order_relaxed);
      arena_.block(i).owner.store(kOwnedByQueue, std::memory_order_relaxed);
      q.in_hand_last = i;
      if (static_cast<i32>(count - rec.number) <=
          0) {  // its consumer died before it took the item: the ring still has it, and its cargo
        unlink(q, i, before, false);
        arena_.free(me_, i, Waiter(0, {}));
        continue;
      }
      if (rec.tag.load(std::memory_order_relaxed) == 0) ++back;
      before = i;
    }
    q.returned.store(back, std::memory_order_release);
  }

  /// `f(block)` for the cargo of each message in the rings and in hand. With both locks held, or where nobody else is.
  template <class F>
  void for_each_cargo(QueueState& q, F&& f) const noexcept {
    u32 taken = 0;
    for (u32 i = q.get_ring.load(std::memory_order_acquire), first = 1;; first = 0) {
      const Ring& r = ring_at(q, i);
      const u32 head = end_pos(r.head.load(std::memory_order_acquire));
      const u64 tail = r.tail.load(std::memory_order_acquire);
      if (first != 0) taken = end_count(tail);
      for (u32 pos = end_pos(tail); pos != head;) {
        const Message& m = message_at(r, pos);
        if (m.kind == kWrap) {
          pos += r.units - (pos & (r.units - 1));
          continue;
        }
        if (const u32 c = m.cargo(); c != 0) f(c);
        pos += 1 + (m.len + 7) / 8;
      }
      i = r.next.load(std::memory_order_acquire);
      if (i == 0) break;
    }
    for (u32 i = q.in_hand.load(std::memory_order_acquire); i != 0;
         i = record(i).next.load(std::memory_order_acquire)) {
      const Record& rec = record(i);
      const u32 c = rec.message.cargo();
      if (c != 0 && static_cast<i32>(taken - rec.number) > 0) f(c);  // else its message is in the ring still
    }
  }

  bool reachable(QueueState& q, u32 block) const noexcept {
    if (arena_.block(block).kind == Kind::kCargo) {
      bool found = false;
      for_each_cargo(q, [&](u32 c) { found = found || c == block; });
      return found;
    }
    for (u32 i = q.get_ring.load(std::memory_order_acquire);;) {
      if (i == block) return true;
      const u32 next = ring_at(q, i).next.load(std::memory_order_acquire);
      if (next == 0) break;
      i = next;
    }
    for (u32 i = q.in_hand.load(std::memory_order_acquire); i != 0;
         i = record(i).next.load(std::memory_order_acquire)) {
      if (i == block) return true;
    }
    return false;
  }

  u32 return_items(QueueState& q, bool ask_kernel) const noexcept {
    u32 back = 0;
    Tag alive = me_;
    for (u32 i = q.in_hand.load(std::memory_order_relaxed); i != 0;
         i = record(i).next.load(std::memory_order_relaxed)) {
      const Tag t = record(i).tag.load(std::memory_order_relaxed);
      if (t == 0 || t == alive) continue;
      // One that ended in good order may have left its item to others on purpose, or never meant to mark it.
      if (!arena_.failed(t, ask_kernel)) {
        alive = t;
        continue;
      }
      record(i).tag.store(0, std::memory_order_relaxed);
      ++back;
    }
    q.returned.store(q.returned.load(std::memory_order_relaxed) + back, std::memory_order_release);
    return back;
  }

  bool all_done(QueueState& q) const noexcept {
    return q.nput.load(std::memory_order_acquire) == q.nget.load(std::memory_order_acquire) &&
           q.in_hand.load(std::memory_order_acquire) == 0;
  }

  Ring& ring_at(QueueState& q, u32 block) const noexcept { return block == 0 ? q.ring : arena_.at<Ring>(block); }
  Record& record(u32 block) const noexcept { return arena_.at<Record>(block); }

 private:
  static constexpr u32 kNoRoom = UINT32_MAX;
  static constexpr u32 kTaken = kWaiters;  // a bit that no tag has
  static constexpr u32 kIdleSlices = 12;   // of the IdleSlice above: one second
  // ns; measured in docs/performance.md. The long one is what a copy of 2 MB takes: to sleep and be woken costs both sides 50 us.
  static constexpr i64 kSpin = 3'000, kYield = 30'000, kLongYield = 250'000;
  /// A consumer that takes nothing for this long (ns) is not at work: 100 kB take it 15 us. Paid once a ring, so that a
  /// backlog of 1 GB costs 64 of these.
  static constexpr i64 kCourtesy = 100'000;

  /// The message is being taken, and its cargo with it. The mark tells the taker from a producer of the same process that has
  /// not come to hand it over to the queue yet.
  void take_cargo(const Message& m) const noexcept {
    if (const u32 c = m.cargo(); c != 0) arena_.block(c).owner.store(me_ | kTaken, std::memory_order_release);
  }

  /// A record that has been unlinked, and its cargo.
  void free_record(u32 i) const noexcept {
    const u32 c = record(i).message.cargo();
    arena_.free(me_, i, Waiter(0, {}));
    if (c != 0) arena_.unload_cargo(me_, c, Waiter(0, {}));
  }

  /// Take record `i` out of the list; `before` precedes it, 0 if it is the first. Then the block is ours.
  void unlink(QueueState& q, u32 i, u32 before, bool with_cargo = true) const noexcept {
    Atomic<u32>& link = before == 0 ? q.in_hand : record(before).next;
    arena_.block(i).owner.store(me_, std::memory_order_relaxed);
    if (with_cargo) take_cargo(record(i).message);
    CRASH_POINT("unlink.before_commit");
    link.store(record(i).next.load(std::memory_order_relaxed), std::memory_order_release);  // the commit
    if (q.in_hand_last == i) q.in_hand_last = before;
  }

  static const Message& message_at(const Ring& r, u32 pos) noexcept {
    return *reinterpret_cast<const Message*>(&r.data[(pos & (r.units - 1)) * u64{8}]);
  }

  /// A consumer killed between its commit and the count leaves nget one behind: recovering its lock mends that.
  bool sync_get_side(QueueState& q, const Waiter& waiter) const noexcept {
    if (q.get_lock.holder() == 0) return true;
    const Locked l = q.get_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) return false;
    if (l == Locked::kRecovered) repair_get(q);
    q.get_lock.unlock();
    return true;
  }

  void adopt_ring(QueueState& q, Ring& r) const noexcept {
    if (r.block != 0) arena_.block(r.block).owner.store(kOwnedByQueue, std::memory_order_release);
    q.put_ring.store(r.block, std::memory_order_release);
  }

  /// Position for `need` units, after the filler if the message does not fit before the end; kNoRoom when the ring is full.
  static u32 place(Ring& r, u32 head, u32 need) noexcept {
    const u32 index = head & (r.units - 1);
    const u32 to_end = r.units - index;
    u32 skip = need <= to_end ? 0 : to_end;
    // A message above half a ring might never find its room whole.
    if (need > r.units / 2) return kNoRoom;
    u32 tail = r.tail_seen.load(std::memory_order_relaxed);
    // An empty ring larger than the cache goes back to its start, where the memory is warm. A look at `tail` costs a cache
    // miss, so small messages look every 4 KiB.
    if (index >= kWarmUnits && (need >= 64 || (index & 511) < need)) {
      tail = end_pos(r.tail.load(std::memory_order_acquire));
      r.tail_seen.store(tail, std::memory_order_relaxed);
      if (tail == head && to_end + need <= r.units) skip = to_end;
    }
    if (head + skip + need - tail > r.units) {
      tail = end_pos(r.tail.load(std::memory_order_acquire));
      r.tail_seen.store(tail, std::memory_order_relaxed);
      if (head + skip + need - tail > r.units) return kNoRoom;
    }
    return head + skip;
  }

  static void write(Ring& r, u32 pos, const Outgoing& o) noexcept {
    char* p = &r.data[(pos & (r.units - 1)) * u64{8}];
    const Message m{o.stored_len(), o.kind, o.cargo != 0 ? Message::kCarries : u8{0}, 0};
    std::memcpy(p, &m, sizeof m);
    p += sizeof m;
    if (o.cargo != 0) {
      const u64 prefix = o.cargo;
      std::memcpy(p, &prefix, sizeof prefix);
      p += sizeof prefix;
    }
    std::memcpy(p, o.data, o.len);
  }

  Ring* grow(QueueState& q, const Ring& old, u32 need, const Waiter& waiter) const noexcept {
    u64 bytes = std::clamp<u64>(u64{old.units} * 16, kSecondRing, kLargestRing);
    bytes = std::max<u64>(bytes, u64{need} * 32);
    u64 total = std::bit_ceil(bytes);
    u32 i = arena_.allocate(me_, total + sizeof(Ring), Kind::kRing, q.object.block, waiter);
    if (i == 0) {  // nearly full: the least that holds the message
      total = std::bit_ceil(u64{need} * 8);
      i = arena_.allocate(me_, total + sizeof(Ring), Kind::kRing, q.object.block, waiter);
      if (i == 0) return nullptr;
    }
    Ring& r = arena_.at<Ring>(i);
    r.block = i;
    r.units = static_cast<u32>(total / 8);
    r.next.store(0, std::memory_order_relaxed);
    const u64 start = make_end(end_count(old.head.load(std::memory_order_relaxed)), 0);
    r.head.store(start, std::memory_order_relaxed);
    r.tail.store(start, std::memory_order_relaxed);
    r.tail_seen.store(0, std::memory_order_relaxed);
    r.head_seen.store(0, std::memory_order_relaxed);
    return &r;
  }

  /// A ring that keeps filling outruns the caches and faults in fresh pages, 3-5 times slower (pitfall 24): give a consumer
  /// that is at work the CPU for a moment. Never waits for one that is not.
  void courtesy(QueueState& q, u32 len, const Waiter& waiter) const noexcept {
    if (!waiter.may_wait()) return;
    Ring& r =
        ring_at(q, q.put_ring.load(std::memory_order_acquire));  // no lock: a look at a ring that may be left by now
    if (u64{r.units} * 8 < kCourtesyFrom || u64{len} * 2 > u64{r.units} * 8) return;
    const u32 head = end_pos(r.head.load(std::memory_order_relaxed));
    const u32 need = 2 + (len + 7) / 8;
    const auto used = [&] { return head - end_pos(r.tail.load(std::memory_order_relaxed)); };
    if (head - r.tail_seen.load(std::memory_order_relaxed) + need <= r.units - r.units / 8) return;
    if (used() + need <= r.units - r.units / 8) return;
    waiter.before_sleep();
    u32 seen = used();
    for (i64 patience = now_ns() + kCourtesy; now_ns() < patience;) {
      sched_yield();
      const u32 now = used();
      if (now + need <= r.units / 2) return;
      if (now != seen) patience = now_ns() + kCourtesy;
      seen = now;
    }
  }

  /// The ring and position of the oldest message, fillers passed and drained rings given back. False: none.
  bool front(QueueState& q, Ring** ring, u32* pos) const noexcept {
    for (;;) {
      Ring& r = ring_at(q, q.get_ring.load(std::memory_order_relaxed));
      u32 p = end_pos(r.tail.load(std::memory_order_relaxed));
      if (p == r.head_seen.load(std::memory_order_relaxed) && p == look(r)) {
        const u32 next = r.next.load(std::memory_order_acquire);
        if (next == 0) return false;
        if (p == look(r)) {  // else it grew before it was left
          retire(q, r, next);
          continue;
        }
      }
      if (message_at(r, p).kind == kWrap) p += r.units - (p & (r.units - 1));
      *ring = &r;
      *pos = p;
      return true;
    }
  }

  static u32 look(Ring& r) noexcept {
    const u32 head = end_pos(r.head.load(std::memory_order_acquire));
    r.head_seen.store(head, std::memory_order_relaxed);
    return head;
  }

  /// A drained ring with a successor: move on, and free it.
  void retire(QueueState& q, Ring& r, u32 next) const noexcept {
    u32 old = r.block;
    // Its producer may have died between link and moving on: nobody may write to a freed ring.
    q.put_ring.compare_exchange_strong(old, next);
    const u32 gone = r.block;
    if (gone != 0) arena_.block(gone).owner.store(me_, std::memory_order_release);
    CRASH_POINT("retire.before_move");
    q.get_ring.store(next, std::memory_order_release);  // the commit
    CRASH_POINT("retire.after_move");
    if (gone != 0) arena_.free(me_, gone, Waiter(0, {}));
  }

  Get empty_result(const QueueState& q) const noexcept {
    return q.flags.load(std::memory_order_relaxed) & kQueueShutDown ? Get::kShutDown : Get::kEmpty;
  }

  Get get_locked(QueueState& q, bool joinable, Incoming& out, const Waiter& waiter) const noexcept {
    if (joinable && q.returned.load(std::memory_order_relaxed) != 0) {
      const Get r = get_returned(q, out);
      if (r != Get::kEmpty) return r;
    }
    Ring* r = nullptr;
    u32 pos = 0;
    if (!front(q, &r, &pos)) {
      if (joinable && q.in_hand.load(std::memory_order_relaxed) != 0 && return_items(q, true) != 0)
        return get_returned(q, out);
      return empty_result(q);
    }
    const Message& m = message_at(*r, pos);
    out.len = m.payload_len();
    out.kind = m.kind;
    if (out.len > out.capacity) return Get::kTooSmall;
    const u32 count = end_count(r->tail.load(std::memory_order_relaxed)) + 1;
    u32 rec = 0;
    if (joinable && (rec = take_in_hand(q, m, count - 1, waiter.undisturbed())) == 0) return Get::kNoMemory;
    if (m.len > kLongCopy) waiter.before_sleep();
    std::memcpy(out.data, m.payload(), out.len);
    out.cargo = joinable ? 0 : m.cargo();
    if (!joinable) take_cargo(m);
    const u32 end = pos + 1 + (m.len + 7) / 8;
    CRASH_POINT("get.before_commit");
    r->tail.store(make_end(count, end), std::memory_order_release);  // the commit
    CRASH_POINT("get.after_commit");
    q.nget.store(count, std::memory_order_release);
    return Get::kDone;
  }

  u32 take_in_hand(QueueState& q, const Message& m, u32 number, const Waiter& waiter) const noexcept {
    const u32 i = arena_.allocate(me_, sizeof(Record) + m.len, Kind::kRecord, q.object.block, waiter);
    if (i == 0) return 0;
    Record& rec = record(i);
    rec.next.store(0, std::memory_order_relaxed);
    rec.number = number;
    rec.deliveries = 1;
    rec.message = m;
    std::memcpy(rec.data, &m + 1, m.len);
    rec.tag.store(me_, std::memory_order_relaxed);
    Atomic<u32>& link = q.in_hand.load(std::memory_order_relaxed) == 0 ? q.in_hand : record(q.in_hand_last).next;
    link.store(i, std::memory_order_release);
    q.in_hand_last = i;
    CRASH_POINT("take_in_hand.after_link");
    arena_.block(i).owner.store(kOwnedByQueue, std::memory_order_release);
    return i;
  }

  Get get_returned(QueueState& q, Incoming& out) const noexcept {
    for (u32 i = q.in_hand.load(std::memory_order_relaxed); i != 0;
         i = record(i).next.load(std::memory_order_relaxed)) {
      Record& rec = record(i);
      if (rec.tag.load(std::memory_order_relaxed) != 0) continue;
      out.len = rec.message.payload_len();
      out.kind = rec.message.kind;
      out.cargo = 0;
      if (out.len > out.capacity) return Get::kTooSmall;
      std::memcpy(out.data, rec.message.payload(), out.len);
      rec.deliveries += 1;
      rec.tag.store(me_, std::memory_order_release);  // the commit
      q.returned.store(q.returned.load(std::memory_order_relaxed) - 1, std::memory_order_release);
      return Get::kDone;
    }
    q.returned.store(0, std::memory_order_relaxed);
    return Get::kEmpty;
  }

  /// Drop one of the items that wait to be delivered again; false when there is none (any more).
  bool drop_returned(QueueState& q, const Waiter& waiter) const noexcept {
    const Locked l = q.get_lock.lock(arena_.slots(), me_, waiter);
    if (l == Locked::kNo) return false;
    if (l == Locked::kRecovered) repair_get(q);
    u32 i = q.in_hand.load(std::memory_order_relaxed), before = 0;
    while (i != 0 && record(i).tag.load(std::memory_order_relaxed) != 0) {
      before = i;
      i = record(i).next.load(std::memory_order_relaxed);
    }
    if (i != 0) unlink(q, i, before);
    else q.returned.store(0, std::memory_order_relaxed);
    q.get_lock.unlock();
    if (i != 0) free_record(i);
    return i != 0;
  }

  void ring_bells(QueueState& q, u32 what) const noexcept {
    q.bells_armed.fetch_and(~what, std::memory_order_seq_cst);
    for (Bell& b : q.bell) {
      if (b.tag.load(std::memory_order_acquire) == 0 ||
          (b.armed.fetch_and(~what, std::memory_order_seq_cst) & what) == 0)
        continue;
      char path[64];
      std::snprintf(path, sizeof path, "/proc/%d/fd/%d", b.pid.load(std::memory_order_relaxed),
                    b.fd.load(std::memory_order_relaxed));
      const u64 inode = b.inode.load(std::memory_order_relaxed);
      struct stat st;
      if (stat(path, &st) != 0 || !S_ISFIFO(st.st_mode) || st.st_ino != inode)
        continue;  // do not even open another file
      const int fd = open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC);
      if (fd < 0) continue;  // it is gone, or its /proc is hidden from us: then it polls
      const char byte = 1;
      if (fstat(fd, &st) == 0 && S_ISFIFO(st.st_mode) && st.st_ino == inode) {
        [[maybe_unused]] const ssize_t n = ::write(fd, &byte, 1);
      }
      close(fd);
    }
  }

  static constexpr u32 kLongCopy = 1 << 20;  // from here on a copy takes longer than handing the GIL over
  Arena& arena_;
  Tag me_;
};

}  // namespace procession
