// Every operation of the core, killed after every instruction. See step.hpp.
#include "step.hpp"

using namespace step;

namespace {

std::vector<Scenario> scenarios;

void add(Scenario s) { scenarios.push_back(std::move(s)); }

constexpr u32 kMine = 500;  // ids of the victim's own messages

void enter(Scene& s) { s.w.enter(s.objects); }
auto enter_with(u32 messages, u32 len) {
  return [=](Scene& s) {
    enter(s);
    s.prepare_messages(kMine, messages, len);
  };
}

/// Die as a process dies: with everything in hand.
template <class F>
Tag die_after(World& w, F&& f) {
  int tags[2];
  if (pipe(tags) != 0) _exit(91);
  reap(spawn([&] {
    w.me = w.arena.claim();
    f();
    [[maybe_unused]] const ssize_t n = write(tags[1], &w.me, sizeof w.me);
    kill(getpid(), SIGKILL);
  }));
  Tag tag = 0;
  CHECK_EQ(read(tags[0], &tag, sizeof tag), static_cast<ssize_t>(sizeof tag));
  close(tags[0]);
  close(tags[1]);
  return tag;
}

// --- messages that carry handles ----------------------------------------------------------------------------------------------

/// A queue, and an event that is only held by the messages in it.
void make_carrying(Scene& s, u32 messages, bool joinable = false) {
  s.objects = {s.w.make_queue(0, joinable)};
  const u32 event = s.w.make_event();
  for (u32 id = 0; id < messages; ++id) CHECK(put_carrying(s.w, s.objects[0], id, 40, {event, event}) == Put::kDone);
  s.w.arena.drop(s.w.me, s.w.object(event), soon());
  s.number = event;
}

/// The survivor: what is left in the queue can be read; when it is gone, so is the event.
void check_carrying(Scene& s) {
  World& w = s.w;
  QueueState& q = w.queue(s.objects[0]);
  clean(w);
  drain(w, s.objects[0]);
  while (w.queues().task_done(q, soon()) == QueueOps::Done::kYes) continue;
  clean(w, 1);
  for (u32 id = 0; id < 20; ++id) {
    const u32 event = w.make_event();
    CHECK(put_carrying(w, s.objects[0], id, 100, {event}) == Put::kDone);
    w.arena.drop(w.me, w.object(event), soon());
  }
  clean(w);
  CHECK_EQ(drain(w, s.objects[0]).size(), 20);
  while (w.queues().task_done(q, soon()) == QueueOps::Done::kYes) continue;
  clean(w);
}

void cargo_scenarios() {
  add({"put, of a message that carries handles",
       [](Scene& s) {
         s.objects = {s.w.make_queue(), s.w.make_event(), s.w.make_lock()};
         CHECK(put_carrying(s.w, s.objects[0], 0, 40, {s.objects[1]}) == Put::kDone);
       },
       enter_with(1, 40),
       [](Scene& s) {
         Object* const objects[] = {&s.w.object(s.objects[1]), &s.w.object(s.objects[2])};
         s.out[0].cargo = s.w.arena.load_cargo(s.w.me, s.objects[0], objects, 2, Waiter());
         s.put();
       },
       [](Scene& s) {
         clean(s.w);
         const auto n = drain(s.w, s.objects[0]).size();
         CHECK(n == 1 || n == 2);
         if (s.reached_end) CHECK_EQ(n, 2);
         clean(s.w, 3);
       }});
  add({"get, of a message that carries the last handle", [](Scene& s) { make_carrying(s, 1); }, enter,
       [](Scene& s) { s.get(); },
       [](Scene& s) {
         if (s.reached_end) clean(s.w, 1);
         check_carrying(s);
       }});
  add({"get, of one message of two that carry", [](Scene& s) { make_carrying(s, 2); }, enter, [](Scene& s) { s.get(); },
       check_carrying});
  add({"JoinableQueue get, of a message that carries", [](Scene& s) { make_carrying(s, 2, true); }, enter,
       [](Scene& s) { s.get(); },
       [](Scene& s) {
         s.w.queues().scavenge(s.w.queue(s.objects[0]), soon());
         clean(s.w);
         CHECK_EQ(drain(s.w, s.objects[0]).size(), 2);
         check_carrying(s);
       }});
  add({"task_done, of a message that carries",
       [](Scene& s) {
         make_carrying(s, 2, true);
         get(s.w, s.objects[0]);
       },
       enter, [](Scene& s) { s.w.queues().task_done(s.w.queue(s.objects[0]), Waiter()); }, check_carrying});
  add({"shutdown, immediate, of messages that carry", [](Scene& s) { make_carrying(s, 3); }, enter,
       [](Scene& s) { s.w.queues().shut_down(s.w.queue(s.objects[0]), true, Waiter()); },
       [](Scene& s) {
         CHECK(s.w.queues().shut_down(s.w.queue(s.objects[0]), true, soon()));
         clean(s.w, 1);
       }});
  add({"dropping the last handle of a queue with messages that carry", [](Scene&) {},
       [](Scene& s) {
         enter(s);
         make_carrying(s, 3);
       },
       [](Scene& s) { s.w.arena.drop(s.w.me, s.w.object(s.objects[0]), Waiter()); }, [](Scene& s) { clean(s.w, 0); }});
}

// --- queue ------------------------------------------------------------------------------------------------------------------

/// The survivor: the queue holds `first`..`last`, then perhaps some of the victim's (the whole of each, in order), and works.
void check_put(Scene& s, u32 first, u32 last, u32 mine) {
  World& w = s.w;
  const u32 q = s.objects[0];
  const i64 size = w.queues().size(w.queue(q), false, soon());
  CHECK(put(w, q, 900, 50) == Put::kDone);
  CHECK_EQ(w.queues().size(w.queue(q), false, soon()), size + 1);
  const std::vector<i64> ids = drain(w, q);
  CHECK_EQ(static_cast<i64>(ids.size()), size + 1);
  u32 i = 0;
  for (u32 id = first; id <= last; ++id, ++i) CHECK(i < ids.size() && ids[i] == id);
  u32 n = 0;
  for (; i < ids.size() && ids[i] == kMine + n; ++i) ++n;
  CHECK(n <= mine);
  if (s.reached_end) CHECK_EQ(n, mine);
  CHECK(i + 1 == ids.size() && ids[i] == 900);
  CHECK_EQ(w.queues().size(w.queue(q), false, soon()), 0);
  for (u32 id = 0; id < 40; ++id) CHECK(put(w, q, id, 100) == Put::kDone);
  CHECK_EQ(drain(w, q).size(), 40);
  clean(w);
}

/// The survivor: the queue held `first`..`last`; the victim took up to `n`, and those alone may be gone.
void check_get(Scene& s, u32 first, u32 last, u32 n) {
  World& w = s.w;
  const u32 q = s.objects[0];
  const i64 size = w.queues().size(w.queue(q), false, soon());
  const std::vector<i64> ids = drain(w, q);
  CHECK_EQ(static_cast<i64>(ids.size()), size);
  const u32 all = last - first + 1;
  CHECK(ids.size() <= all && ids.size() + n >= all);
  if (s.reached_end) CHECK_EQ(ids.size(), all - n);
  for (u32 i = 0; i < ids.size(); ++i) CHECK_EQ(ids[ids.size() - 1 - i], last - i);
  const u32 more = w.queue(q).maxsize != 0 ? w.queue(q).maxsize : 40;
  for (u32 id = 0; id < more; ++id) CHECK(put(w, q, id, 100) == Put::kDone);
  CHECK_EQ(drain(w, q).size(), more);
  clean(w);
}

void make_queue(Scene& s, u32 maxsize = 0, bool joinable = false) { s.objects = {s.w.make_queue(maxsize, joinable)}; }
void fill(Scene& s, u32 first, u32 last, u32 len) {
  for (u32 id = first; id <= last; ++id) CHECK(put(s.w, s.objects[0], id, len) == Put::kDone);
}

void queue_scenarios() {
  add({"put, with room",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 1, 40);
       },
       enter_with(1, 40), [](Scene& s) { s.put(); }, [](Scene& s) { check_put(s, 0, 1, 1); }});
  add({"put, bounded",
       [](Scene& s) {
         make_queue(s, 3);
         fill(s, 0, 1, 40);
       },
       enter_with(1, 40), [](Scene& s) { s.put(); },
       [](Scene& s) {
         World& w = s.w;
         const u32 q = s.objects[0];
         const i64 size = w.queues().size(w.queue(q), false, soon());
         CHECK(size == 2 || size == 3);
         if (size == 2) CHECK(put(w, q, 7, 40, at_once()) == Put::kDone);
         CHECK(put(w, q, 8, 40, at_once()) == Put::kFull);
         CHECK(w.queues().full(w.queue(q)));
         CHECK_EQ(drain(w, q).size(), 3);
         clean(w);
       }});
  add({"put, round the end of the ring",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 8, 100);
         for (int i = 0; i < 7; ++i) get(s.w, s.objects[0]);
       },
       enter_with(1, 100), [](Scene& s) { s.put(); }, [](Scene& s) { check_put(s, 7, 8, 1); }});
  add({"put, with growth",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 7, 110);
       },
       enter_with(1, 200), [](Scene& s) { s.put(); }, [](Scene& s) { check_put(s, 0, 7, 1); }});
  add({"put, of a message above half a ring",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 2, 110);
       },
       enter_with(1, 700), [](Scene& s) { s.put(); }, [](Scene& s) { check_put(s, 0, 2, 1); }});
  add({"put_many, 5 messages into two rings",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 5, 110);
       },
       enter_with(5, 110), [](Scene& s) { s.put(); }, [](Scene& s) { check_put(s, 0, 5, 5); }});
  add({"get",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 3, 40);
       },
       enter, [](Scene& s) { s.get(); }, [](Scene& s) { check_get(s, 0, 3, 1); }});
  add({"get, of a bounded queue",
       [](Scene& s) {
         make_queue(s, 4);
         fill(s, 0, 3, 40);
       },
       enter, [](Scene& s) { s.get(); }, [](Scene& s) { check_get(s, 0, 3, 1); }});
  add({"get, that leaves the first ring",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 0, 40);
         fill(s, 1, 3, 900);
         get(s.w, s.objects[0]);
       },
       enter, [](Scene& s) { s.get(); }, [](Scene& s) { check_get(s, 1, 3, 1); }});
  add({"get, that frees a ring",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 40, 3000);
         // Up to the last message of the second ring: the next get leaves that ring for the third.
         const auto ring = [&] {
           return &s.w.queues().ring_at(s.w.queue(s.objects[0]), s.w.queue(s.objects[0]).get_ring.load());
         };
         while (ring()->block == 0 || end_pos(ring()->head.load()) != end_pos(ring()->tail.load()))
           s.number = static_cast<u32>(get(s.w, s.objects[0])) + 1;
         CHECK(ring()->next.load() != 0 && s.number < 35);
       },
       enter, [](Scene& s) { s.get(); }, [](Scene& s) { check_get(s, s.number, 40, 1); }});
  add({"get_many, over three rings",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 7, 110);
         fill(s, 8, 33, 2900);
       },
       enter,
       [](Scene& s) {
         s.w.queues().try_get_many(s.w.queue(s.objects[0]), 32, [](const Message&) { return true; }, soon());
       },
       [](Scene& s) { check_get(s, 0, 33, 32); }});
  add({"shutdown",
       [](Scene& s) {
         make_queue(s);
         fill(s, 0, 3, 40);
       },
       enter, [](Scene& s) { s.w.queues().shut_down(s.w.queue(s.objects[0]), false, soon()); },
       [](Scene& s) {
         const Put p = put(s.w, s.objects[0], 4, 40);
         CHECK(p == Put::kDone || p == Put::kShutDown);
         if (s.reached_end) CHECK(p == Put::kShutDown);
         CHECK_EQ(drain(s.w, s.objects[0]).size(), p == Put::kDone ? 5 : 4);
         clean(s.w);
       }});
  add({"shutdown, immediate, of a JoinableQueue",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
         die_after(s.w, [&] { get(s.w, s.objects[0]); });
         s.w.queues().scavenge(s.w.queue(s.objects[0]), soon());
       },
       enter, [](Scene& s) { s.w.queues().shut_down(s.w.queue(s.objects[0]), true, soon()); },
       [](Scene& s) {
         const std::vector<i64> ids = drain(s.w, s.objects[0]);
         if (s.reached_end) CHECK_EQ(ids.size(), 0);
         CHECK(s.w.queues().shut_down(s.w.queue(s.objects[0]), true, soon()));
         while (s.w.queues().task_done(s.w.queue(s.objects[0]), soon()) == QueueOps::Done::kYes) continue;
         CHECK(s.w.queues().join(s.w.queue(s.objects[0]), soon()) == Wait::kReady);
         clean(s.w);
       }});

  // JoinableQueue: nothing is ever lost; what the dead had in hand comes again.
  const auto all_come = [](Scene& s, u32 first, u32 last, u32 done) {
    World& w = s.w;
    const u32 q = s.objects[0];
    QueueState& state = w.queue(q);
    w.queues().scavenge(state, soon());
    const i64 size = w.queues().size(state, true, soon());
    std::vector<i64> ids = drain(w, q);
    CHECK_EQ(static_cast<i64>(ids.size()), size);
    std::sort(ids.begin(), ids.end());
    CHECK(std::adjacent_find(ids.begin(), ids.end()) == ids.end());
    const u32 all = last - first + 1;
    CHECK(ids.size() <= all && ids.size() + done >= all);
    if (s.reached_end) CHECK_EQ(ids.size(), all - done);
    for (u32 i = 0; i < ids.size(); ++i) CHECK_EQ(ids[ids.size() - 1 - i], last - i);
    CHECK_EQ(w.queues().unfinished(state), ids.size());
    CHECK(w.queues().join(state, at_once()) == Wait::kTimeout || ids.empty());
    for (u32 i = 0; i < ids.size(); ++i) CHECK(w.queues().task_done(state, soon()) == QueueOps::Done::kYes);
    CHECK(w.queues().task_done(state, soon()) == QueueOps::Done::kNone);
    CHECK(w.queues().join(state, soon()) == Wait::kReady);
    clean(w);
  };
  add({"JoinableQueue get",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
       },
       enter, [](Scene& s) { s.get(); }, [all_come](Scene& s) { all_come(s, 0, 3, 0); }});
  add({"JoinableQueue get, with others in hand",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
         die_after(s.w, [&] {
           get(s.w, s.objects[0]);
           get(s.w, s.objects[0]);
         });
       },
       enter, [](Scene& s) { s.get(); }, [all_come](Scene& s) { all_come(s, 0, 3, 0); }});
  add({"JoinableQueue get, redelivered",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
         die_after(s.w, [&] {
           get(s.w, s.objects[0]);
           get(s.w, s.objects[0]);
         });
         s.w.queues().scavenge(s.w.queue(s.objects[0]), soon());
       },
       enter, [](Scene& s) { s.get(); }, [all_come](Scene& s) { all_come(s, 0, 3, 0); }});
  add({"JoinableQueue scavenge",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
         die_after(s.w, [&] {
           get(s.w, s.objects[0]);
           get(s.w, s.objects[0]);
         });
       },
       enter, [](Scene& s) { s.w.queues().scavenge(s.w.queue(s.objects[0]), soon()); },
       [all_come](Scene& s) { all_come(s, 0, 3, 0); }});
  add({"JoinableQueue get and task_done",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
       },
       enter,
       [](Scene& s) {
         s.get();
         s.w.queues().task_done(s.w.queue(s.objects[0]), soon());
       },
       [all_come](Scene& s) { all_come(s, 0, 3, 1); }});
  add({"JoinableQueue task_done, of the middle one",
       [](Scene& s) {
         make_queue(s, 0, true);
         fill(s, 0, 3, 40);
         die_after(s.w, [&] { get(s.w, s.objects[0]); });
       },
       [](Scene& s) {
         enter(s);
         get(s.w, s.objects[0]);
         die_after(s.w, [&] { get(s.w, s.objects[0]); });
       },
       [](Scene& s) { s.w.queues().task_done(s.w.queue(s.objects[0]), soon()); },
       [](Scene& s) {
         World& w = s.w;
         QueueState& state = w.queue(s.objects[0]);
         w.queues().scavenge(state, soon());
         std::vector<i64> ids = drain(w, s.objects[0]);
         std::sort(ids.begin(), ids.end());
         const bool all = ids == std::vector<i64>{0, 1, 2, 3}, but_one = ids.size() == 3 && ids[0] == 0;
         CHECK(all || but_one);
         for (size_t i = 0; i < ids.size(); ++i) CHECK(w.queues().task_done(state, soon()) == QueueOps::Done::kYes);
         CHECK(w.queues().join(state, soon()) == Wait::kReady);
         clean(w);
       }});
  add({"bell: add, arm, ring, remove", [](Scene& s) { make_queue(s); }, enter_with(1, 40),
       [](Scene& s) {
         int ends[2];
         if (pipe(ends) != 0) return;
         const QueueOps ops = s.w.queues();
         QueueState& q = s.w.queue(s.objects[0]);
         const int bell = ops.add_bell(q, ends[1]);
         ops.arm_bell(q, bell, kBellItems);
         s.put();
         ops.remove_bell(q, bell);
       },
       [](Scene& s) {
         QueueState& q = s.w.queue(s.objects[0]);
         int ends[2];
         if (pipe2(ends, O_NONBLOCK) != 0) return;
         const size_t before = drain(s.w, s.objects[0]).size();
         CHECK(before <= 1);
         for (u32 i = 0; i < kBells; ++i) CHECK(s.w.queues().add_bell(q, ends[1]) >= 0);  // the dead one's is free, too
         s.w.queues().arm_bell(q, 0, kBellItems);
         CHECK(put(s.w, s.objects[0], 1, 10) == Put::kDone);
         char byte = 0;
         CHECK_EQ(read(ends[0], &byte, 1), 1);
         clean(s.w);
       }});
}

