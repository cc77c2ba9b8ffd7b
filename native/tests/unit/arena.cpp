// Arena: blocks, classes, free lists, objects and who holds them.
#include "../family.hpp"

namespace {
using namespace family;

TEST("arena: a block is used again, after the free list was lost too") {
  World w;
  const u32 a = w.arena.allocate(w.me, 1000, Kind::kRing, 0, soon());
  const u32 gen = w.arena.block(a).gen.load();
  w.arena.free(w.me, a, soon());
  CHECK(w.arena.block(a).gen.load() != gen);
  CHECK_EQ(w.arena.allocate(w.me, 900, Kind::kRing, 0, soon()), a);
  w.arena.free(w.me, a, soon());
  // A process dies with the allocator's lock, and the lists are torn: whoever comes next makes them anew.
  in_child([&] {
    w.me = w.arena.claim();
    w.arena.header().alloc.lock(w.arena.slots(), w.me, soon());
    for (auto& f : w.arena.header().free_list) f.store(0);
  });
  CHECK_EQ(w.arena.allocate(w.me, 1000, Kind::kRing, 0, soon()), a);
  w.arena.free(w.me, a, soon());
  clean(w, 0);
}

TEST("arena: classes hold what they are asked for") {
  World w(u64{32} << 20);
  for (u64 size :
       {1, 127, 128, 129, 4096, 4097, 65535, 65536, (64 << 10) + 192, 1 << 20, (1 << 20) + 4096, (1 << 20) + 4097}) {
    const u32 i = w.arena.allocate(w.me, size, Kind::kRing, 0, soon());
    CHECK(i != 0 && Arena::class_bytes(w.arena.block(i).cls) >= size);
    CHECK(w.arena.block(i).cls == kMinClass || Arena::class_bytes(w.arena.block(i).cls - 1u) < size);
    CHECK(w.arena.block(i).off % 128 == 0);
    std::memset(&w.arena.at<char>(i), 1, size);
    w.arena.free(w.me, i, soon());
  }
  clean(w, 0);
}

TEST("arena: full is an answer, and room comes back") {
  World w(u64{4} << 20, 1 << 20);
  std::vector<u32> blocks;
  for (u32 i; (i = w.arena.allocate(w.me, 100'000, Kind::kRing, 0, soon())) != 0;) blocks.push_back(i);
  CHECK(blocks.size() >= 7 && blocks.size() <= 9);
  CHECK_EQ(w.arena.allocate(w.me, u64{1} << 40, Kind::kRing, 0, soon()), 0);
  w.arena.free(w.me, blocks.back(), soon());
  CHECK_EQ(w.arena.allocate(w.me, 100'000, Kind::kRing, 0, soon()), blocks.back());
  for (const u32 i : blocks) w.arena.free(w.me, i, soon());
  const u32 q = w.make_queue();
  Put r = Put::kDone;
  u32 n = 0;
  while ((r = put(w, q, n, 50'000, at_once())) == Put::kDone) ++n;
  CHECK(r == Put::kNoMemory && n > 2);
  CHECK_EQ(drain(w, q).size(), n);
  CHECK(put(w, q, 1, 50'000, at_once()) == Put::kDone);
  w.arena.drop(w.me, w.object(q), soon());
  clean(w, 0);
}

TEST("arena: what is new is zero, also where there was something before") {
  World w(u64{4} << 20, 1 << 20);
  std::vector<u32> blocks;
  for (u32 size : {100'000u, 300u}) {
    for (u32 i; (i = w.arena.allocate(w.me, size, Kind::kRing, 0, soon())) != 0;) {
      blocks.push_back(i);
      std::memset(&w.arena.at<char>(i), 0xff, size);
    }
  }
  for (const u32 i : blocks) w.arena.free(w.me, i, soon());
  CHECK(w.arena.header().idle.load() >= 700'000);
  const u32 large = w.arena.allocate(w.me, 600'000, Kind::kRing, 0, soon());
  CHECK(large != 0 && w.arena.block(large).warm == 0);
  const char* p = &w.arena.at<char>(large);
  CHECK(std::all_of(p, p + 600'000, [](char c) { return c == 0; }));
  w.arena.free(w.me, large, soon());
  CHECK(w.arena.trim(w.me, soon()) >= 600'000);
  CHECK_EQ(w.arena.header().idle.load(), 0);
  clean(w, 0);
}

TEST("arena: an object lives while one process holds it, and no longer") {
  World w;
  const u32 i = w.make_lock();
  for (int k = 0; k < 3; ++k) CHECK(w.arena.hold(w.me, w.object(i), w.me, 1, soon()));
  std::vector<pid_t> children;
  for (int k = 0; k < 40; ++k) {  // more than the inline entries, more than one chunk
    children.push_back(spawn([&] {
      w.enter({i});
      for (;;) pause();
    }));
  }
  u32 held = 0;
  const i64 end = in_ms(20'000);
  do {
    held = 0;
    w.arena.for_each(w.object(i).holders, [&](RosterEntry& e) { held += e.tag.load() != 0; });
  } while (held != 41 && now_ns() < end);
  CHECK_EQ(held, 41);
  for (int k = 0; k < 4; ++k) w.arena.drop(w.me, w.object(i), soon());
  CHECK(w.arena.is_live_object(i));
  for (const pid_t p : children) kill(p, SIGKILL);
  for (const pid_t p : children) CHECK_EQ(reap(p), -SIGKILL);
  clean(w, 0);
}

TEST("arena: a pinned object stays") {
  World w;
  const u32 i = w.make_event();
  w.object(i).pinned.store(1);
  w.arena.drop(w.me, w.object(i), soon());
  clean(w, 1);
}

TEST("arena: not every file is one") {
  Arena a;
  const int fd = memfd_create("other", MFD_CLOEXEC);
  CHECK(a.attach(fd) == Arena::Failure::kNotAnArena);
  const int zeros = memfd_create("zeros", MFD_CLOEXEC);
  CHECK(ftruncate(zeros, 1 << 20) == 0);
  CHECK(a.attach(zeros) == Arena::Failure::kNotAnArena);
  World w;
  Arena again;
  CHECK(again.attach(dup(w.arena.fd())) == Arena::Failure::kNone);
  CHECK(again.id() == w.arena.id());
  again.unmap();
}
}  // namespace
