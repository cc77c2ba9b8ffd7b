// Queue and JoinableQueue.
#include "../family.hpp"

namespace {
using namespace family;

TEST("queue: every size around the ends of the first rings, in order and whole") {
  for (const u32 base : {0u, 8u, 500u, 512u, 1008u, 1016u, 1024u, 32'700u, 65'528u}) {
    World w;
    const u32 q = w.make_queue();
    u32 next = 0, expected = 0;
    for (u32 len = base + 4; len < base + 28; ++len) {
      for (u32 k = 0; k < 3; ++k) CHECK(put(w, q, next++, len) == Put::kDone);
      CHECK_EQ(w.queues().size(w.queue(q), false, soon()), next - expected);
      for (u32 k = 0; k < 2; ++k) CHECK_EQ(get(w, q), expected++);
    }
    for (const i64 id : drain(w, q)) CHECK_EQ(id, expected++);
    CHECK_EQ(expected, next);
    clean(w);
  }
}

TEST("queue: three rings and back, then round and round in the last") {
  World w(u64{64} << 20);
  const u32 q = w.make_queue();
  u32 next = 0, expected = 0;
  for (; next < 3'000; ++next) CHECK(put(w, q, next, 40 + next % 500) == Put::kDone);
  for (int k = 0; k < 20'000; ++k) {
    CHECK_EQ(get(w, q), expected++);
    CHECK(put(w, q, next, 40 + next % 500) == Put::kDone);
    ++next;
  }
  CHECK_EQ(drain(w, q).size(), next - expected);
  w.arena.drop(w.me, w.object(q), soon());
  clean(w, 0);
}

TEST("queue: an empty message, and one that is too long for the buffer") {
  World w;
  const u32 q = w.make_queue();
  const Outgoing none{3, "", 0};
  u32 done = 0;
  CHECK(w.queues().put(w.queue(q), &none, 1, &done, soon()) == Put::kDone);
  CHECK(put(w, q, 5, 100) == Put::kDone);
  char buffer[200];
  Incoming in{buffer, 50, 0, 0};
  CHECK(w.queues().try_get(w.queue(q), false, in, soon()) == Get::kDone);
  CHECK(in.len == 0 && in.kind == 3);
  CHECK(w.queues().try_get(w.queue(q), false, in, soon()) == Get::kTooSmall);
  CHECK_EQ(in.len, 100);
  CHECK_EQ(get(w, q), 5);
  CHECK_EQ(get(w, q), -1);
}

TEST("queue: bounded") {
  World w;
  const u32 q = w.make_queue(3);
  for (u32 i = 0; i < 3; ++i) CHECK(put(w, q, i, 10, at_once()) == Put::kDone);
  CHECK(w.queues().full(w.queue(q)));
  CHECK(put(w, q, 3, 10, at_once()) == Put::kFull);
  CHECK(put(w, q, 3, 10, soon(20)) == Put::kFull);
  CHECK_EQ(get(w, q), 0);
  CHECK(!w.queues().full(w.queue(q)));
  const std::string text = message(3, 10);
  const Outgoing two[2] = {{1, text.data(), 10}, {1, text.data(), 10}};
  u32 done = 0;
  CHECK(w.queues().put(w.queue(q), two, 2, &done, at_once()) == Put::kFull);
  CHECK_EQ(done, 1);
  CHECK_EQ(w.queues().size(w.queue(q), false, soon()), 3);
}

TEST("queue: shut down") {
  World w;
  const u32 q = w.make_queue();
  put(w, q, 1, 10);
  put(w, q, 2, 10);
  CHECK(w.queues().shut_down(w.queue(q), false, soon()));
  CHECK(put(w, q, 3, 10) == Put::kShutDown);
  CHECK_EQ(get(w, q), 1);
  CHECK(w.queues().shut_down(w.queue(q), true, soon()));
  CHECK_EQ(get(w, q), -3);
}

TEST("queue: get_many, over several rings, into little room") {
  World w;
  const u32 q = w.make_queue();
  for (u32 i = 0; i < 60; ++i) put(w, q, i, 200);
  u32 n = 0;
  const auto take = [&](const Message& m) { return n % 7 != 6 && message_id(m.payload(), m.payload_len()) == n++; };
  CHECK(w.queues().try_get_many(w.queue(q), 4, take, soon()) == Get::kDone);
  CHECK_EQ(n, 4);
  CHECK(w.queues().try_get_many(w.queue(q), 100, take, soon()) == Get::kDone);
  CHECK_EQ(n, 6);
  CHECK(w.queues().try_get_many(w.queue(q), 100, take, soon()) == Get::kTooSmall);
  CHECK_EQ(drain(w, q).size(), 54);
}

TEST("JoinableQueue: done, not done, and come again when its consumer died") {
  World w;
  const u32 i = w.make_queue(0, true);
  QueueState& q = w.queue(i);
  const QueueOps ops = w.queues();
  CHECK(ops.join(q, at_once()) == Wait::kReady);
  for (u32 id = 0; id < 5; ++id) put(w, i, id, 300);
  CHECK_EQ(get(w, i), 0);
  in_child([&] {
    w.enter({i});
    CHECK_EQ(get(w, i), 1);
    CHECK_EQ(get(w, i), 2);
    CHECK(w.queues().task_done(q, soon()) == QueueOps::Done::kYes);
  });
  CHECK_EQ(get(w, i), 3);
  CHECK_EQ(ops.unfinished(q), 4);
  CHECK_EQ(get(w, i), 4);
  CHECK_EQ(get(w, i), 2);
  CHECK_EQ(get(w, i), -1);
  CHECK(ops.join(q, soon(30)) == Wait::kTimeout);
  for (int k = 0; k < 4; ++k) CHECK(ops.task_done(q, soon()) == QueueOps::Done::kYes);
  CHECK(ops.task_done(q, soon()) == QueueOps::Done::kNone);
  CHECK(ops.join(q, soon()) == Wait::kReady);
  clean(w, 1 + (q.get_ring.load() != 0));
}
}  // namespace