// --- locks ------------------------------------------------------------------------------------------------------------------

void lock_scenarios() {
  const auto usable = [](Scene& s, bool may_be_held) {
    World& w = s.w;
    UserLock& l = w.lock(s.objects[0]);
    const LockOps ops(w.arena, w.me);
    for (int i = 0; i < 2; ++i) {
      Tag died = 0;
      const Acquired a = ops.acquire(l, soon(), &died);
      CHECK(a == Acquired::kYes || (may_be_held && i == 0 && a == Acquired::kOwnerDied));
      CHECK(ops.held_by_me(l));
      CHECK(ops.release(l));
    }
    CHECK(!ops.release(l));
    clean(w);
  };
  const auto make = [](Scene& s) { s.objects = {s.w.make_lock()}; };
  add({"lock acquire", make, enter,
       [](Scene& s) {
         Tag d;
         LockOps(s.w.arena, s.w.me).acquire(s.w.lock(s.objects[0]), soon(), &d);
       },
       [usable](Scene& s) {
         const bool held = (s.w.lock(s.objects[0]).word.load() & kTagMask) != 0;
         if (s.reached_end) CHECK(held);
         usable(s, held);
       }});
  add({"lock release", make,
       [](Scene& s) {
         enter(s);
         Tag d;
         LockOps(s.w.arena, s.w.me).acquire(s.w.lock(s.objects[0]), soon(), &d);
       },
       [](Scene& s) { LockOps(s.w.arena, s.w.me).release(s.w.lock(s.objects[0])); },
       [usable](Scene& s) { usable(s, !s.reached_end); }});
  add({"lock acquire, from the dead",
       [make](Scene& s) {
         make(s);
         die_after(s.w, [&] {
           Tag d;
           LockOps(s.w.arena, s.w.me).acquire(s.w.lock(s.objects[0]), soon(), &d);
         });
       },
       enter,
       [](Scene& s) {
         Tag d;
         LockOps(s.w.arena, s.w.me).acquire(s.w.lock(s.objects[0]), soon(), &d);
       },
       [usable](Scene& s) { usable(s, true); }});
  add({"collect, with a dead holder of a lock",
       [make](Scene& s) {
         make(s);
         die_after(s.w, [&] {
           Tag d;
           LockOps(s.w.arena, s.w.me).acquire(s.w.lock(s.objects[0]), soon(), &d);
         });
       },
       enter, [](Scene& s) { s.w.arena.collect(s.w.me, soon()); },
       [usable](Scene& s) {
         s.w.collect();
         Tag died = 0;
         CHECK(LockOps(s.w.arena, s.w.me).acquire(s.w.lock(s.objects[0]), soon(), &died) == Acquired::kOwnerDied);
         CHECK_EQ(died, kOrphaned);
         LockOps(s.w.arena, s.w.me).release(s.w.lock(s.objects[0]));
         usable(s, false);
       }});
}

