// Threads as processes, each with a slot of its own, for ThreadSanitizer and AddressSanitizer, which see one process only.
// The slots all have this process's pid, so all are alive; nobody dies here (that is crash/ and tests/crash).
#include <thread>

#include "../family.hpp"

using namespace family;

namespace {

/// Run `f(index, tag)` in `n` threads, each a process of the family.
template <class F>
void as_processes(World& w, u32 n, F&& f) {
  std::vector<std::thread> threads;
  for (u32 i = 0; i < n; ++i) {
    threads.emplace_back([&, i] {
      const Tag me = w.arena.claim();
      CHECK(me != 0);
      f(i, me);
    });
  }
  for (std::thread& t : threads) t.join();
}

u32 rounds(u32 n) {
  const char* factor = std::getenv("HAMMER_ROUNDS");
  return factor != nullptr ? n * static_cast<u32>(std::atoi(factor)) : n;
}

/// One message to or from a queue, without the shared buffers of family.hpp.
bool put(World& w, Tag me, QueueState& q, u32 id, u32 len) {
  const std::string s = message(id, len);
  const Outgoing o{1, s.data(), len};
  u32 done = 0;
  return QueueOps(w.arena, me).put(q, &o, 1, &done, Waiter()) == Put::kDone;
}
i64 get(World& w, Tag me, QueueState& q, std::string& buffer) {
  const bool joinable = q.object.kind == Kind::kJoinableQueue;
  const QueueOps ops(w.arena, me);
  Incoming in{buffer.data(), buffer.size(), 0, 0};
  for (;;) {
    const Get r = ops.try_get(q, joinable, in, Waiter());
    if (r == Get::kDone) {
      ops.announce_space(q, 1);
      return message_id(in.data, in.len);
    }
    if (r != Get::kEmpty) return -3;
    ops.wait_items(q, joinable, Waiter());
  }
}

/// 2 producers, 2 consumers: each item once, and each producer's items in order at each consumer.
void two_by_two(u32 maxsize, u32 longest, bool joinable, u32 n) {
  World w;
  const u32 block = w.make_queue(maxsize, joinable);
  QueueState& q = w.queue(block);
  std::vector<std::vector<i64>> got(2);
  Atomic<u32> producers{2};
  as_processes(w, 4, [&](u32 i, Tag me) {
    if (i < 2) {
      for (u32 k = 0; k < n; ++k) CHECK(put(w, me, q, i << 24 | k, 4 + (k * 7919) % longest));
      if (producers.fetch_sub(1) == 1) QueueOps(w.arena, me).shut_down(q, false, Waiter());
    } else {
      std::string buffer(longest + 8, '\0');
      for (i64 id; (id = get(w, me, q, buffer)) >= 0;) {
        got[i - 2].push_back(id);
        if (joinable) CHECK(QueueOps(w.arena, me).task_done(q, Waiter()) == QueueOps::Done::kYes);
      }
    }
  });
  CHECK_EQ(got[0].size() + got[1].size(), 2 * n);
  std::set<i64> all;
  for (const auto& g : got) {
    i64 last[2] = {-1, -1};
    for (const i64 id : g) {
      CHECK(all.insert(id).second);
      CHECK((id >> 24) < 2 && id > last[id >> 24]);
      last[(id >> 24) & 1] = id;
    }
  }
  CHECK_EQ(w.queues().size(q, joinable, Waiter()), 0);
  clean(w);
}

TEST("lock: 4 processes add to a plain number") {
  World w;
  const u32 block = w.make_lock();
  UserLock& l = w.lock(block);
  u64 number = 0;
  const u32 n = rounds(5'000);
  as_processes(w, 4, [&](u32, Tag me) {
    const LockOps ops(w.arena, me);
    for (u32 i = 0; i < n; ++i) {
      Tag died = 0;
      CHECK(ops.acquire(l, Waiter(), &died) == Acquired::kYes);
      ++number;
      CHECK(ops.release(l));
    }
  });
  CHECK_EQ(number, u64{4} * n);
  clean(w);
}

TEST("mutex: 4 processes add to a plain number") {
  World w;
  Mutex& m = w.object(w.make_lock()).guard;
  u64 number = 0;
  const u32 n = rounds(5'000);
  as_processes(w, 4, [&](u32, Tag me) {
    for (u32 i = 0; i < n; ++i) {
      CHECK(m.lock(w.arena.slots(), me, Waiter()) == Locked::kYes);
      ++number;
      m.unlock();
    }
  });
  CHECK_EQ(number, u64{4} * n);
}

TEST("semaphore: never more than its permits, scoped or not") {
  World w;
  const u32 block = w.make_semaphore(2);
  SemaphoreState& s = w.semaphore(block);
  Atomic<int> inside{0};
  const u32 n = rounds(2'000);
  as_processes(w, 4, [&](u32 i, Tag me) {
    const SemaphoreOps ops(w.arena, me);
    for (u32 k = 0; k < n; ++k) {
      const bool scoped = (i & 1) != 0;
      CHECK(ops.acquire(s, scoped, Waiter()) == Wait::kReady);
      CHECK(inside.fetch_add(1) < 2);
      inside.fetch_sub(1);
      CHECK(ops.release(s, scoped, Waiter()) == SemaphoreOps::Released::kYes);
    }
  });
  CHECK_EQ(s.value.load(), 2);
  clean(w);
}

TEST("event: what was written before set() is seen after wait()") {
  World w;
  const u32 there = w.make_event(), back = w.make_event();
  u64 data = 0;
  const u32 n = rounds(500);
  as_processes(w, 2, [&](u32 i, Tag) {
    for (u32 k = 0; k < n; ++k) {
      EventState& mine = w.event(i == 0 ? there : back);
      EventState& other = w.event(i == 0 ? back : there);
      if (i == 0) {
        data = k;
        EventOps::set(mine);
        CHECK(EventOps::wait(other, Waiter()) == Wait::kReady);
        EventOps::clear(other);
      } else {
        CHECK(EventOps::wait(other, Waiter()) == Wait::kReady);
        EventOps::clear(other);
        CHECK_EQ(data, k);
        EventOps::set(mine);
      }
    }
  });
}

TEST("queue: 2 x 2, small") { two_by_two(0, 60, false, rounds(6'000)); }
TEST("queue: 2 x 2, bounded") { two_by_two(3, 60, false, rounds(1'500)); }
TEST("queue: 2 x 2, long messages, rings come and go") { two_by_two(0, 9'000, false, rounds(600)); }
TEST("JoinableQueue: 2 x 2") { two_by_two(0, 100, true, rounds(800)); }

TEST("condition: everybody told is woken, nobody twice") {
  World w;
  const u32 lock = w.make_lock(), block = w.make_condition();
  ConditionState& c = w.condition(block);
  UserLock& l = w.lock(lock);
  u32 tickets = 0, done = 0;  // under the lock
  const u32 n = rounds(400);
  as_processes(w, 4, [&](u32 i, Tag me) {
    const LockOps locks(w.arena, me);
    const ConditionOps ops(w.arena, me);
    Tag died = 0;
    if (i == 0) {
      for (u32 k = 0; k < 3 * n; ++k) {
        locks.acquire(l, Waiter(), &died);
        ++tickets;
        ops.notify(c, 1, Waiter());
        locks.release(l);
      }
      return;
    }
    for (u32 k = 0; k < n; ++k) {
      locks.acquire(l, Waiter(), &died);
      while (tickets == 0) {
        RosterEntry* e = ops.enqueue(c, Waiter());
        CHECK(e != nullptr);
        locks.release(l);
        CHECK(ops.wait(c, *e, Waiter()) == Wait::kReady);
        locks.acquire(l, Waiter(), &died);
      }
      --tickets;
      ++done;
      locks.release(l);
    }
  });
  CHECK_EQ(tickets, 0);
  CHECK_EQ(done, 3 * n);
  clean(w);
}

TEST("barrier: nobody is a round ahead") {
  World w;
  const u32 block = w.make_barrier(3);
  BarrierState& b = w.barrier(block);
  Atomic<u32> round[3] = {};
  const u32 n = rounds(300);
  as_processes(w, 3, [&](u32 i, Tag me) {
    const BarrierOps ops(w.arena, me);
    for (u32 k = 1; k <= n; ++k) {
      round[i].store(k);
      RosterEntry* e = nullptr;
      u32 index = 0, outcome = BarrierOps::kReleased;
      const BarrierOps::Arrival a = ops.arrive(b, false, &e, &index, Waiter());
      CHECK(a == BarrierOps::Arrival::kWaits || a == BarrierOps::Arrival::kLast);
      if (a == BarrierOps::Arrival::kWaits) CHECK(ops.wait(b, *e, &outcome, Waiter()) == Wait::kReady);
      CHECK_EQ(outcome, BarrierOps::kReleased);
      for (const Atomic<u32>& r : round) CHECK(r.load() == k || r.load() == k + 1);
    }
  });
  clean(w);
}

TEST("arena: objects are made, held and dropped by 4, while a fifth collects") {
  World w;
  const u32 shared = w.make_queue();
  const u32 n = rounds(400);
  Atomic<u32> at_work{4};
  as_processes(w, 5, [&](u32 i, Tag me) {
    if (i == 4) {
      while (at_work.load() != 0) {
        w.arena.collect(me, Waiter());
        sched_yield();
      }
      return;
    }
    for (u32 k = 0; k < n; ++k) {
      CHECK(w.arena.hold(me, w.object(shared), me, 1, Waiter()));
      const u32 own = w.arena.allocate_object(me, sizeof(UserLock), Kind::kLock, Waiter());
      CHECK(own != 0);
      w.arena.drop(me, w.object(own), Waiter());
      w.arena.drop(me, w.object(shared), Waiter());
    }
    at_work.fetch_sub(1);
  });
  clean(w, 1);
}

}  // namespace

/// Without slices a lost wake-up hangs, instead of costing some milliseconds.
int main(int argc, char** argv) {
  Waiter::slices_flag().store(false);
  return check::run_all(argc, argv, 300);
}
