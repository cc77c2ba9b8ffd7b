// A family of processes for tests, and an audit of everything that lies in its arena.
#pragma once

#include <sys/wait.h>

#include <set>
#include <string>
#include <vector>

#include "check.hpp"
#include "procession/collect.hpp"

namespace family {

using namespace procession;

/// A small arena and this process's place in it.
struct World {
  Arena arena;
  Tag me = 0;

  explicit World(u64 size = u64{8} << 20, u64 limit = UINT64_MAX) {
    const Arena::Failure f = arena.create(size, limit);
    if (f != Arena::Failure::kNone) {
      std::fprintf(stderr, "no arena: failure %d\n", static_cast<int>(f));
      _exit(3);
    }
    me = arena.claim();
  }
  ~World() { arena.unmap(); }
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  template <class T>
  u32 make(Kind kind, u64 size = sizeof(T)) {
    const u32 i = arena.allocate_object(me, size, kind, Waiter());
    CHECK(i != 0);
    return i;
  }
  u32 make_lock() { return make<UserLock>(Kind::kLock); }
  u32 make_semaphore(i32 value, i32 bound = INT32_MAX) {
    const u32 i = make<SemaphoreState>(bound == INT32_MAX ? Kind::kSemaphore : Kind::kBoundedSemaphore);
    SemaphoreState& s = arena.at<SemaphoreState>(i);
    s.total = value;
    s.bound = bound;
    s.value.store(value);
    return i;
  }
  u32 make_event() { return make<EventState>(Kind::kEvent); }
  u32 make_condition() { return make<ConditionState>(Kind::kCondition); }
  u32 make_barrier(u32 parties) {
    const u32 i = make<BarrierState>(Kind::kBarrier);
    arena.at<BarrierState>(i).parties = parties;
    return i;
  }
  u32 make_queue(u32 maxsize = 0, bool joinable = false) {
    const u32 i = make<QueueState>(joinable ? Kind::kJoinableQueue : Kind::kQueue, kQueueBlock);
    QueueOps::init(arena.at<QueueState>(i), maxsize);
    return i;
  }

  UserLock& lock(u32 i) { return arena.at<UserLock>(i); }
  SemaphoreState& semaphore(u32 i) { return arena.at<SemaphoreState>(i); }
  EventState& event(u32 i) { return arena.at<EventState>(i); }
  ConditionState& condition(u32 i) { return arena.at<ConditionState>(i); }
  BarrierState& barrier(u32 i) { return arena.at<BarrierState>(i); }
  QueueState& queue(u32 i) { return arena.at<QueueState>(i); }
  Object& object(u32 i) { return arena.at<Object>(i); }
  QueueOps queues() { return QueueOps(arena, me); }

  /// Join the family from a fork, with a handle of each of `objects`.
  void enter(const std::vector<u32>& objects) {
    me = arena.claim();
    for (const u32 i : objects) arena.hold(me, object(i), me, 1, Waiter());
  }