// --- semaphores -------------------------------------------------------------------------------------------------------------

/// Permits that can be taken at once; then they are given back.
u32 permits(World& w, SemaphoreState& s) {
  u32 n = 0;
  while (SemaphoreOps(w.arena, w.me).acquire(s, true, soon(8)) == Wait::kReady) ++n;
  for (u32 i = 0; i < n; ++i)
    CHECK(SemaphoreOps(w.arena, w.me).release(s, true, soon()) == SemaphoreOps::Released::kYes);
  CHECK_EQ(s.value.load(), n);
  return n;
}

void semaphore_scenarios() {
  for (const bool scoped : {false, true}) {
    const auto take = [scoped](Scene& s) {
      SemaphoreOps(s.w.arena, s.w.me).acquire(s.w.semaphore(s.objects[0]), scoped, soon());
    };
    const auto give = [scoped](Scene& s) {
      SemaphoreOps(s.w.arena, s.w.me).release(s.w.semaphore(s.objects[0]), scoped, soon());
    };
    const auto make = [](Scene& s) { s.objects = {s.w.make_semaphore(2)}; };
    add({scoped ? "semaphore acquire, scoped" : "semaphore acquire", make, enter, take, [scoped](Scene& s) {
           const u32 n = permits(s.w, s.w.semaphore(s.objects[0]));
           CHECK(scoped ? n == 2 : n == 1 || n == 2);
           if (s.reached_end && !scoped) CHECK_EQ(n, 1);
           clean(s.w);
         }});
    add({scoped ? "semaphore release, scoped" : "semaphore release", make,
         [take](Scene& s) {
           enter(s);
           take(s);
         },
         give,
         [scoped](Scene& s) {
           const u32 n = permits(s.w, s.w.semaphore(s.objects[0]));
           CHECK(scoped || s.reached_end ? n == 2 : n == 1 || n == 2);
           clean(s.w);
         }});
    // The permit is either still the victim's, or free: a waiter must get it, if the victim took it scoped, in any case.
    add({scoped ? "semaphore release, scoped, with a waiter" : "semaphore release, with a waiter",
         [](Scene& s) { s.objects = {s.w.make_semaphore(1)}; },
         [take](Scene& s) {
           enter(s);
           take(s);
         },
         give,
         [scoped](Scene& s) {
           SemaphoreState& sem = s.w.semaphore(s.objects[0]);
           // Nothing but the wait itself may find out that the guard's holder died.
           const bool started = sem.total != (scoped ? 1 : 0) || sem.value.load() != 0;
           const bool got =
               SemaphoreOps(s.w.arena, s.w.me).acquire(sem, false, soon(started || scoped ? 2'000 : 8)) == Wait::kReady;
           if (started || scoped) CHECK(got);
           clean(s.w);
         }});
  }
  add({"semaphore acquire, with the roster full",
       [](Scene& s) {
         s.objects = {s.w.make_semaphore(9)};
         for (int i = 0; i < 5; ++i) {
           const Tag other = s.w.arena.reserve_child(s.w.me);
           SemaphoreOps(s.w.arena, other).acquire(s.w.semaphore(s.objects[0]), true, soon());
         }
       },
       enter, [](Scene& s) { SemaphoreOps(s.w.arena, s.w.me).acquire(s.w.semaphore(s.objects[0]), true, soon()); },
       [](Scene& s) {
         CHECK_EQ(permits(s.w, s.w.semaphore(s.objects[0])), 4);
         clean(s.w);
       }});
  add({"semaphore reclaim",
       [](Scene& s) {
         s.objects = {s.w.make_semaphore(2, 2)};
         for (int i = 0; i < 2; ++i) {
           die_after(s.w, [&] { SemaphoreOps(s.w.arena, s.w.me).acquire(s.w.semaphore(s.objects[0]), true, soon()); });
         }
       },
       enter, [](Scene& s) { SemaphoreOps(s.w.arena, s.w.me).reclaim(s.w.semaphore(s.objects[0]), soon()); },
       [](Scene& s) {
         CHECK_EQ(permits(s.w, s.w.semaphore(s.objects[0])), 2);
         clean(s.w);
       }});
}

// --- event, condition, barrier ------------------------------------------------------------------------------------------------

u32 state_of(const RosterEntry* e) { return e->value.load() & ConditionOps::kStateMask; }

void condition_scenarios() {
  add({"event set", [](Scene& s) { s.objects = {s.w.make_event()}; }, enter,
       [](Scene& s) { EventOps::set(s.w.event(s.objects[0])); },
       [](Scene& s) {
         EventState& e = s.w.event(s.objects[0]);
         if (s.reached_end) CHECK(EventOps::is_set(e));
         if (!EventOps::is_set(e)) EventOps::set(e);
         CHECK(EventOps::wait(e, soon()) == Wait::kReady);
         clean(s.w);
       }});
  const auto make = [](u32 waiters) {
    return [waiters](Scene& s) {
      s.objects = {s.w.make_condition()};
      for (u32 i = 0; i < waiters; ++i)
        s.waiting.push_back(ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon()));
    };
  };
  const auto usable = [](Scene& s) {
    ConditionState& c = s.w.condition(s.objects[0]);
    const ConditionOps ops(s.w.arena, s.w.me);
    // Everybody who still waits is told, in order, and no corpse with them.
    u32 waiting = 0;
    for (RosterEntry* e : s.waiting) waiting += state_of(e) == ConditionOps::kWaiting;
    RosterEntry* mine = ops.enqueue(c, soon());
    CHECK(mine != nullptr);
    CHECK_EQ(ops.notify(c, waiting, soon()), waiting);
    for (RosterEntry* e : s.waiting) CHECK_EQ(state_of(e), ConditionOps::kNotified);
    CHECK_EQ(state_of(mine), ConditionOps::kWaiting);
    const i32 told = ops.notify(c, 5, soon());
    CHECK(told <=
          2);  // a corpse that nobody has found yet counts; one that passed its notification on to `mine` does not
    CHECK(ops.wait(c, *mine, soon()) == Wait::kReady);
    for (RosterEntry* e : s.waiting) CHECK(ops.wait(c, *e, soon()) == Wait::kReady);
    CHECK_EQ(ops.notify(c, 5, soon()), 0);
    clean(s.w);
  };
  add({"condition enqueue", make(2), enter,
       [](Scene& s) { ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon()); }, usable});
  add({"condition enqueue, with the roster full", make(5), enter,
       [](Scene& s) { ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon()); }, usable});
  add({"condition notify, 2 of 3", make(3), enter,
       [](Scene& s) { ConditionOps(s.w.arena, s.w.me).notify(s.w.condition(s.objects[0]), 2, soon()); },
       [usable](Scene& s) {
         u32 told = 0;
         for (RosterEntry* e : s.waiting) told += state_of(e) == ConditionOps::kNotified;
         CHECK(told <= 2);
         if (s.reached_end) CHECK_EQ(told, 2);
         for (u32 i = 0; i < told; ++i) CHECK_EQ(state_of(s.waiting[i]), ConditionOps::kNotified);
         usable(s);
       }});
  add({"condition wait, that times out", make(1),
       [](Scene& s) {
         enter(s);
         s.waiting.push_back(ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon()));
       },
       [](Scene& s) { ConditionOps(s.w.arena, s.w.me).wait(s.w.condition(s.objects[0]), *s.waiting[1], at_once()); },
       usable});

  // A notification that its waiter did not live to take goes to the next in line, wherever the waiter died.
  const auto passed_on = [usable](Scene& s) {
    ConditionState& c = s.w.condition(s.objects[0]);
    RosterEntry* next = s.waiting[0];
    CHECK(ConditionOps(s.w.arena, s.w.me).wait(c, *next, soon(1'000)) == Wait::kReady);
    s.waiting.clear();
    usable(s);
  };
  add({"condition wait, notified, taken", make(0),
       [](Scene& s) {
         enter(s);
         s.waiting = {ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon())};
         ConditionOps(s.w.arena, s.w.me).notify(s.w.condition(s.objects[0]), 1, soon());
       },
       [](Scene& s) { ConditionOps(s.w.arena, s.w.me).wait(s.w.condition(s.objects[0]), *s.waiting[0], soon()); },
       usable});
  // The victim heads the line, is notified and interrupted at once: it hands the notification on.
  Scenario handing{"condition wait, notified and interrupted",
                   [](Scene& s) {
                     s.objects = {s.w.make_condition()};
                     s.tag = s.w.me;
                   },
                   [](Scene&) {},
                   {},
                   passed_on,
                   true};
  handing.setup = [](Scene& s) {
    s.objects = {s.w.make_condition()};
    s.tag = s.w.me;
    // The place of the victim, taken in its name: it is the next slot to be claimed.
    Tag& victim = s.w.me;
    const Tag parent = victim;
    victim = s.w.arena.reserve_child(parent);
    s.number = victim;
    RosterEntry* first = ConditionOps(s.w.arena, victim).enqueue(s.w.condition(s.objects[0]), soon());
    victim = parent;
    s.waiting = {ConditionOps(s.w.arena, parent).enqueue(s.w.condition(s.objects[0]), soon()), first};
  };
  handing.prepare = [](Scene& s) {
    s.w.arena.enter_reserved(s.number);
    s.w.me = s.number;
  };
  handing.act = [](Scene& s) {
    Waiter::Hooks hooks;
    hooks.self = &s;
    hooks.interrupted = [](void* self) {
      Scene& scene = *static_cast<Scene*>(self);
      ConditionOps(scene.w.arena, scene.tag).notify(scene.w.condition(scene.objects[0]), 1, soon());
      scene.begin();
      return true;
    };
    ConditionOps(s.w.arena, s.w.me).wait(s.w.condition(s.objects[0]), *s.waiting[1], Waiter(kForever, hooks));
  };
  add(handing);
  // The victim cleans up after a waiter that died notified.
  const auto corpse = [](Scene& s) {
    s.objects = {s.w.make_condition()};
    die_after(s.w, [&] { ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon()); });
    s.waiting = {ConditionOps(s.w.arena, s.w.me).enqueue(s.w.condition(s.objects[0]), soon())};
    s.w.arena.for_each(s.w.condition(s.objects[0]).waiters, [&](RosterEntry& e) {  // as notify() left it
      if (e.tag.load() != 0 && &e != s.waiting[0])
        e.value.store((e.value.load() & ~ConditionOps::kStateMask) | ConditionOps::kNotified);
    });
  };
  add({"condition sweep, of a waiter that died notified", corpse, enter,
       [](Scene& s) { ConditionOps(s.w.arena, s.w.me).sweep(s.w.condition(s.objects[0]), soon()); }, passed_on});
  add({"condition notify, with a waiter that died notified",
       [corpse](Scene& s) {
         corpse(s);
         s.w.arena.for_each(s.w.condition(s.objects[0]).waiters,
                            [&](RosterEntry& e) { s.w.arena.gone(e.tag.load(), true); });
       },
       enter, [](Scene& s) { ConditionOps(s.w.arena, s.w.me).notify(s.w.condition(s.objects[0]), 1, soon()); },
       passed_on});
}

