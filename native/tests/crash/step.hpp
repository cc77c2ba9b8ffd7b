// Kill a process after each instruction of one operation, and see what it left.
//
// A scenario is run over and over: a fresh arena, what was there before (`setup`), a victim that is stepped with
// PTRACE_SINGLESTEP through the operation and killed after instruction k, and a survivor that goes on and audits the arena.
// k runs up to the length of the operation. Kills between two changes of the arena leave the same bytes behind; so the quick
// mode kills once for each state of the arena that there is (of the longest operation, collect(), what 8 s allow), found by
// a first run that compares after every instruction, and spreads the kills it has left. The full mode kills after every one.
#pragma once

#include <sys/prctl.h>
#include <sys/ptrace.h>

#include <algorithm>
#include <functional>

#include "../family.hpp"

namespace step {

using namespace family;

/// What victim and tester share beside the arena.
struct Control {
  Atomic<u32> begun, ended;
  Atomic<u32> result;  ///< a scenario's business
};

struct Scene {
  World& w;
  Control& control;
  std::vector<u32> objects;  ///< of the family; the survivor has a handle of each
  std::vector<RosterEntry*> waiting;
  Tag tag = 0;  ///< a scenario's business
  u32 number = 0;
  std::vector<pid_t> others;  ///< processes that meanwhile() started, to be ended with the victim
  std::string text[5];        ///< messages, made before the first step
  Outgoing out[5];
  u32 messages = 0;
  bool reached_end = false;  ///< for the survivor: the operation was over when the victim was killed

  void prepare_messages(u32 first, u32 n, u32 len) {
    for (messages = 0; messages < n; ++messages) {
      text[messages] = message(first + messages, len);
      out[messages] = {1, text[messages].data(), len};
    }
  }

  /// In the victim: the operations themselves, with nothing of the test's around them.
  void put() {
    u32 done = 0;
    QueueOps(w.arena, w.me).put(w.queue(objects[0]), out, messages, &done, Waiter());
  }
  void get() {
    static char buffer[1 << 16];
    QueueState& q = w.queue(objects[0]);
    Incoming in{buffer, sizeof buffer, 0, 0};
    const QueueOps ops(w.arena, w.me);
    if (ops.try_get(q, q.object.kind == Kind::kJoinableQueue, in, Waiter()) == Get::kDone) ops.announce_space(q, 1);
    if (in.cargo != 0) w.arena.unload_cargo(w.me, in.cargo, Waiter());
  }

  Scene(World& world, Control& shared) : w(world), control(shared) {}