  u32 collect() {
    u32 n = 0;
    while (const u32 k = arena.collect(me, Waiter())) n += k;
    return n;
  }
};

inline i64 in_ms(i64 ms) { return now_ns() + ms * kMillisecond; }
inline Waiter soon(i64 ms = 5'000) { return Waiter(in_ms(ms), {}); }
inline Waiter at_once() { return Waiter(0, {}); }

// --- messages ---------------------------------------------------------------------------------------------------------

/// A message of `len` bytes that names itself: a mixture of two, or one half written, is recognised.
inline std::string message(u32 id, u32 len) {
  std::string s(len, '\0');
  for (u32 i = 0; i < len; ++i) s[i] = static_cast<char>((id * 2654435761u + i * 40503u) >> 13);
  if (len >= 4) std::memcpy(s.data(), &id, 4);
  return s;
}
inline u32 message_id(const void* data, u32 len) {
  u32 id = 0;
  if (len < 4) return UINT32_MAX;
  std::memcpy(&id, data, 4);
  return message(id, len) == std::string(static_cast<const char*>(data), len) ? id : UINT32_MAX;
}

inline Put put(World& w, u32 q, u32 id, u32 len, const Waiter& waiter = soon()) {
  const std::string s = message(id, len);
  const Outgoing o{1, s.data(), len};
  u32 done = 0;
  return w.queues().put(w.queue(q), &o, 1, &done, waiter);
}

/// A message that carries a handle of each of `objects`.
inline Put put_carrying(World& w, u32 q, u32 id, u32 len, const std::vector<u32>& objects) {
  std::vector<Object*> carried;
  for (const u32 i : objects) carried.push_back(&w.object(i));
  const std::string s = message(id, len);
  const u32 cargo = w.arena.load_cargo(w.me, q, carried.data(), static_cast<u32>(carried.size()), soon());
  CHECK(cargo != 0);
  const Outgoing o{1, s.data(), len, cargo};
  u32 done = 0;
  const Put r = w.queues().put(w.queue(q), &o, 1, &done, soon());
  if (done == 0) w.arena.unload_cargo(w.me, cargo, soon());
  return r;
}

/// -1: empty, -2: a corrupt message, -3: shut down, -4: no memory, -5: interrupted.
inline i64 get(World& w, u32 q, const Waiter& waiter = at_once()) {
  static std::string buffer(u64{4} << 20, '\0');
  QueueState& s = w.queue(q);
  const bool joinable = s.object.kind == Kind::kJoinableQueue;
  Incoming in{buffer.data(), buffer.size(), 0, 0};
  for (;;) {
    switch (w.queues().try_get(s, joinable, in, waiter)) {
      case Get::kDone: {
        w.queues().announce_space(s, 1);
        const u32 id = message_id(in.data, in.len);
        if (in.cargo != 0) w.arena.unload_cargo(w.me, in.cargo, soon());
        return id == UINT32_MAX || in.kind != 1 ? -2 : static_cast<i64>(id);
      }
      case Get::kEmpty:
        if (!waiter.may_wait() || w.queues().wait_items(s, joinable, waiter) != Wait::kReady) return -1;
        continue;
      case Get::kShutDown: return -3;
      case Get::kNoMemory: return -4;
      default: return -5;
    }
  }
}

/// Ids of all messages there are; -2 stands for a corrupt one.
inline std::vector<i64> drain(World& w, u32 q) {
  std::vector<i64> ids;
  for (i64 id; (id = get(w, q)) >= 0 || id == -2;) ids.push_back(id);
  return ids;
}

// --- processes --------------------------------------------------------------------------------------------------------

/// Run `f` in a child of its own, which ends by _exit(0): a death, as far as the family can tell.
template <class F>
pid_t spawn(F&& f) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  f();
  _exit(check::failures() != 0);
}

/// -signal or exit code.
inline int reap(pid_t pid) {
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

template <class F>
void in_child(F&& f) {
  CHECK_EQ(reap(spawn(f)), 0);
}

// --- audit ------------------------------------------------------------------------------------------------------------

/// Looks at every block, free list, roster and chain, with nobody else at work and all departed processes collected.
/// Returns the first thing that is wrong, or nothing. It takes every lock there is, so a lock left held shows, too.
class Audit {
 public:
  explicit Audit(World& w) : w_(w), a_(w.arena), h_(w.arena.header()) {}

  std::string run() {
    const u32 any = a_.allocate(w_.me, 100, Kind::kRecord, 0, soon(2'000));  // mends the free lists, should it have to
    if (any == 0) return "the allocator's lock is held for ever, or the arena is full";
    a_.free(w_.me, any, soon(2'000));
    if (!locks(h_.alloc, "the allocator's lock") || !locks(h_.collect, "the lock of collect()")) return wrong_;
    const u32 n = h_.nblocks.load();
    part_of_.assign(n, 0);
    carried_.assign(n, 0);
    for (u32 i = 1; i < n && wrong_.empty(); ++i) {
      if (a_.block(i).owner.load() == kOwnedByHolders) object(i);
    }
    for (u32 i = 1; i < n && wrong_.empty(); ++i) {
      if (a_.block(i).owner.load() == kOwnedByHolders && a_.at<Object>(i).cargoes.load() != carried_[i])
        return fail(i, "counts the messages that carry it wrongly");
    }
    u64 used = 0, idle = 0, end = h_.data_off;
    u32 free_blocks = 0;
    for (u32 i = 1; i < n && wrong_.empty(); ++i) {
      const Block& b = a_.block(i);
      const u32 owner = b.owner.load();
      if (b.off < end) return fail(i, "lies over the block before it");
      end = b.off + Arena::class_bytes(b.cls);
      if (owner == 0) {
        ++free_blocks;
        if (part_of_[i] != 0) return fail(i, "is free and part of an object");
        if (b.warm != 0 && Arena::class_bytes(b.cls) >= kPage) idle += Arena::class_bytes(b.cls);
        if (b.warm == 0 && !is_zero(b.off, Arena::class_bytes(b.cls)))
          return fail(i, "is said to be new, and is not zero");
        continue;
      }
      used += Arena::class_bytes(b.cls);
      if (owner == kOwnedByHolders) continue;
      if (owner != kOwnedByQueue) return fail(i, "is leaked: owned by a process that is in no operation");
      if (part_of_[i] == 0) return fail(i, "is leaked: a part that no object reaches");
      if (b.parent != part_of_[i] || b.parent_gen != a_.block(b.parent).gen.load())
        return fail(i, "names the wrong parent");
    }
    if (!wrong_.empty()) return wrong_;
    if (h_.bump < end) return "the bump pointer lies inside a block";
    if (used != h_.used.load())
      return "bytes in use: " + std::to_string(used) + ", counted " + std::to_string(h_.used.load());
    if (idle != h_.idle.load())
      return "bytes that are idle: " + std::to_string(idle) + ", counted " + std::to_string(h_.idle.load());
    if (!is_zero(h_.bump, std::min(h_.size - h_.bump, u64{512} << 10))) return "what is to be carved is not zero";
    std::set<u32> listed;
    for (u32 c = 0; c < kClasses; ++c) {
      for (u32 i = h_.free_list[c].load(); i != 0; i = a_.block(i).next) {
        if (i >= n) return "a free list leads out of the table";
        if (a_.block(i).owner.load() != 0) return fail(i, "has an owner and is in a free list");
        if (a_.block(i).cls != c) return fail(i, "is in another class's free list");
        if (!listed.insert(i).second) return fail(i, "is twice in the free lists");
      }
    }
    if (listed.size() != free_blocks)
      return std::to_string(free_blocks - listed.size()) + " free blocks are in no list";
    return wrong_;
  }

  bool is_zero(u64 offset, u64 n) const {
    const char* at = reinterpret_cast<const char*>(&h_) + offset;
    return std::all_of(at, at + n, [](char c) { return c == 0; });
  }

  /// Blocks that are not free.
  u32 blocks() {
    u32 n = 0;
    for (u32 i = 1; i < h_.nblocks.load(); ++i) n += a_.block(i).owner.load() != 0;
    return n;
  }

 private:
  std::string fail(u32 block, const char* what) {
    if (wrong_.empty()) {
      wrong_ = "block " + std::to_string(block) + " (kind " + std::to_string(static_cast<int>(a_.block(block).kind)) +
               ", owner " + std::to_string(a_.block(block).owner.load()) + ") " + what;
    }
    return wrong_;
  }

  bool locks(Mutex& m, const char* name) {
    if (m.lock(a_.slots(), w_.me, soon(2'000)) == Locked::kNo) {
      wrong_ = std::string(name) + " is held for ever";
      return false;
    }
    m.unlock();
    return true;
  }

  void part(u32 i, u32 parent, Kind kind) {
    if (i >= h_.nblocks.load()) {
      fail(parent, "leads out of the table");
    } else if (part_of_[i] != 0) {
      fail(i, "is reached twice");
    } else {
      part_of_[i] = parent;
      if (a_.block(i).kind != kind) fail(i, "is of another kind than its object takes it for");
    }
  }

  void roster(Roster& r, u32 parent) {
    for (u32 i = r.more.load(); i != 0 && wrong_.empty(); i = a_.at<RosterChunk>(i).next.load())
      part(i, parent, Kind::kRosterChunk);
  }

  void object(u32 i) {
    Object& o = a_.at<Object>(i);
    if (o.block != i) fail(i, "does not know its own name");
    if (o.kind != a_.block(i).kind) fail(i, "is of two kinds");
    bool held = Arena::is_kept(o);
    a_.for_each(o.holders, [&](RosterEntry& e) { held = held || (e.tag.load() != 0 && !a_.gone(e.tag.load(), true)); });
    if (!held) fail(i, "is held by nobody");
    if (!locks(o.guard, "an object's guard")) return;
    roster(o.holders, i);
    switch (o.kind) {
      case Kind::kSemaphore:
      case Kind::kBoundedSemaphore: {
        SemaphoreState& s = w_.semaphore(i);
        i64 taken = 0;
        a_.for_each(s.permits, [&](RosterEntry& e) {
          if (e.tag.load() == 0) return;
          taken += e.value.load();
          if (a_.fate(e.tag.load(), true) == Owner::kDied) fail(i, "has permits written down for a dead process");
        });
        if (s.guard.holder() == 0 && s.value.load() != s.total - taken) fail(i, "counts its permits wrongly");
        roster(s.permits, i);
        break;
      }
      case Kind::kCondition: roster(w_.condition(i).waiters, i); break;
      case Kind::kBarrier: roster(w_.barrier(i).waiters, i); break;
      case Kind::kQueue:
      case Kind::kJoinableQueue: queue(i); break;
      default: break;
    }
  }

  void queue(u32 i) {
    QueueState& q = w_.queue(i);
    const QueueOps ops = w_.queues();
    const i64 size = ops.size(q, q.object.kind == Kind::kJoinableQueue, soon(2'000));
    if (size < 0) {
      fail(i, "has a lock that is held for ever");
      return;
    }
    if (q.put_lock.holder() != 0 || q.get_lock.holder() != 0) fail(i, "is locked though nobody is at work");
    u32 ring = q.get_ring.load(), last = ring, records = 0, last_record = 0;
    i64 messages = 0;
    for (;; ring = ops.ring_at(q, ring).next.load()) {
      Ring& r = ops.ring_at(q, ring);
      if (ring != 0) part(ring, i, Kind::kRing);
      if (!wrong_.empty()) return;
      if (r.block != ring) fail(i, "has a ring that does not know its own name");
      messages += static_cast<i32>(end_count(r.head.load()) - end_count(r.tail.load()));
      if (end_pos(r.head.load()) - end_pos(r.tail.load()) > r.units) fail(i, "has a ring with more than it can hold");
      last = ring;
      if (r.next.load() == 0) break;
      if (end_count(ops.ring_at(q, r.next.load()).head.load()) < end_count(r.head.load()))
        fail(i, "has rings that count backwards");
    }
    if (q.put_ring.load() != last) fail(i, "has producers that write to another ring than the last");
    if (q.nput.load() != end_count(ops.ring_at(q, last).head.load())) fail(i, "counts its puts wrongly");
    if (q.nget.load() != end_count(ops.ring_at(q, q.get_ring.load()).tail.load())) fail(i, "counts its gets wrongly");
    ops.for_each_cargo(q, [&](u32 c) {
      part(c, i, Kind::kCargo);
      if (!wrong_.empty()) return;
      const Cargo& cargo = a_.at<Cargo>(c);
      for (u32 k = 0; k < cargo.n; ++k) {
        const Cargo::Entry& e = cargo.entry[k];
        if (e.counted.load() == 0 || a_.block(e.block).gen.load() != e.gen || !a_.is_live_object(e.block))
          fail(c, "carries what is not there");
        else ++carried_[e.block];
      }
    });
    u32 returned = 0;
    for (u32 r = q.in_hand.load(); r != 0 && wrong_.empty(); r = ops.record(r).next.load()) {
      part(r, i, Kind::kRecord);
      if (ops.record(r).tag.load() == 0) ++returned;
      if (static_cast<i32>(q.nget.load() - ops.record(r).number) <= 0) fail(r, "records an item that was not taken");
      last_record = r;
      ++records;
    }
    if (records != 0 && q.in_hand_last != last_record) fail(i, "does not know its last record");
    if (returned != q.returned.load()) fail(i, "counts its returned items wrongly");
    if (messages + returned != size) {
      wrong_ = "size() is " + std::to_string(size) + " with " + std::to_string(messages) + " messages and " +
               std::to_string(returned) + " returned";
    }
  }

  World& w_;
  Arena& a_;
  Header& h_;
  std::vector<u32> part_of_, carried_;
  std::string wrong_;
};

/// Collect, then audit; `blocks`: how many may be in use, when known.
inline bool clean(World& w, i64 blocks = -1) {
  w.collect();
  Audit audit(w);
  const std::string wrong = audit.run();
  if (!check::report(wrong.empty(), wrong.c_str(), "audit", 0)) return false;
  return blocks < 0 || check::equal(static_cast<i64>(audit.blocks()), blocks, "blocks in use", "audit", 0);
}

}  // namespace family
