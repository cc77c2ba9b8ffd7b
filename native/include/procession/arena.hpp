// The arena: one memfd that a family of processes maps, with its process table, its blocks and its objects.
#pragma once

#include <sys/random.h>

#include "roster.hpp"

namespace procession {

constexpr u64 kMagic = 0x6e6f697373656372;  // "rcession"
constexpr u32 kLayout = 4;                  ///< raised with every change of what lies in the arena
constexpr u32 kClasses = 112;               ///< sizes of blocks, see Arena::class_bytes()
constexpr u32 kMinClass = 7;
constexpr u64 kPage = 4096;

enum class Kind : u8 {
  kNone,
  kLock,
  kRLock,
  kSemaphore,
  kBoundedSemaphore,
  kEvent,
  kCondition,
  kBarrier,
  kCells,
  kQueue,
  kJoinableQueue,
  kSegment,  // objects
  kRing,
  kRosterChunk,
  kRecord,
  kCargo,  // parts
};
constexpr bool is_object(Kind k) noexcept { return k >= Kind::kLock && k <= Kind::kSegment; }

/// Ground truth of the memory: what a block is and whose. Free lists are only a cache of `owner == 0`.
///
/// owner: 0 free | tag of the process that is building or taking it apart | kOwnedByQueue (part of `parent`)
///        | kOwnedByHolders (an object). Allocation stores the owner before it unlinks, freeing clears it before it links:
///        a kill in between leaves a block that collect() or a rebuild of the lists finds (pitfall 14).
struct Block {
  Atomic<u32> owner;
  u8 cls;
  Kind kind;
  u16 warm;  ///< 0: its pages are the kernel's; else how often it was used since, up to kHot; then see make_huge()
  Atomic<u32> gen;  ///< goes up with every free: a stale handle is told by it
  u32 next;         ///< free list
  u64 off;
  u32 parent, parent_gen;
};
static_assert(sizeof(Block) == 32);
constexpr u16 kHot = 64;

struct Header {
  u64 magic;
  u32 layout, slots;
  u64 id;     ///< random: tells one family's handles from another's
  u64 size;   ///< bytes mapped
  u64 limit;  ///< bytes that blocks may take: the memory limit when the arena was made
  u64 slots_off, blocks_off, data_off;
  u32 max_blocks;
  Atomic<u32> namespaces;  ///< set before a process of another pid namespace than the first one's takes a slot
  u64 pidns;               ///< the first process's
  alignas(128) Mutex alloc;
  Atomic<u32> nblocks;  ///< blocks ever carved, block 0 included; the commit of carving
  u64 bump;             ///< cache: end of the last block carved
  Atomic<u64> used;     ///< cache: bytes of blocks with an owner
  Atomic<u64> idle;     ///< cache: bytes of warm blocks without one
  Atomic<u32> free_list[kClasses];
  alignas(128) Mutex collect;
  Atomic<u32> departures;  ///< processes that left since the last collect()
  Atomic<u32> slot_end;    ///< one past the highest slot ever taken: what a look at all slots has to read
};

/// First 64 bytes of every object.
struct Object {
  Kind kind;
  u8 flags;
  Atomic<u16> pinned;  ///< its handle was pickled to an unknown destination: lives as long as the family
  u32 block;
  Mutex guard;          ///< of `holders` and `cargoes`
  Atomic<u32> cargoes;  ///< messages under way that carry a handle of it; cache of their cargoes' `counted`
  Roster holders;       ///< value: number of handles in that process
};
static_assert(sizeof(Object) == 64);

/// The handles that one message carries: while it is under way, they hold their objects.
///
/// A part of the message's queue, named in the message. Its entries count in their objects' `cargoes`; both change under the
/// object's guard, and when somebody dies under that, the next one counts anew (I5).
struct Cargo {
  struct Entry {
    u32 block, gen;
    Atomic<u32> counted;
    u32 unused;
  };
  u32 n, unused;
  Entry entry[];
};

/// Memory for one array, or any other bytes that are read in place. What it holds begins `kSegmentData` behind the block's start.
struct SegmentState {
  Object object;
  u64 length;          ///< bytes
  Atomic<u32> frozen;  ///< never written to again: all map it shared
  u32 unused;
};
constexpr u64 kSegmentData = kPage;

/// One process's view of an arena.
class Arena {
 public:
  enum class Failure : u8 { kNone, kMemfd, kTruncate, kMap, kNotAnArena, kLayout, kTooSmall, kSlots };

  static constexpr u64 kDefaultSize = u64{64} << 30;
  static constexpr u64 kMinSize = u64{256} << 10;