  /// In the victim: from here on it is stepped.
  void begin() {
    control.begun.store(1);
    raise(SIGSTOP);
  }
};

struct Scenario {
  const char* name;
  std::function<void(Scene&)> setup;    ///< in the parent of victim and survivor
  std::function<void(Scene&)> prepare;  ///< in the victim, before the first step
  std::function<void(Scene&)> act;      ///< in the victim
  std::function<void(Scene&)> check;    ///< in the survivor
  bool begins_itself = false;           ///< act() calls begin(), in the middle of something
  u64 size = u64{8} << 20;
  /// Not a kill: the victim stands still after instruction k while this happens in the parent, and then goes on to its end.
  /// Two loads that are not one show here, where a kill between them shows nothing. check() finds everybody alive.
  std::function<void(Scene&)> meanwhile = nullptr;
  u32 stops = UINT32_MAX;  ///< of a long operation, in quick mode, no more
};

struct Totals {
  u64 kills = 0, steps = 0;
  int passed = 0, failed = 0;
};

inline u64 fingerprint(World& w) {
  const Header& h = w.arena.header();
  const char* base = reinterpret_cast<const char*>(&h);
  u64 sum = 14695981039346656037u;
  const auto add = [&](u64 from, u64 to) {
    for (; from + 32 <= to; from += 32) {
      u64 v[4];
      std::memcpy(v, base + from, sizeof v);
      sum = (sum ^ v[0] ^ (v[1] << 13 | v[1] >> 51) ^ (v[2] << 29 | v[2] >> 35) ^ (v[3] << 43 | v[3] >> 21)) *
            1099511628211u;
      sum ^= sum >> 29;
    }
  };
  add(0, kPage);
  add(h.slots_off, h.slots_off + h.slot_end.load() * sizeof(Slot));
  add(h.blocks_off, h.blocks_off + (u64{h.nblocks.load()} + 2) * sizeof(Block));
  // Of large blocks the beginning, where a ring's ends and a message's header are.
  for (u32 i = 1; i < h.nblocks.load(); ++i) {
    const Block& b = w.arena.block(i);
    add(b.off, b.off + std::min<u64>(Arena::class_bytes(b.cls), 2048));
  }
  return sum;
}

class Stepper {
 public:
  Stepper(const Scenario& s, bool full, Totals& totals) : s_(s), full_(full), totals_(totals) {
    control_ = static_cast<Control*>(mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  }
  ~Stepper() { munmap(control_, kPage); }

  bool run() {
    const i64 start = now_ns();
    std::vector<u32> changes;
    const int before = check::failures() = 0;
    length_ = once(UINT32_MAX, &changes);
    // First the states there are, then what the time allows of all the rest: kills from coarse to fine, stops in order.
    std::vector<u32> kills = {0};
    for (size_t first = 0; first < 4; ++first) {
      for (size_t i = first; i < changes.size(); i += 4) kills.push_back(changes[i]);
    }
    std::vector<bool> planned(length_ + 2, false);
    for (const u32 k : kills) planned[k] = true;
    const size_t states = kills.size();
    u32 top = 1;
    while (top <= length_ && s_.meanwhile == nullptr) top *= 2;
    for (u32 stride = top; stride != 0; stride /= 2) {
      for (u32 k = 0; k <= length_ + 1 && (full_ || k < s_.stops); k += stride) {
        if (!planned[k]) kills.push_back(k);
        planned[k] = true;
      }
    }
    const i64 limit = start + i64{full_ ? 3'600'000 : s_.meanwhile != nullptr ? 8'000 : 600} * kMillisecond;
    int bad = 0;
    size_t done = 0;
    const i64 longest =
        start + i64{full_ ? 3'600'000 : 8'000} * kMillisecond;  // even for the states, of very long operations
    for (; done < kills.size() && (done < states + 8 || now_ns() < limit) && now_ns() < longest; ++done) {
      const int was = check::failures();
      once(kills[done], nullptr);
      if (check::failures() != was && ++bad == 3) break;
    }
    const bool ok = check::failures() == before;
    (ok ? totals_.passed : totals_.failed) += 1;
    std::printf("%s kill: %-52s %5u instructions, %4zu states, %4zu %s, %.1f s\n", ok ? "ok  " : "FAIL", s_.name,
                length_, states, done, s_.meanwhile != nullptr ? "stops" : "kills",
                static_cast<double>(now_ns() - start) / 1e9);
    std::fflush(stdout);
    return ok;
  }

 private:
  /// One victim, killed after `k` instructions (or at the end); then one survivor. Returns how far it came.
  u32 once(u32 k, std::vector<u32>* changes) {
    control_->begun.store(0);
    control_->ended.store(0);
    control_->result.store(0);
    World w(s_.size);
    Scene scene(w, *control_);
    s_.setup(scene);
    const pid_t victim = fork();
    if (victim == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      s_.prepare(scene);
      if (ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) _exit(90);
      if (!s_.begins_itself) scene.begin();
      s_.act(scene);
      control_->ended.store(1);
      for (;;) pause();
    }
    int status = 0;
    waitpid(victim, &status, 0);
    if (!CHECK(WIFSTOPPED(status) && control_->begun.load() == 1)) {
      kill(victim, SIGKILL);
      waitpid(victim, &status, 0);
      return 0;
    }
    u32 n = 0;
    u64 seen = changes != nullptr ? fingerprint(w) : 0;
    for (; n < k && control_->ended.load(std::memory_order_relaxed) == 0; ++n) {
      if (ptrace(PTRACE_SINGLESTEP, victim, nullptr, nullptr) != 0 || waitpid(victim, &status, 0) < 0) break;
      if (!CHECK(WIFSTOPPED(status))) return n;  // it crashed
      if (changes != nullptr) {
        const u64 now = fingerprint(w);
        if (now != seen) changes->push_back(n + 1);
        seen = now;
      }
      if (n > 2'000'000) {
        CHECK(!"the operation does not end");
        break;
      }
    }
    scene.reached_end = control_->ended.load() != 0;
    check::context() = std::string(s_.name) +
                       (s_.meanwhile != nullptr ? ", stopped after instruction " : ", killed after instruction ") +
                       std::to_string(n);
    const auto end = [&] {
      kill(victim, SIGKILL);
      waitpid(victim, &status, 0);
      for (const pid_t other : scene.others) kill(other, SIGKILL);
      for (const pid_t other : scene.others) reap(other);
    };
    if (s_.meanwhile == nullptr) {
      end();
    } else {
      s_.meanwhile(scene);
      ptrace(PTRACE_DETACH, victim, nullptr, nullptr);
      const i64 patience = now_ns() + 20'000 * kMillisecond;
      while (control_->ended.load() == 0 && now_ns() < patience) sched_yield();
      CHECK(control_->ended.load() != 0);
    }
    totals_.kills += 1;
    totals_.steps += n;

    const int before = check::failures();
    const pid_t survivor = fork();
    if (survivor == 0) {
      alarm(20);
      w.enter(scene.objects);
      s_.check(scene);
      _exit(check::failures() != before);
    }
    waitpid(survivor, &status, 0);
    const bool hung = WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM;
    if (hung) {
      check::report(false, "the survivor hangs", __FILE__, __LINE__);
    } else if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      check::report(false, "the survivor found damage", __FILE__, __LINE__);
    }
    if (s_.meanwhile != nullptr) end();
    check::context().clear();
    return n;
  }

  const Scenario& s_;
  const bool full_;
  Totals& totals_;
  Control* control_;
  u32 length_ = 0;
};

}  // namespace step
