// Mutex, Lock, Semaphore.
#include "../family.hpp"

namespace {
using namespace family;

TEST("mutex: taken over from the dead, who left it half-way") {
  World w;
  Mutex& m = w.object(w.make_lock()).guard;
  CHECK(m.lock(w.arena.slots(), w.me, soon()) == Locked::kYes);
  CHECK_EQ(m.holder(), w.me);
  m.unlock();
  in_child([&] { CHECK(m.lock(w.arena.slots(), w.arena.claim(), soon()) == Locked::kYes); });
  CHECK(m.lock(w.arena.slots(), w.me, soon()) == Locked::kRecovered);
  m.unlock();
  CHECK(m.lock(w.arena.slots(), w.me, soon()) == Locked::kYes);
  m.unlock();
  CHECK_EQ(m.holder(), 0);
}

TEST("lock: acquire, release, a timeout, a release by another") {
  World w;
  const u32 i = w.make_lock();
  const LockOps ops(w.arena, w.me);
  UserLock& l = w.lock(i);
  Tag died = 0;
  CHECK(!ops.release(l));
  CHECK(ops.acquire(l, at_once(), &died) == Acquired::kYes);
  CHECK(ops.acquire(l, at_once(), &died) == Acquired::kNo);
  const i64 start = now_ns();
  CHECK(ops.acquire(l, soon(60), &died) == Acquired::kNo);
  CHECK(now_ns() - start >= 60 * kMillisecond);
  in_child([&] {
    w.enter({i});
    CHECK(LockOps(w.arena, w.me).release(w.lock(i)));
    w.arena.leave(w.me, false);
  });
  CHECK(ops.acquire(l, at_once(), &died) == Acquired::kYes);
  CHECK(ops.release(l));
}

TEST("lock: lost by the dead, kept by who left in good order") {
  World w;
  const u32 i = w.make_lock();
  for (const bool goodbye : {false, true}) {
    Tag dead = 0;
    in_child([&] {
      w.enter({i});
      Tag d = 0;
      CHECK(LockOps(w.arena, w.me).acquire(w.lock(i), soon(), &d) == Acquired::kYes);
      if (goodbye) w.arena.leave(w.me, false);
    });
    CHECK(LockOps(w.arena, w.me).acquire(w.lock(i), soon(goodbye ? 100 : 5'000), &dead) ==
          (goodbye ? Acquired::kNo : Acquired::kOwnerDied));
    w.collect();
    if (goodbye) CHECK(LockOps(w.arena, w.me).acquire(w.lock(i), soon(50), &dead) == Acquired::kNo);
    CHECK(LockOps(w.arena, w.me).release(w.lock(i)));
  }
  clean(w);
}

TEST("lock: a signal ends the wait") {
  World w;
  UserLock& l = w.lock(w.make_lock());
  Tag died = 0;
  CHECK(LockOps(w.arena, w.me).acquire(l, soon(), &died) == Acquired::kYes);
  Waiter::Hooks hooks;
  hooks.interrupted = [](void*) { return true; };
  CHECK(LockOps(w.arena, w.me).acquire(l, Waiter(kForever, hooks), &died) == Acquired::kInterrupted);
}

TEST("semaphore: bounds, and the permits of the dead") {
  World w;
  const u32 i = w.make_semaphore(2, 2);
  SemaphoreState& s = w.semaphore(i);
  const SemaphoreOps ops(w.arena, w.me);
  CHECK(ops.release(s, true, soon()) == SemaphoreOps::Released::kTooMany);
  CHECK(ops.acquire(s, true, at_once()) == Wait::kReady);
  in_child([&] {
    w.enter({i});
    CHECK(SemaphoreOps(w.arena, w.me).acquire(s, true, at_once()) == Wait::kReady);
  });
  CHECK(ops.acquire(s, true, soon()) == Wait::kReady);
  CHECK(ops.acquire(s, true, soon(30)) == Wait::kTimeout);
  for (int k = 0; k < 2; ++k) CHECK(ops.release(s, true, soon()) == SemaphoreOps::Released::kYes);
  CHECK_EQ(s.value.load(), 2);
  clean(w);
}

TEST("semaphore: a bare acquire is not given back, for another may release") {
  World w;
  const u32 i = w.make_semaphore(1);
  in_child([&] {
    w.enter({i});
    CHECK(SemaphoreOps(w.arena, w.me).acquire(w.semaphore(i), false, at_once()) == Wait::kReady);
  });
  CHECK(SemaphoreOps(w.arena, w.me).acquire(w.semaphore(i), false, soon(50)) == Wait::kTimeout);
  w.collect();
  CHECK(SemaphoreOps(w.arena, w.me).release(w.semaphore(i), false, soon()) == SemaphoreOps::Released::kYes);
  CHECK(SemaphoreOps(w.arena, w.me).acquire(w.semaphore(i), false, at_once()) == Wait::kReady);
}
}  // namespace