  /// Make a new arena of at most `size` bytes of address space, of which blocks may take `limit`.
  /// RLIMIT_AS and RLIMIT_FSIZE can forbid the size: it is halved until it fits.
  Failure create(u64 size, u64 limit) noexcept {
    fd_ = static_cast<int>(syscall(SYS_memfd_create, "procession", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (fd_ < 0) return fail(Failure::kMemfd);
    size = std::max(size, kMinSize) & ~(kPage - 1);
    rlimit file_size{};
    if (getrlimit(RLIMIT_FSIZE, &file_size) == 0 && file_size.rlim_cur != RLIM_INFINITY) {
      // ftruncate past the limit raises SIGXFSZ, which kills a process that does not ignore it.
      size = std::min(size, static_cast<u64>(file_size.rlim_cur) & ~(kPage - 1));
    }
    failure_ = Failure::kTruncate;
    errno = EFBIG;
    for (;; size = (size / 2) & ~(kPage - 1)) {
      if (size < kMinSize) return fail(failure_);
      failure_ = Failure::kTruncate;
      if (ftruncate(fd_, static_cast<off_t>(size)) != 0) continue;
      failure_ = Failure::kMap;
      if (map(size)) break;
    }
    // Nobody may cut the file under the family: that would be SIGBUS everywhere (pitfall 17).
    fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    failure_ = Failure::kNone;
    Header& h = header();
    h.layout = kLayout;
    h.size = size;
    if (getrandom(&h.id, sizeof h.id, 0) != sizeof h.id)
      h.id = static_cast<u64>(now_ns()) ^ (static_cast<u64>(getpid()) << 40);
    h.slots = static_cast<u32>(std::clamp<u64>(size / 8192, 64, kMaxSlots));
    h.slots_off = kPage;
    h.blocks_off = h.slots_off + h.slots * sizeof(Slot);
    h.max_blocks = static_cast<u32>(std::clamp<u64>(size / 2048, 1024, u64{1} << 24));
    h.data_off = (h.blocks_off + h.max_blocks * sizeof(Block) + kPage - 1) & ~(kPage - 1);
    if (h.data_off >= size) return fail(Failure::kTooSmall);
    h.limit = std::min(limit, size - h.data_off);
    h.bump = h.data_off;
    h.nblocks.store(1, std::memory_order_relaxed);
    h.pidns = pid_namespace();
    h.magic = kMagic;
    return Failure::kNone;
  }

  /// Map the arena behind `fd`, which this object owns from now on.
  Failure attach(int fd) noexcept {
    fd_ = fd;
    fcntl(fd_, F_SETFD, FD_CLOEXEC);
    struct stat st;
    if (fstat(fd_, &st) != 0 || st.st_size < static_cast<off_t>(kMinSize)) return fail(Failure::kNotAnArena);
    if (!map(static_cast<u64>(st.st_size))) return fail(Failure::kMap);
    if (header().magic != kMagic) return fail(Failure::kNotAnArena);
    if (header().layout != kLayout) return fail(Failure::kLayout);
    return Failure::kNone;
  }

  void unmap() noexcept {
    if (base_ != nullptr) munmap(base_, size_);
    if (fd_ >= 0) close(fd_);
    base_ = nullptr;
    fd_ = -1;
  }

  Header& header() const noexcept { return *reinterpret_cast<Header*>(base_); }
  Slot* slots() const noexcept { return reinterpret_cast<Slot*>(base_ + header().slots_off); }
  Block& block(u32 i) const noexcept { return reinterpret_cast<Block*>(base_ + header().blocks_off)[i]; }
  template <class T>
  T& at(u32 i) const noexcept {
    return *reinterpret_cast<T*>(base_ + block(i).off);
  }
  int fd() const noexcept { return fd_; }
  bool contains(const void* p) const noexcept { return p >= base_ && p < base_ + size_; }
  char* data_of(const SegmentState& s) const noexcept { return base_ + block(s.object.block).off + kSegmentData; }

  /// Map a segment's pages for this process alone, or shared again. Private: its bytes are as they are now, what this process
  /// writes from now on is its own, copied page by page; nobody else may write to them. False: no memory for the mapping.
  bool map_segment(const SegmentState& s, bool shared) noexcept {
    const u64 bytes = (s.length + kPage - 1) & ~(kPage - 1);
    void* p =
        mmap(data_of(s), bytes, PROT_READ | PROT_WRITE, (shared ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED | MAP_NORESERVE,
             fd_, static_cast<off_t>(data_of(s) - base_));
    if (p == MAP_FAILED) return false;
    if (shared) madvise(p, bytes, MADV_DONTDUMP);
    return true;
  }

  /// Before `n` bytes are written to a segment: have its memory in huge pages, if it has been used often enough.
  ///
  /// Copies to and from huge pages are faster: up to twice for what is larger than the caches, else by a tenth. To copy the small
  /// pages together takes 0.3 to 0.6 ms/MB, ten times that in a virtual machine that has not used the memory before. So it begins
  /// when as much time has been lost without, and each use spends half the time of its copy on it, until all have been tried: `warm`
  /// is then kHot and their number. From Linux 6.1 on, also where transparent huge pages are to be asked for. What else lies in
  /// the first and the last one comes along, unnoticed.
  void make_huge(const SegmentState& s, u64 n) noexcept {
    constexpr u64 kLeast = 1 << 20, kLarge = 20 << 20, kBytesInNs = 16;
    constexpr u16 kHotIfLarge = 4;
    constexpr int kCollapse = 25;
    constexpr i64 kPauseNs = 10'000'000'000;
    static Atomic<i64> not_before{0};  // when the kernel has found none, it has searched for long
    Block& b = block(s.object.block);
    if (s.length < kLeast || b.warm < (s.length < kLarge ? kHot : kHotIfLarge)) return;
    b.warm = std::max(b.warm, kHot);
    const u64 begin = b.off & ~(kHugePage - 1);
    const u64 end = std::min(b.off + kSegmentData + s.length + kHugePage - 1, size_) & ~(kHugePage - 1);
    const u64 pages = std::min<u64>((end - begin) / kHugePage, UINT16_MAX - kHot);
    u64 done = b.warm - kHot;
    if (done >= pages) return;
    const i64 start = now_ns();
    if (start < not_before.load(std::memory_order_relaxed)) return;
    for (; done < pages && static_cast<u64>(now_ns() - start) < n / kBytesInNs; ++done) {
      // Any other error is there to stay: an older kernel, or what this process has mapped privately lies there too.
      if (madvise(base_ + begin + done * kHugePage, kHugePage, kCollapse) != 0 &&
          (errno == ENOMEM || errno == EAGAIN || errno == EBUSY)) {
        not_before.store(now_ns() + kPauseNs, std::memory_order_relaxed);
        break;
      }
    }
    b.warm = static_cast<u16>(kHot + done);
  }

  /// Have a segment's pages mapped at once: a fault for each (or for 16, where they are read) takes as long as copying it does.
  /// From Linux 5.14 on; before, they are faulted in.
  void populate(const SegmentState& s, bool write) noexcept {
    constexpr int kPopulateRead = 22, kPopulateWrite = 23;
    madvise(data_of(s), (s.length + kPage - 1) & ~(kPage - 1), write ? kPopulateWrite : kPopulateRead);
  }
  int error() const noexcept { return errno_; }
  u64 id() const noexcept { return header().id; }

  // --- processes ------------------------------------------------------------------------------------------------------

  /// Take a slot for the calling process; 0 when all are taken.
  Tag claim() noexcept {
    const pid_t pid = getpid();
    tell_namespace(pid_namespace());
    const u32 i = take_slot(pid);
    if (i == 0) return 0;
    Slot& s = slots()[i];
    s.parent.store(0, std::memory_order_relaxed);
    return enter(i, pid);
  }

  /// Before fork: a slot for the child to be, so that what the parent holds can be marked as the child's too.
  Tag reserve_child(Tag me) noexcept {
    const u32 i = take_slot(-getpid());
    if (i == 0) return 0;
    Slot& s = slots()[i];
    s.parent.store(me, std::memory_order_relaxed);
    s.start_ticks.store(static_cast<u64>(now_ns()), std::memory_order_relaxed);
    s.pidns = pid_namespace_of_children();
    const u32 gen = Slot::gen_of(s.word.load(std::memory_order_relaxed));
    s.word.store(Slot::make(gen, SlotState::kReserved), std::memory_order_release);
    return make_tag(gen, i);
  }

  /// In the child, right after fork: only async-signal-safe calls. False: it came too late (it was stopped for long), and
  /// the reservation has been given up.
  ///
  /// The pid is what decides between the child and those who give the reservation up: each swaps the parent's for its own.
  bool enter_reserved(Tag tag) noexcept {
    Slot& s = slots()[slot_index(tag)];
    const Slot::Tenant t = s.tenant();
    if (t.word != Slot::make(slot_gen(tag), SlotState::kReserved) || t.pid >= 0) return false;
    if (!s.replace_tenant(t, {t.word, getpid()})) return false;
    enter(slot_index(tag), getpid());
    return true;
  }

  /// This process ends by its bootstrap: its locks stay held (a hand-over is legal), the rest is given back by collect().
  void leave(Tag me, bool failed) noexcept {
    Slot& s = slots()[slot_index(me)];
    s.failed.store(failed ? 1 : 0, std::memory_order_relaxed);
    u32 w = Slot::make(slot_gen(me), SlotState::kLive);
    if (s.word.compare_exchange_strong(w, Slot::make(slot_gen(me), SlotState::kExited))) {
      header().departures.fetch_add(1, std::memory_order_relaxed);
    }
  }

  /// The slot of a process of ours, by pid; 0 when there is none.
  u32 find_slot(pid_t pid) const noexcept {
    for (u32 i = 1; i < header().slot_end.load(std::memory_order_relaxed); ++i) {
      if (slots()[i].pid.load(std::memory_order_acquire) == pid) return i;
    }
    return 0;
  }

  /// Died, or ended with an error: what it had been given to do is not done.
  bool failed(Tag t, bool ask_kernel) const noexcept {
    const Owner o = fate(t, ask_kernel);
    if (o != Owner::kExited || slot_index(t) == 0 || slot_index(t) >= kMaxSlots) return o == Owner::kDied;
    const Slot& s = slots()[slot_index(t)];
    const bool did = s.failed.load(std::memory_order_relaxed) != 0;
    return did && Slot::gen_of(s.word.load(std::memory_order_acquire)) == slot_gen(t);
  }

  Owner fate(Tag t, bool ask_kernel) const noexcept { return owner_fate(slots(), t, ask_kernel); }
  bool gone(Tag t, bool ask_kernel) const noexcept { return left_for_good(slots(), t, ask_kernel); }

  // --- memory ---------------------------------------------------------------------------------------------------------

  /// A block of at least `size` bytes, not zeroed, owned by `me` until it is linked into an object. 0: the arena is full,
  /// or the wait for the allocator was interrupted. May be called under an object's mutex; never calls collect().
  u32 allocate(Tag me, u64 size, Kind kind, u32 parent, const Waiter& waiter) noexcept;
  void free(Tag me, u32 i, const Waiter& waiter) noexcept;
  u64 trim(Tag me, const Waiter& waiter) noexcept;
  /// Bytes of a block of class `c`: 2^c below 64 KiB; from there on in steps of a quarter, and a page more, so that a ring of 2^k
  /// bytes fits with its header, and an array with its.
  static constexpr u64 class_bytes(u32 c) noexcept {
    constexpr u32 kFine = 16;
    if (c < kFine) return u64{1} << c;
    const u32 k = kFine + (c - kFine) / 4;
    return (u64{4 + (c - kFine) % 4} << (k - 2)) + kPage;
  }
  static u32 class_of(u64 size) noexcept {
    u32 c = kMinClass;
    while (class_bytes(c) < size) ++c;
    return c;
  }

  /// At most every 200 us for calls that do not wait: asking the kernel whether a process lives costs 7 us.
  bool may_ask_kernel() noexcept {
    const i64 now = now_ns();
    i64 last = asked_.load(std::memory_order_relaxed);
    return now - last > 200'000 && asked_.compare_exchange_strong(last, now, std::memory_order_relaxed);
  }

  /// An object: header filled in, held once by `me`. Its first `zeroed` bytes are zero.
  u32 allocate_object(Tag me, u64 size, Kind kind, const Waiter& waiter, u64 zeroed = UINT64_MAX) noexcept {
    constexpr u32 kManyDepartures = 64;  // arbitrary: collect() walks all blocks, some 5 ns each
    if (header().departures.load(std::memory_order_relaxed) >= kManyDepartures) collect(me, waiter);
    u32 i = allocate(me, size, kind, 0, waiter);
    if (i == 0 && collect(me, waiter) != 0) i = allocate(me, size, kind, 0, waiter);
    if (i == 0) return 0;
    std::memset(&at<char>(i), 0, std::min(size, zeroed));
    Object& o = at<Object>(i);
    o.kind = kind;
    o.block = i;
    o.holders.entry[0].value.store(1, std::memory_order_relaxed);
    o.holders.entry[0].tag.store(me, std::memory_order_relaxed);
    block(i).owner.store(kOwnedByHolders, std::memory_order_release);
    return i;
  }

  /// One more handle of `who` (this process, or its child to be). False: interrupted, or no memory for the entry.
  bool hold(Tag me, Object& o, Tag who, u32 count, const Waiter& waiter) noexcept {
    if (!lock_guard(me, o, waiter)) return false;
    RosterEntry* e = roster_entry(me, o.holders, o.block, who, true, waiter.undisturbed());
    if (e != nullptr) {
      const u32 had = e->tag.load(std::memory_order_relaxed) == who ? e->value.load(std::memory_order_relaxed) : 0;
      e->value.store(had + count, std::memory_order_relaxed);
      e->tag.store(who, std::memory_order_release);
    } else {
      o.pinned.store(1, std::memory_order_relaxed);  // no room to write it down: keep it for good
    }
    o.guard.unlock();
    return true;
  }

  /// One handle of `me` less; the last one of the family frees the object.
  void drop(Tag me, Object& o, const Waiter& waiter) noexcept {
    if (!lock_guard(me, o, waiter)) return;
    bool others = is_kept(o);
    for_each(o.holders, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_relaxed);
      if (t == me) {
        const u32 n = e.value.load(std::memory_order_relaxed);
        if (n > 1) {
          e.value.store(n - 1, std::memory_order_relaxed);
          others = true;
        } else {
          e.tag.store(0, std::memory_order_release);
        }
      } else if (t != 0 && !gone(t, false)) {
        others = true;
      }
    });
    const u32 i = o.block;
    // Nobody can come to hold it any more: a handle is made from a handle, and there is none. Where collect() is looking at
    // it (kInspected), it sees that nobody holds it, and destroys it.
    u32 owner = kOwnedByHolders;
    const bool mine = !others && block(i).owner.compare_exchange_strong(owner, me);
    o.guard.unlock();
    if (mine) destroy(me, i, waiter);
  }

  /// Beside its holders: something else keeps the object.
  static bool is_kept(const Object& o) noexcept {
    return o.pinned.load(std::memory_order_relaxed) != 0 || o.cargoes.load(std::memory_order_relaxed) != 0;
  }

  /// Does anybody but `me` hold the object, or is it in more than `messages` messages?
  bool is_shared(Tag me, Object& o, u32 messages, const Waiter& waiter) noexcept {
    if (!lock_guard(me, o, waiter)) return true;
    bool others = o.pinned.load(std::memory_order_relaxed) != 0 || o.cargoes.load(std::memory_order_relaxed) > messages;
    for_each(o.holders, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_relaxed);
      others = others || (t != 0 && t != me && !gone(t, true));
    });
    o.guard.unlock();
    return others;
  }