void barrier_scenarios() {
  const auto make = [](u32 parties, u32 come) {
    return [parties, come](Scene& s) {
      s.objects = {s.w.make_barrier(parties)};
      for (u32 i = 0; i < come; ++i) {
        RosterEntry* e = nullptr;
        u32 index = 0;
        CHECK(BarrierOps(s.w.arena, s.w.me).arrive(s.w.barrier(s.objects[0]), false, &e, &index, soon()) ==
              BarrierOps::Arrival::kWaits);
        CHECK_EQ(index, i);
        s.waiting.push_back(e);
      }
    };
  };
  /// Those who wait learn of it, all the same thing, and after reset() the barrier works. `must_end`: not by a timeout.
  const auto settled = [](Scene& s, bool must_end) {
    BarrierState& b = s.w.barrier(s.objects[0]);
    const BarrierOps ops(s.w.arena, s.w.me);
    bool begun = must_end;
    for (RosterEntry* e : s.waiting) begun = begun || e->value.load() != BarrierOps::kWaiting;
    u32 first = 0;
    for (RosterEntry* e : s.waiting) {
      u32 outcome = 0;
      const Wait r = ops.wait(b, *e, &outcome, soon(begun ? 2'000 : 8));
      if (begun) CHECK(r == Wait::kReady);
      CHECK(outcome == BarrierOps::kReleased || outcome == BarrierOps::kBroken);
      CHECK(first == 0 || first == outcome);
      first = outcome;
    }
    ops.reset(b, soon());
    RosterEntry* e[2] = {};
    u32 index = 0;
    b.parties = 2;
    CHECK(ops.arrive(b, false, &e[0], &index, soon()) == BarrierOps::Arrival::kWaits);
    CHECK(ops.arrive(b, false, &e[1], &index, soon()) == BarrierOps::Arrival::kLast);
    u32 outcome = 0;
    CHECK(ops.wait(b, *e[0], &outcome, soon()) == Wait::kReady);
    CHECK_EQ(outcome, BarrierOps::kReleased);
    clean(s.w);
  };
  const auto arrive = [](bool action) {
    return [action](Scene& s) {
      RosterEntry* e = nullptr;
      u32 index = 0;
      BarrierOps(s.w.arena, s.w.me).arrive(s.w.barrier(s.objects[0]), action, &e, &index, soon());
    };
  };
  add({"barrier arrive, and wait", make(3, 1), enter, arrive(false), [settled](Scene& s) {
         u32 in_line = 0;
         s.w.arena.for_each(s.w.barrier(s.objects[0]).waiters, [&](RosterEntry& e) { in_line += e.tag.load() != 0; });
         settled(s, in_line == 2);
       }});
  add({"barrier arrive, last", make(3, 2), enter, arrive(false), [settled](Scene& s) { settled(s, s.reached_end); }});
  add({"barrier arrive, last, with action", make(3, 2), enter, arrive(true),
       [settled](Scene& s) { settled(s, s.reached_end); }});
  for (const bool broken : {false, true}) {
    add({broken ? "barrier finish, broken by the action" : "barrier finish", make(3, 2),
         [arrive](Scene& s) {
           enter(s);
           arrive(true)(s);
         },
         [broken](Scene& s) { BarrierOps(s.w.arena, s.w.me).finish(s.w.barrier(s.objects[0]), broken, soon()); },
         [settled](Scene& s) { settled(s, true); }});
  }
  add({"barrier wait, that times out", make(3, 1),
       [](Scene& s) {
         enter(s);
         RosterEntry* e = nullptr;
         u32 index = 0;
         BarrierOps(s.w.arena, s.w.me).arrive(s.w.barrier(s.objects[0]), false, &e, &index, soon());
         s.waiting.push_back(e);
       },
       [](Scene& s) {
         u32 outcome = 0;
         BarrierOps(s.w.arena, s.w.me).wait(s.w.barrier(s.objects[0]), *s.waiting[1], &outcome, Waiter(in_ms(1), {}));
       },
       [settled](Scene& s) {
         s.waiting.pop_back();
         settled(s, true);
       }});
  add({"barrier abort", make(3, 2), enter,
       [](Scene& s) { BarrierOps(s.w.arena, s.w.me).abort(s.w.barrier(s.objects[0]), soon()); },
       [settled](Scene& s) { settled(s, s.reached_end); }});
  add({"barrier reset", make(3, 2), enter,
       [](Scene& s) { BarrierOps(s.w.arena, s.w.me).reset(s.w.barrier(s.objects[0]), soon()); },
       [settled](Scene& s) { settled(s, s.reached_end); }});
}

// --- arena ------------------------------------------------------------------------------------------------------------------

void arena_scenarios() {
  const auto nothing = [](Scene& s) { s.objects = {s.w.make_lock()}; };
  /// The survivor: one object, and nothing else.
  const auto only_one = [](Scene& s) {
    clean(s.w, 1);
    const u32 q = s.w.make_queue();
    CHECK(put(s.w, q, 1, 5000) == Put::kDone);
    clean(s.w, 3);
    s.w.arena.drop(s.w.me, s.w.object(q), soon());
    clean(s.w, 1);
  };
  add({"allocate, fresh", nothing, enter, [](Scene& s) { s.w.arena.allocate(s.w.me, 3000, Kind::kRing, 0, soon()); },
       only_one});
  add({"allocate, from the free list, and free",
       [nothing](Scene& s) {
         nothing(s);
         u32 i[3];
         for (u32& k : i) k = s.w.arena.allocate(s.w.me, 3000, Kind::kRing, 0, soon());
         for (u32& k : i) s.w.arena.free(s.w.me, k, soon());
       },
       enter,
       [](Scene& s) { s.w.arena.free(s.w.me, s.w.arena.allocate(s.w.me, 3000, Kind::kRing, 0, soon()), soon()); },
       only_one});
  /// Blocks of four pages and more that have been written to and are free again.
  const auto used_before = [nothing](Scene& s) {
    nothing(s);
    u32 i[4];
    for (u32& k : i) {
      k = s.w.arena.allocate(s.w.me, 20'000, Kind::kRing, 0, soon());
      std::memset(&s.w.arena.at<char>(k), 0xA5, 20'000);
    }
    for (u32& k : i) s.w.arena.free(s.w.me, k, soon());
    CHECK(s.w.arena.header().idle.load() >= 80'000);
  };
  add({"trim", used_before, enter, [](Scene& s) { s.w.arena.trim(s.w.me, Waiter()); },
       [only_one](Scene& s) {
         if (s.reached_end) CHECK_EQ(s.w.arena.header().idle.load(), 0);
         only_one(s);
       }});
  add({"allocate, when room must be made",
       [used_before](Scene& s) {
         used_before(s);
         Header& h = s.w.arena.header();
         h.limit = h.bump - h.data_off;
       },
       enter, [](Scene& s) { s.number = s.w.arena.allocate(s.w.me, 40'000, Kind::kRing, 0, soon()); },
       [only_one](Scene& s) {
         clean(s.w, 1);
         s.w.arena.header().limit = s.w.arena.header().size;
         only_one(s);
       }});
  add({"make and drop an object", nothing, enter,
       [](Scene& s) { s.w.arena.drop(s.w.me, s.w.object(s.w.make_lock()), soon()); }, only_one});
  add({"drop, of one handle of two", nothing, enter,
       [](Scene& s) { s.w.arena.drop(s.w.me, s.w.object(s.objects[0]), soon()); }, only_one});
  add({"drop, of a queue with three rings",
       [nothing](Scene& s) {
         // Blocks below the queue's own are used again for its rings: the order of collect() must not matter.
         u32 low[3] = {s.w.arena.allocate(s.w.me, 300, Kind::kRing, 0, soon()),
                       s.w.arena.allocate(s.w.me, 66'000, Kind::kRing, 0, soon()),
                       s.w.arena.allocate(s.w.me, (1 << 20) + 192, Kind::kRing, 0, soon())};
         nothing(s);
         s.number = 0;
         for (const u32 i : low) s.w.arena.free(s.w.me, i, soon());
       },
       [](Scene& s) {
         enter(s);
         const u32 q = s.w.make_queue(0, true);
         for (u32 i = 0; i < 45; ++i) put(s.w, q, i, 2000);
         for (u32 i = 0; i < 2; ++i) get(s.w, q);
         s.number = q;
       },
       [](Scene& s) { s.w.arena.drop(s.w.me, s.w.object(s.number), soon()); }, only_one});
  add({"hold", nothing, enter, [](Scene& s) { s.w.arena.hold(s.w.me, s.w.object(s.objects[0]), s.w.me, 1, soon()); },
       only_one});
  add({"hold, with the roster full",
       [nothing](Scene& s) {
         nothing(s);
         for (int i = 0; i < 5; ++i)
           s.w.arena.hold(s.w.me, s.w.object(s.objects[0]), s.w.arena.reserve_child(s.w.me), 1, soon());
       },
       [](Scene& s) { s.w.me = s.w.arena.claim(); },
       [](Scene& s) { s.w.arena.hold(s.w.me, s.w.object(s.objects[0]), s.w.me, 1, soon()); },
       [](Scene& s) {
         s.w.arena.drop(s.w.me, s.w.object(s.objects[0]), soon());  // the survivor's own, which went into the chunk
         clean(s.w, s.w.object(s.objects[0]).holders.more.load() != 0 ? 2 : 1);
       }});
  add({"collect, of a bit of everything",
       [](Scene& s) {
         World& w = s.w;
         s.objects = {w.make_lock(), w.make_semaphore(3, 3), w.make_condition(), w.make_queue(0, true)};
         for (u32 i = 0; i < 4; ++i) put(w, s.objects[3], i, 40);
         die_after(w, [&] {
           Tag d;
           LockOps(w.arena, w.me).acquire(w.lock(s.objects[0]), soon(), &d);
           SemaphoreOps(w.arena, w.me).acquire(w.semaphore(s.objects[1]), true, soon());
           ConditionOps(w.arena, w.me).enqueue(w.condition(s.objects[2]), soon());
           get(w, s.objects[3]);
           w.make_queue();
           w.arena.allocate(w.me, 100, Kind::kRecord, 0, soon());
         });
       },
       enter, [](Scene& s) { s.w.arena.collect(s.w.me, soon()); },
       [](Scene& s) {
         World& w = s.w;
         w.collect();
         Tag d = 0;
         CHECK(LockOps(w.arena, w.me).acquire(w.lock(s.objects[0]), soon(), &d) == Acquired::kOwnerDied);
         CHECK_EQ(permits(w, w.semaphore(s.objects[1])), 3);
         CHECK_EQ(ConditionOps(w.arena, w.me).notify(w.condition(s.objects[2]), 9, soon()), 0);
         CHECK_EQ(drain(w, s.objects[3]).size(), 4);
         clean(w, 8);
         for (int i = 0; i < 4; ++i) w.queues().task_done(w.queue(s.objects[3]), soon());
         clean(w, 4);
       }});
  add({"claim a slot", nothing, [](Scene&) {}, [](Scene& s) { s.w.me = s.w.arena.claim(); },
       [only_one](Scene& s) {
         only_one(s);
         u32 taken = 0;
         for (u32 i = 1; i < s.w.arena.header().slot_end.load(); ++i) taken += s.w.arena.slots()[i].pid.load() != 0;
         CHECK_EQ(taken, 2);
       }});
  add({"leave", nothing, enter, [](Scene& s) { s.w.arena.leave(s.w.me, false); }, only_one});
  // Every slot below the end is free, or taken by somebody who is alive.
  const auto nobody_but = [](Scene& s, u32 n) {
    u32 taken = 0;
    for (u32 i = 1; i < s.w.arena.header().slot_end.load(); ++i) taken += s.w.arena.slots()[i].pid.load() != 0;
    CHECK_EQ(taken, n);
  };
  /// Ten seconds after a fork.
  const auto reservations_are_old = [](Scene& s) {
    for (u32 i = 1; i < s.w.arena.header().slot_end.load(); ++i) {
      Slot& slot = s.w.arena.slots()[i];
      if (slot.state() == SlotState::kReserved && slot.pid.load() < 0) slot.start_ticks.store(1);
    }
  };
  add({"fork: the child enters its reserved slot",
       [nothing](Scene& s) {
         nothing(s);
         s.tag = s.w.arena.reserve_child(s.w.me);
         s.w.arena.hold(s.w.me, s.w.object(s.objects[0]), s.tag, 1, soon());
         // What nobody but the child holds goes with it, or it never goes.
         const u32 q = s.w.make_queue();
         CHECK(put(s.w, q, 1, 5000) == Put::kDone);
         s.w.arena.hold(s.w.me, s.w.object(q), s.tag, 1, soon());
         s.w.arena.drop(s.w.me, s.w.object(q), soon());
       },
       [](Scene&) {}, [](Scene& s) { s.w.arena.enter_reserved(s.tag); },
       [only_one, nobody_but, reservations_are_old](Scene& s) {
         // Killed before it has written its pid, it cannot be told from a child that has not run yet, and that has 10 s.
         const Slot& slot = s.w.arena.slots()[slot_index(s.tag)];
         if (slot.pid.load() < 0) {
           clean(s.w, 3);
           CHECK(slot.state() == SlotState::kReserved);
           reservations_are_old(s);
         }
         only_one(s);
         nobody_but(s, 2);
         CHECK_EQ(Slot::gen_of(slot.word.load()), slot_gen(s.tag) + 1);
       }});
  add({"fork: the parent reserves and holds", nothing, enter,
       [](Scene& s) {
         s.tag = s.w.arena.reserve_child(s.w.me);
         s.w.arena.hold(s.w.me, s.w.object(s.objects[0]), s.tag, 1, soon());
       },
       [only_one, nobody_but, reservations_are_old](Scene& s) {
         reservations_are_old(s);
         only_one(s);
         nobody_but(s, 2);
       }});

  // --- stopped, not killed ---

  /// Slots that were used and are free, below the end of those that collect() looks at.
  const auto used_slots = [nothing](Scene& s) {
    nothing(s);
    die_after(s.w, [&] {
      for (int i = 0; i < 3; ++i) s.w.arena.claim();
    });
    CHECK_EQ(s.w.collect(), 4);
  };
  const auto collect = [](Scene& s) { s.w.arena.collect(s.w.me, soon()); };
  /// To ask the kernel whether a process lives takes 4000 instructions, of one in another namespace it is not asked.
  const auto enter_unasked = [](Scene& s) {
    enter(s);
    for (u32 i = 1; i < s.w.arena.header().slot_end.load(); ++i) s.w.arena.slots()[i].pidns = 1;
  };
  const auto is_in = [](Scene& s, Tag t) {
    CHECK_EQ(s.w.arena.slots()[slot_index(t)].word.load(), Slot::make(slot_gen(t), SlotState::kLive));
    CHECK(s.w.arena.fate(t, true) == Owner::kAlive);
  };
  add({"collect, while a process takes a slot", used_slots, enter_unasked, collect,
       [is_in](Scene& s) {
         is_in(s, s.control.result.load());
         clean(s.w, 2);
         is_in(s, s.control.result.load());
       },
       false, u64{8} << 20,
       [](Scene& s) {
         s.others.push_back(spawn([&] {
           prctl(PR_SET_PDEATHSIG, SIGKILL);
           enter(s);
           s.w.make_event();
           s.control.result.store(s.w.me);
           for (;;) pause();
         }));
         const i64 patience = in_ms(20'000);
         while (s.control.result.load() == 0 && now_ns() < patience) sched_yield();
       }});
  add({"collect, while a process forks", used_slots, enter_unasked, collect,
       [is_in](Scene& s) {
         const Tag child = s.control.result.load();
         clean(s.w, 2);
         CHECK(s.w.arena.enter_reserved(child));
         is_in(s, child);
         clean(s.w, 2);
       },
       false, u64{8} << 20,
       [](Scene& s) {
         const Tag child = s.w.arena.reserve_child(s.w.me);
         const u32 event = s.w.make_event();
         s.w.arena.hold(s.w.me, s.w.object(event), child, 1, soon());
         s.w.arena.drop(s.w.me, s.w.object(event), soon());
         s.control.result.store(child);
       }});
  add({"fork: the child comes, while its slot is given to the next",
       [nothing](Scene& s) {
         nothing(s);
         s.tag = s.w.arena.reserve_child(s.w.me);
       },
       [](Scene&) {}, [](Scene& s) { s.control.result.fetch_or(s.w.arena.enter_reserved(s.tag) ? 1 : 2); },
       [is_in](Scene& s) {
         // Whether it came in time or not, it knows; and the next child has a slot of its own.
         const u32 result = s.control.result.load();
         const Tag next = result >> 2;
         if (result & 1) is_in(s, s.tag);
         CHECK((result & 1) != 0 || slot_index(next) == slot_index(s.tag));
         CHECK(s.w.arena.enter_reserved(next));
         is_in(s, next);
         if (result & 1) is_in(s, s.tag);
         clean(s.w, 1);
       },
       false, u64{8} << 20,
       [reservations_are_old](Scene& s) {
         reservations_are_old(s);
         s.w.collect();
         s.control.result.fetch_or(s.w.arena.reserve_child(s.w.me) << 2);
       },
       300});
}

}  // namespace

int main(int argc, char** argv) {
  bool full = false;
  // Tester and victim take turns: on one CPU the switch between them is 10 times cheaper.
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  sched_setaffinity(0, sizeof one, &one);
  queue_scenarios();
  cargo_scenarios();
  lock_scenarios();
  semaphore_scenarios();
  condition_scenarios();
  barrier_scenarios();
  arena_scenarios();
  Totals totals;
  for (const Scenario& s : scenarios) {
    bool chosen = true;
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], "--full") == 0) full = true;
      else chosen = std::strstr(s.name, argv[i]) != nullptr;
    }
    if (chosen) Stepper(s, full, totals).run();
  }
  std::printf("     %llu kills, %.1f million instructions stepped\n", static_cast<unsigned long long>(totals.kills),
              static_cast<double>(totals.steps) / 1e6);
  return totals.failed != 0 || totals.passed == 0;
}
