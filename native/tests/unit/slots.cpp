// Slots: who lives, who died, who said goodbye.
#include <sched.h>
#include <sys/prctl.h>

#include <thread>

#include "../family.hpp"

namespace {
using namespace family;

/// A child that claims a slot, then does `then`; its tag once it has.
template <class F>
pid_t member(World& w, Tag* tag, F&& then) {
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  const pid_t pid = spawn([&] {
    const Tag t = w.arena.claim();
    w.me = t;
    [[maybe_unused]] const ssize_t n = write(ends[1], &t, sizeof t);
    then();
  });
  close(ends[1]);
  CHECK_EQ(read(ends[0], tag, sizeof *tag), static_cast<ssize_t>(sizeof *tag));
  close(ends[0]);
  return pid;
}
void sleep_for_ever() {
  for (;;) pause();
}

TEST("slots: killed is dead, at once, though nobody has waited for it") {
  World w;
  Tag t = 0;
  const pid_t p = member(w, &t, sleep_for_ever);
  CHECK(w.arena.fate(t, true) == Owner::kAlive);
  kill(p, SIGKILL);
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(p), &info, WEXITED | WNOWAIT);  // a zombie from here on
  CHECK(w.arena.fate(t, false) == Owner::kAlive);
  CHECK(w.arena.fate(t, true) == Owner::kDied);
  CHECK(w.arena.gone(t, false));
  reap(p);
  CHECK_EQ(w.collect(), 1);
  CHECK(w.arena.gone(t, false));
}

TEST("slots: stopped is not dead") {
  World w;
  Tag t = 0;
  const pid_t p = member(w, &t, sleep_for_ever);
  kill(p, SIGSTOP);
  siginfo_t info;
  waitid(P_PID, static_cast<id_t>(p), &info, WSTOPPED | WNOWAIT);
  CHECK(w.arena.fate(t, true) == Owner::kAlive);
  kill(p, SIGKILL);
  reap(p);
}