  // --- cargoes: see Cargo

  /// A cargo of `n` handles for a message of the queue `parent`, owned by `me` until the message is in the queue. 0: no memory.
  u32 load_cargo(Tag me, u32 parent, Object* const* objects, u32 n, const Waiter& waiter) noexcept {
    const u32 i = allocate(me, sizeof(Cargo) + n * sizeof(Cargo::Entry), Kind::kRecord, parent, waiter);
    if (i == 0) return 0;
    Cargo& c = at<Cargo>(i);
    c.n = 0;
    // Not before: count_cargoes() reads what is one.
    std::atomic_ref<Kind>(block(i).kind).store(Kind::kCargo, std::memory_order_release);
    for (u32 k = 0; k < n; ++k) {
      Object& o = *objects[k];
      c.entry[k].block = o.block;
      c.entry[k].gen = block(o.block).gen.load(std::memory_order_relaxed);
      c.entry[k].counted.store(0, std::memory_order_relaxed);
      c.n = k + 1;
      CRASH_POINT("load_cargo.before_count");
      if (!lock_guard(me, o, waiter)) {  // somebody was stopped in there: it is kept for good
        o.pinned.store(1, std::memory_order_relaxed);
        continue;
      }
      o.cargoes.store(o.cargoes.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
      CRASH_POINT("load_cargo.between");
      c.entry[k].counted.store(1, std::memory_order_relaxed);
      o.guard.unlock();
    }
    return i;
  }

  /// The message is gone: let go of what it carried, and free the cargo, which is `me`'s.
  void unload_cargo(Tag me, u32 i, const Waiter& waiter) noexcept {
    Cargo& c = at<Cargo>(i);
    for (u32 k = 0; k < c.n; ++k) {
      Cargo::Entry& e = c.entry[k];
      if (e.counted.load(std::memory_order_relaxed) == 0) continue;
      Object& o = at<Object>(e.block);           // which lives, for this entry counts
      if (!lock_guard(me, o, waiter)) continue;  // likewise
      o.cargoes.store(o.cargoes.load(std::memory_order_relaxed) - 1, std::memory_order_relaxed);
      CRASH_POINT("unload_cargo.between");
      e.counted.store(0, std::memory_order_relaxed);
      const bool mine = take_if_unheld(me, o, e.block);
      o.guard.unlock();
      if (mine) destroy(me, e.block, waiter);
    }
    free(me, i, waiter);
  }

  /// Under the guard: nobody holds the object any more, and it is `me`'s to destroy.
  bool take_if_unheld(Tag me, Object& o, u32 i) noexcept {
    bool held = is_kept(o);
    for_each(o.holders, [&](RosterEntry& e) {
      const Tag t = e.tag.load(std::memory_order_relaxed);
      held = held || (t != 0 && !gone(t, false));
    });
    u32 owner = kOwnedByHolders;
    return !held && block(i).owner.compare_exchange_strong(owner, me);
  }

  /// Take an object's guard; after a death under it, count again what it guards.
  bool lock_guard(Tag me, Object& o, const Waiter& waiter) noexcept {
    const Locked l = o.guard.lock(slots(), me, waiter);
    if (l == Locked::kRecovered) count_cargoes(o);
    return l != Locked::kNo;
  }

  void count_cargoes(Object& o) noexcept {
    const u32 gen = block(o.block).gen.load(std::memory_order_relaxed);
    u32 n = 0;
    for (u32 i = 1; i < header().nblocks.load(std::memory_order_acquire); ++i) {
      if (block(i).kind != Kind::kCargo || block(i).owner.load(std::memory_order_acquire) == 0) continue;
      const Cargo& c = at<Cargo>(i);
      for (u32 k = 0; k < c.n; ++k) {
        const Cargo::Entry& e = c.entry[k];
        n += e.block == o.block && e.gen == gen && e.counted.load(std::memory_order_relaxed) != 0;
      }
    }
    o.cargoes.store(n, std::memory_order_relaxed);
  }

  bool is_live_object(u32 i) const noexcept {
    const u32 owner = block(i).owner.load(std::memory_order_acquire);
    return owner == kOwnedByHolders || owner == kInspected;
  }

  /// Find or make `who`'s entry, under the mutex that guards the roster. With `reuse`, a departed process's entry counts
  /// as free; without, only an empty one does. nullptr: the arena is full.
  RosterEntry* roster_entry(Tag me, Roster& r, u32 parent, Tag who, bool reuse, const Waiter& waiter) noexcept {
    RosterEntry* mine = nullptr;
    RosterEntry* empty = nullptr;
    RosterEntry* departed = nullptr;
    Atomic<u32>* end = nullptr;
    for_each(
        r,
        [&](RosterEntry& e) {
          const Tag t = e.tag.load(std::memory_order_acquire);
          if (t == who) mine = &e;
          else if (t == 0) empty = &e;
          else if (reuse && departed == nullptr && gone(t, false)) departed = &e;
        },
        &end);
    if (mine != nullptr) return mine;
    if (empty != nullptr) return empty;
    if (departed != nullptr) return departed;
    RosterChunk* c = add_chunk(me, *end, parent, waiter);
    return c == nullptr ? nullptr : &c->entry[0];
  }

  /// An empty entry, also where `who` has others (one per waiting thread).
  RosterEntry* empty_entry(Tag me, Roster& r, u32 parent, const Waiter& waiter) noexcept {
    RosterEntry* empty = nullptr;
    Atomic<u32>* end = nullptr;
    for_each(
        r,
        [&](RosterEntry& e) {
          if (empty == nullptr && e.tag.load(std::memory_order_acquire) == 0) empty = &e;
        },
        &end);
    if (empty != nullptr) return empty;
    RosterChunk* c = add_chunk(me, *end, parent, waiter);
    return c == nullptr ? nullptr : &c->entry[0];
  }

  /// Link one more chunk at `end`; returns it, or nullptr when the arena is full.
  RosterChunk* add_chunk(Tag me, Atomic<u32>& end, u32 parent, const Waiter& waiter) noexcept {
    const u32 i = allocate(me, sizeof(RosterChunk), Kind::kRosterChunk, parent, waiter);
    if (i == 0) return nullptr;
    RosterChunk& c = at<RosterChunk>(i);
    std::memset(static_cast<void*>(&c), 0, sizeof c);
    end.store(i, std::memory_order_release);
    block(i).owner.store(kOwnedByQueue, std::memory_order_release);
    return &c;
  }

  template <class F>
  void for_each(Roster& r, F&& f, Atomic<u32>** end = nullptr) noexcept {
    for (RosterEntry& e : r.entry) f(e);
    Atomic<u32>* next = &r.more;
    for (u32 i = next->load(std::memory_order_acquire); i != 0; i = next->load(std::memory_order_acquire)) {
      RosterChunk& c = at<RosterChunk>(i);
      for (RosterEntry& e : c.entry) f(e);
      next = &c.next;
    }
    if (end != nullptr) *end = next;
  }

  /// Free an object's parts, then the object; `me` owns the block.
  void destroy(Tag me, u32 i, const Waiter& waiter) noexcept;

  /// Give back what departed processes left: locks (marked as orphaned), handles, blocks, items in hand, slots.
  /// Idempotent, and taken up by the next caller when the one at work is killed. Returns the number of slots freed.
  u32 collect(Tag me, const Waiter& waiter) noexcept;

  template <class F>
  bool look_at_holders(Tag me, u32 i, const Waiter& waiter, F&& f) noexcept;

 private:
  Failure fail(Failure f) noexcept {
    errno_ = errno;
    unmap();
    return failure_ = f;
  }

  bool map(u64 size) noexcept {
    // At an address that huge pages can begin at, if there is room to look for one.
    const u64 room = size + kHugePage;
    void* reserved = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* at = nullptr;
    if (reserved != MAP_FAILED) {
      char* begin = static_cast<char*>(reserved);
      at = begin + (kHugePage - reinterpret_cast<std::uintptr_t>(begin) % kHugePage) % kHugePage;
      if (at != begin) munmap(begin, static_cast<u64>(at - begin));
      if (at + size != begin + room) munmap(at + size, static_cast<u64>(begin + room - (at + size)));
    }
    void* p =
        mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | (at != nullptr ? MAP_FIXED : 0), fd_, 0);
    if (p == MAP_FAILED) {
      if (at != nullptr) munmap(at, size);
      return false;
    }
    madvise(p, size, MADV_DONTDUMP);  // or a core file would be as large as the reservation
    base_ = static_cast<char*>(p);
    size_ = size;
    return true;
  }

