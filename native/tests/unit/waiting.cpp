// EventCount, Event, Condition, Barrier.
#include "../family.hpp"

namespace {
using namespace family;

TEST("eventcount: a notification between prepare and sleep is not slept through") {
  World w;
  EventCount& e = w.event(w.make_event()).sleepers;
  const u32 key = e.prepare();
  CHECK(e.has_sleepers());
  e.notify(1);  // nobody sleeps yet: the word changes, and the bit goes
  CHECK(!e.has_sleepers());
  const i64 start = now_ns();
  CHECK(e.sleep(key, soon(), 5'000 * kMillisecond) == Wait::kReady);
  CHECK(now_ns() - start < 2'000 * kMillisecond);
}

TEST("event: set, clear, wait") {
  World w;
  const u32 i = w.make_event();
  EventState& e = w.event(i);
  CHECK(EventOps::wait(e, at_once()) == Wait::kTimeout);
  const pid_t p = spawn([&] { CHECK(EventOps::wait(e, soon()) == Wait::kReady); });
  EventOps::set(e);
  CHECK_EQ(reap(p), 0);
  CHECK(EventOps::wait(e, at_once()) == Wait::kReady);
  EventOps::clear(e);
  CHECK(EventOps::wait(e, soon(20)) == Wait::kTimeout);
}

TEST("condition: in order, exactly n, and over the corpses") {
  World w;
  const u32 i = w.make_condition();
  ConditionState& c = w.condition(i);
  const ConditionOps ops(w.arena, w.me);
  std::vector<RosterEntry*> line;
  for (int k = 0; k < 20; ++k) line.push_back(ops.enqueue(c, soon()));
  const auto told = [&] {
    u32 n = 0;
    for (const RosterEntry* e : line) n += (e->value.load() & ConditionOps::kStateMask) == ConditionOps::kNotified;
    return n;
  };
  CHECK_EQ(ops.notify(c, 3, soon()), 3);
  CHECK_EQ(told(), 3);
  for (int k = 0; k < 3; ++k) CHECK(ops.wait(c, *line[static_cast<size_t>(k)], soon()) == Wait::kReady);
  line.erase(line.begin(), line.begin() + 3);
  CHECK_EQ(ops.notify(c, 100, soon()), 17);
  for (RosterEntry* e : line) CHECK(ops.wait(c, *e, soon()) == Wait::kReady);
  in_child([&] {
    w.enter({i});
    CHECK(ConditionOps(w.arena, w.me).enqueue(c, soon()) != nullptr);
  });
  RosterEntry* mine = ops.enqueue(c, soon());
  ops.notify(c, 1, soon());  // goes to the dead, or over it
  CHECK(ops.wait(c, *mine, soon(2'000)) == Wait::kReady);
  CHECK(ops.wait(c, *ops.enqueue(c, soon()), soon(20)) == Wait::kTimeout);
  CHECK_EQ(ops.notify(c, 5, soon()), 0);
  clean(w);
}

TEST("barrier: a death breaks it, reset() mends it") {
  World w;
  const u32 i = w.make_barrier(3);
  BarrierState& b = w.barrier(i);
  const BarrierOps ops(w.arena, w.me);
  in_child([&] {
    w.enter({i});
    RosterEntry* e = nullptr;
    u32 index = 0;
    CHECK(BarrierOps(w.arena, w.me).arrive(b, false, &e, &index, soon()) == BarrierOps::Arrival::kWaits);
  });
  RosterEntry* e = nullptr;
  u32 index = 0, outcome = 0;
  CHECK(ops.arrive(b, false, &e, &index, soon()) == BarrierOps::Arrival::kWaits);
  CHECK_EQ(index, 1);
  CHECK(ops.wait(b, *e, &outcome, soon()) == Wait::kReady);
  CHECK_EQ(outcome, BarrierOps::kBroken);
  CHECK(ops.arrive(b, false, &e, &index, soon()) == BarrierOps::Arrival::kBroken);
  ops.reset(b, soon());
  CHECK(ops.arrive(b, false, &e, &index, soon()) == BarrierOps::Arrival::kWaits);
  CHECK(ops.wait(b, *e, &outcome, soon(20)) == Wait::kTimeout);
  CHECK_EQ(outcome, BarrierOps::kBroken);
}
}  // namespace