TEST("slots: who said goodbye exited, and is gone once it has ended") {
  World w;
  Tag t = 0;
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  const pid_t p = member(w, &t, [&] {
    w.arena.leave(w.me, false);
    char c;
    [[maybe_unused]] const ssize_t n = read(ends[0], &c, 1);
  });
  const i64 end = in_ms(5'000);
  while (w.arena.slots()[slot_index(t)].state() != SlotState::kExited && now_ns() < end) sched_yield();
  CHECK(w.arena.fate(t, true) == Owner::kExited);
  CHECK(!w.arena.gone(t, true));
  CHECK_EQ(w.collect(), 0);
  CHECK_EQ(write(ends[1], "x", 1), 1);
  reap(p);
  CHECK(w.arena.gone(t, true));
  CHECK(w.arena.fate(t, true) == Owner::kExited);
  CHECK_EQ(w.collect(), 1);
  CHECK(w.arena.fate(t, true) == Owner::kExited);
}

TEST("slots: exec is a death") {
  World w;
  Tag t = 0;
  const pid_t p = member(w, &t, [] { execl("/bin/sleep", "sleep", "60", nullptr); });
  Owner o = Owner::kAlive;
  for (const i64 end = in_ms(5'000); o == Owner::kAlive && now_ns() < end; o = w.arena.fate(t, true)) usleep(1000);
  CHECK(o == Owner::kDied);
  kill(p, SIGKILL);
  reap(p);
}

TEST("slots: a zombie with threads that run is alive") {
  World w;
  Tag t = 0;
  const pid_t p = member(w, &t, [] {
    std::thread(sleep_for_ever).detach();
    pthread_exit(nullptr);
  });
  const i64 end = in_ms(5'000);
  while (read_proc_stat(p).state != 'Z' && now_ns() < end) usleep(1000);
  CHECK_EQ(read_proc_stat(p).state, 'Z');
  CHECK(w.arena.fate(t, true) == Owner::kAlive);
  kill(p, SIGKILL);
  reap(p);
  CHECK(w.arena.fate(t, true) == Owner::kDied);
}

TEST("slots: a pid used again is another process") {
  World w;
  const ProcStat me = read_proc_stat(getpid());
  CHECK(me.found && me.start_ticks != 0);
  CHECK(!process_is_gone(getpid(), me.start_ticks, me.start_stack));
  CHECK(process_is_gone(getpid(), me.start_ticks - 1, me.start_stack));
  CHECK(process_is_gone(getpid(), me.start_ticks, me.start_stack + 4096));
  CHECK(!process_is_gone(getpid(), 0, 0));  // unknown is alive
  CHECK(!process_is_gone(1, 0, 0));
  CHECK(w.arena.fate(make_tag(0, 7), true) == Owner::kAlive);  // a slot that nobody has taken
  CHECK(w.arena.fate(0, true) == Owner::kAlive);
}

TEST("slots: a generation is never used twice, a slot is") {
  World w;
  std::set<Tag> tags;
  for (int i = 0; i < 30; ++i) {
    Tag t = 0;
    reap(member(w, &t, [] {}));
    CHECK(tags.insert(t).second);
    CHECK(slot_index(t) < 4);
    CHECK_EQ(w.collect(), 1);
  }
}

TEST("slots: a fork's reservation") {
  World w;
  const Tag t = w.arena.reserve_child(w.me);
  CHECK(w.arena.fate(t, true) == Owner::kAlive);
  CHECK_EQ(w.collect(), 0);
  in_child([&] {
    CHECK(w.arena.enter_reserved(t));
    CHECK(w.arena.slots()[slot_index(t)].state() == SlotState::kLive);
    CHECK_EQ(w.arena.slots()[slot_index(t)].parent.load(), w.me);
  });
  CHECK(w.arena.fate(t, true) == Owner::kDied);
  CHECK_EQ(w.collect(), 1);
}

TEST("slots: a pid of another namespace tells nothing, on the way into a slot either") {
  World w;
  constexpr i32 kNobody = INT32_MAX;  // no process here
  const auto pid_of = [&](u32 i) { return w.arena.slots()[i].pid.load(); };
  const auto on_its_way = [&] {
    const u32 i = w.arena.header().slot_end.load() - 1;
    Slot& s = w.arena.slots()[i];
    s.replace_tenant({s.word.load(), 0}, {s.word.load(), kNobody});
    return i;
  };
  // All in one namespace: who died on its way into a slot leaves it.
  Tag t = 0;
  reap(member(w, &t, [] {}));
  CHECK_EQ(w.collect(), 1);
  const u32 i = on_its_way();
  w.collect();
  CHECK_EQ(pid_of(i), 0);

  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  Tag children[2] = {};
  const pid_t helper = spawn([&] {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (unshare(CLONE_NEWPID) == 0) {
      const Tag mine = w.arena.claim();
      children[0] = w.arena.reserve_child(mine);
      const pid_t child = fork();
      if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        CHECK(w.arena.enter_reserved(children[0]));
        CHECK_EQ(getpid(), 1);
        sleep_for_ever();
      }
      children[1] = w.arena.reserve_child(mine);
      Slot& s = w.arena.slots()[slot_index(children[1])];
      CHECK(s.replace_tenant(s.tenant(), {s.word.load(), kNobody}));  // as its child would, with its own
      while (w.arena.slots()[slot_index(children[0])].state() != SlotState::kLive) usleep(100);
    }
    [[maybe_unused]] const ssize_t n = write(ends[1], children, sizeof children);
    sleep_for_ever();
  });
  CHECK_EQ(read(ends[0], children, sizeof children), static_cast<ssize_t>(sizeof children));
  if (children[0] != 0) {  // else it is not allowed here
    const u32 half = w.arena.header().slot_end.load();
    Slot& s = w.arena.slots()[half];
    w.arena.header().slot_end.store(half + 1);
    CHECK(s.replace_tenant({s.word.load(), 0}, {s.word.load(), kNobody}));
    w.collect();
    CHECK_EQ(pid_of(half), kNobody);
    CHECK(w.arena.fate(children[0], true) == Owner::kAlive);
    CHECK(w.arena.slots()[slot_index(children[1])].state() == SlotState::kReserved);
  }
  kill(helper, SIGKILL);
  reap(helper);
}
}  // namespace