  /// A pid in a slot that nobody is in yet has nothing beside it that says whose namespace it is of.
  void tell_namespace(u64 mine) noexcept {
    if (mine != header().pidns) header().namespaces.store(1);
  }
  bool pids_mean_the_same() const noexcept { return header().pidns != 0 && header().namespaces.load() == 0; }

  u32 take_slot(i32 pid) noexcept {
    Header& h = header();
    for (u32 i = 1; i < h.slots; ++i) {
      Slot& s = slots()[i];
      const Slot::Tenant t = s.tenant();
      if (Slot::state_of(t.word) != SlotState::kFree || t.pid != 0 || !s.replace_tenant(t, {t.word, pid})) continue;
      u32 end = h.slot_end.load(std::memory_order_relaxed);
      while (end < i + 1 && !h.slot_end.compare_exchange_weak(end, i + 1)) {}
      return i;
    }
    return 0;
  }

  Tag enter(u32 i, pid_t pid) noexcept {
    Slot& s = slots()[i];
    const ProcStat me = read_proc_stat(pid);
    s.start_ticks.store(me.found ? me.start_ticks : 0, std::memory_order_relaxed);
    s.start_stack.store(me.found ? me.start_stack : 0, std::memory_order_relaxed);
    s.pidns = pid_namespace();
    tell_namespace(s.pidns);
    s.exit_code.store(0, std::memory_order_relaxed);
    s.exit_known.store(0, std::memory_order_relaxed);
    s.failed.store(0, std::memory_order_relaxed);
    s.name[0] = '\0';
    s.pid.store(pid, std::memory_order_relaxed);
    const u32 gen = Slot::gen_of(s.word.load(std::memory_order_relaxed));
    s.word.store(Slot::make(gen, SlotState::kLive), std::memory_order_release);
    return make_tag(gen, i);
  }

  u32 carve(Tag me, u32 cls, Kind kind, u32 parent, bool made_room) noexcept;
  void rebuild_free_lists() noexcept;
  void set_block(Block& b, Kind kind, u32 parent) noexcept {
    b.kind = kind;
    b.parent = parent;
    b.parent_gen = parent == 0 ? 0 : block(parent).gen.load(std::memory_order_relaxed);
  }
  void release_slot(u32 i) noexcept;
  bool roster_reaches(u32 object, u32 chunk) noexcept;
  bool inspect(u32 i) noexcept;
  bool end_inspection(Tag me, u32 i, const Tag* left, u32 n, const Waiter& waiter) noexcept;
  u32 find_departed(Tag* left, u32 most) noexcept;
  bool settle_object(Tag me, u32 i, const Tag* left, u32 n) noexcept;
  void discard(Tag me, u32 i) noexcept;
  bool settle_part(Tag me, u32 i, bool owner_left, const Tag* left, u32 n) noexcept;
  void make_room() noexcept;
  /// The pages of a part go back to the kernel, and are zero when it is used again. False: it cannot be (a file system without
  /// holes, memory sealed by somebody), and all is as it was.
  bool give_back(u64 off, u64 bytes) noexcept {
    return fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(off),
                     static_cast<off_t>(bytes)) == 0;
  }

  char* base_ = nullptr;
  u64 size_ = 0;
  int fd_ = -1;
  int errno_ = 0;
  Atomic<i64> asked_{0};
  Failure failure_ = Failure::kNone;
};

// --- allocator ----------------------------------------------------------------------------------------------------------

inline void Arena::rebuild_free_lists() noexcept {
  Header& h = header();
  for (auto& f : h.free_list) f.store(0, std::memory_order_relaxed);
  const u32 n = h.nblocks.load(std::memory_order_relaxed);
  h.bump = h.data_off;
  u64 used = 0, idle = 0;
  for (u32 i = 1; i < n; ++i) {
    Block& b = block(i);
    h.bump = std::max(h.bump, b.off + class_bytes(b.cls));
    if (b.owner.load(std::memory_order_relaxed) == 0) {
      b.next = h.free_list[b.cls].load(std::memory_order_relaxed);
      h.free_list[b.cls].store(i, std::memory_order_relaxed);
      if (b.warm != 0 && class_bytes(b.cls) >= kPage) idle += class_bytes(b.cls);
    } else {
      used += class_bytes(b.cls);
    }
  }
  h.used.store(used, std::memory_order_relaxed);
  h.idle.store(idle, std::memory_order_relaxed);
}

/// Under `alloc`, when nothing more can be carved: give back the pages of free blocks, and the free blocks at the end.
inline void Arena::make_room() noexcept {
  Header& h = header();
  u32 n = h.nblocks.load(std::memory_order_relaxed);
  while (n > 1 && block(n - 1).owner.load(std::memory_order_relaxed) == 0) --n;
  u64 end = h.data_off;
  for (u32 i = 1; i < n; ++i) {
    Block& b = block(i);
    end = std::max(end, b.off + class_bytes(b.cls));
    if (b.owner.load(std::memory_order_relaxed) == 0 && class_bytes(b.cls) >= kPage &&
        give_back(b.off, class_bytes(b.cls)))
      b.warm = 0;
  }
  // Before the blocks there are forgotten: what is carved anew is zero.
  end = (end + kPage - 1) & ~(kPage - 1);
  const bool zeroed = end >= h.bump || give_back(end, h.bump - end);
  CRASH_POINT("make_room.before_commit");
  if (zeroed) h.nblocks.store(n, std::memory_order_release);
  rebuild_free_lists();
}

/// Give pages of free blocks back to the kernel; returns how many bytes, 0 when there are none. A portion at a time, for the
/// allocator stands still meanwhile: 7 GB/s.
inline u64 Arena::trim(Tag me, const Waiter& waiter) noexcept {
  constexpr u64 kPortion = 16 << 20;
  Header& h = header();
  u64 all = 0;
  for (u32 i = 1; h.idle.load(std::memory_order_relaxed) != 0;) {
    const Locked l = h.alloc.lock(slots(), me, waiter);
    if (l == Locked::kNo) break;
    if (l == Locked::kRecovered) rebuild_free_lists();
    u64 portion = 0;
    const u32 n = h.nblocks.load(std::memory_order_relaxed);
    for (; i < n && portion < kPortion; ++i) {
      Block& b = block(i);
      const u64 bytes = class_bytes(b.cls);
      if (b.owner.load(std::memory_order_relaxed) != 0 || b.warm == 0 || bytes < kPage) continue;
      if (!give_back(b.off, bytes)) {
        i = n;  // nor will any other
        break;
      }
      b.warm = 0;
      portion += bytes;
    }
    h.idle.store(h.idle.load(std::memory_order_relaxed) - std::min(portion, h.idle.load(std::memory_order_relaxed)),
                 std::memory_order_relaxed);
    h.alloc.unlock();
    all += portion;
    if (i >= n) break;
  }
  return all;
}

inline u32 Arena::carve(Tag me, u32 cls, Kind kind, u32 parent, bool made_room) noexcept {
  Header& h = header();
  const u32 i = h.nblocks.load(std::memory_order_relaxed);
  const u64 bytes = class_bytes(cls);
  const u64 align = std::min(bytes, kPage);
  const u64 off = (h.bump + align - 1) & ~(align - 1);
  // Addresses are plenty, memory is not: past the limit, free blocks hold pages that have to go back first.
  const bool beyond = off + bytes > h.data_off + h.limit;
  if (i >= h.max_blocks || off + bytes > h.size || (beyond && !made_room)) return 0;
  Block& b = block(i);
  b.cls = static_cast<u8>(cls);
  b.warm = 0;
  b.off = off;
  set_block(b, kind, parent);
  b.owner.store(me, std::memory_order_relaxed);
  CRASH_POINT("carve.before_commit");
  h.bump = off + bytes;
  h.nblocks.store(i + 1, std::memory_order_release);
  return i;
}

inline u32 Arena::allocate(Tag me, u64 size, Kind kind, u32 parent, const Waiter& waiter) noexcept {
  if (size > header().limit) return 0;
  const u32 cls = class_of(size);
  Header& h = header();
  // Rings leave some for the records and lists that getting items out of them takes.
  const u64 limit = kind == Kind::kRing ? h.limit - h.limit / 16 : h.limit;
  const auto within = [&](u32 c) { return h.used.load(std::memory_order_relaxed) + class_bytes(c) <= limit; };
  const Locked l = h.alloc.lock(slots(), me, waiter);
  if (l == Locked::kNo) return 0;
  if (l == Locked::kRecovered) rebuild_free_lists();
  u32 i = 0;
  bool fresh = false;
  for (int attempt = 0; attempt < 2 && i == 0 && within(cls); ++attempt) {
    if (attempt == 1) make_room();
    i = h.free_list[cls].load(std::memory_order_relaxed);
    fresh = i == 0 && (i = carve(me, cls, kind, parent, attempt == 1)) != 0;
  }
  u32 took = cls;
  // Still nothing: a larger free block is better than none.
  for (u32 c = cls + 1; i == 0 && c < kClasses; ++c) {
    const u32 larger = h.free_list[c].load(std::memory_order_relaxed);
    if (larger == 0 || !within(c)) continue;
    i = larger;
    took = c;
  }
  if (i != 0) {
    Block& b = block(i);
    if (!fresh) {
      set_block(b, kind, parent);
      b.owner.store(me, std::memory_order_release);
      CRASH_POINT("allocate.before_unlink");
      h.free_list[took].store(b.next, std::memory_order_relaxed);
      if (b.warm != 0 && class_bytes(took) >= kPage) {
        h.idle.store(h.idle.load(std::memory_order_relaxed) - class_bytes(took), std::memory_order_relaxed);
      }
    }
    h.used.store(h.used.load(std::memory_order_relaxed) + class_bytes(took), std::memory_order_relaxed);
  }
  h.alloc.unlock();
  return i;
}

inline void Arena::free(Tag me, u32 i, const Waiter& waiter) noexcept {
  Header& h = header();
  Block& b = block(i);
  constexpr u64 kLong = 1 << 20;  // from here on pages may go back to the kernel at once; 2 GB/s to fault them in again
  constexpr u64 kKeepIdle =
      64 << 20;  // what is kept for the next ones, or an eighth of the limit: trim() is for the rest
  const u64 bytes = class_bytes(b.cls);
  const bool many = h.idle.load(std::memory_order_relaxed) + bytes > std::max(kKeepIdle, h.limit / 8);
  const bool warm = bytes < kLong || !many || !give_back(b.off, bytes);
  const Locked l = h.alloc.lock(slots(), me, waiter);
  if (l == Locked::kNo) return;  // interrupted: the block stays ours; collect() gives it back when we are gone
  if (l == Locked::kRecovered) rebuild_free_lists();
  b.gen.fetch_add(1, std::memory_order_relaxed);
  b.kind = Kind::kNone;
  if (!warm) b.warm = 0;
  else if (b.warm < kHot) ++b.warm;
  b.owner.store(0, std::memory_order_release);
  CRASH_POINT("free.before_link");
  b.next = h.free_list[b.cls].load(std::memory_order_relaxed);
  h.free_list[b.cls].store(i, std::memory_order_release);
  h.used.store(h.used.load(std::memory_order_relaxed) - bytes, std::memory_order_relaxed);
  if (warm && bytes >= kPage) h.idle.store(h.idle.load(std::memory_order_relaxed) + bytes, std::memory_order_relaxed);
  h.alloc.unlock();
}

}  // namespace procession
