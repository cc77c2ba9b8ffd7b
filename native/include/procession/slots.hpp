// The process table: who belongs to the family, and who has left it how.
#pragma once

#include <bit>
#include <cstddef>

#include "platform.hpp"

namespace procession {

/// Names one process of the family for good: generation (15 bits) << 16 | slot index (16 bits). 0 is nobody.
/// Bit 31 stays free: lock words use it for "somebody waits".
using Tag = u32;

constexpr u32 kWaiters = 1u << 31;
constexpr u32 kTagMask = kWaiters - 1;
constexpr u32 kMaxSlots = 0xfff0;           // higher indexes are the special owners below
constexpr Tag kOrphaned = 0x7fff'fff1;      ///< lock word: the owner died and its slot has been given back since
constexpr Tag kOwnedByQueue = 0x7fff'fff2;  ///< block owner: a part of the object `parent`
constexpr Tag kInspected = 0x7fff'fff4;  ///< block owner: an object that collect() is looking at; nobody else frees it
constexpr Tag kOwnedByHolders = 0x7fff'fff3;  ///< block owner: an object; lives while a process holds a handle

constexpr u32 slot_index(Tag t) noexcept { return t & 0xffff; }
constexpr u32 slot_gen(Tag t) noexcept { return (t >> 16) & 0x7fff; }
constexpr Tag make_tag(u32 gen, u32 index) noexcept { return (gen & 0x7fff) << 16 | index; }

/// A slot's word is gen << 16 | state, so that a state never changes under a stale generation.
///
///   kFree --claim--> kLive --process_exiting()--> kExited --\        (the process ended by its bootstrap)
///     |                \------- found gone ------> kDead ----+--collect()--> kFree, gen + 1
///     \--fork--> kReserved --child--> kLive
///
/// `pid` is claimed first (0 -> pid): a process that dies between that and kLive is found by its pid. A child swaps the pid
/// of the parent that reserved for its own, a collector that gives the reservation up for 0: so it is one of them.
enum class SlotState : u32 { kFree = 0, kReserved = 1, kLive = 2, kExited = 3, kDead = 4 };

struct alignas(256) Slot {
  Atomic<u32> word;
  Atomic<i32> pid;          ///< negative while reserved: minus the parent's
  Atomic<u64> start_ticks;  ///< while reserved: when that was, in ns of the monotonic clock
  Atomic<u64> start_stack;
  u64 pidns;
  Atomic<u32> parent;     ///< tag of the process that forked it, 0 when unknown
  Atomic<i32> exit_code;  ///< as in Process.exitcode, once somebody has told (record_exit)
  Atomic<u32> exit_known;
  Atomic<u32> failed;  ///< kExited: with an exception or an exit code other than 0
  char name[64];

  static constexpr u32 make(u32 gen, SlotState s) noexcept { return (gen & 0x7fff) << 16 | static_cast<u32>(s); }
  static constexpr SlotState state_of(u32 w) noexcept { return static_cast<SlotState>(w & 0xff); }
  static constexpr u32 gen_of(u32 w) noexcept { return w >> 16; }

  SlotState state() const noexcept { return state_of(word.load(std::memory_order_acquire)); }

  /// Word and pid belong together: between a load of the one and of the other the slot may have got another tenant, and
  /// a pid without a generation may be the same again. So they are read and swapped as one.
  struct Tenant {
    u32 word;
    i32 pid;
  };
  Tenant tenant() const noexcept { return std::bit_cast<Tenant>(both().load(std::memory_order_acquire)); }
  void set_tenant(Tenant next) noexcept { both().store(std::bit_cast<u64>(next), std::memory_order_release); }
  bool replace_tenant(Tenant seen, Tenant next) noexcept {
    u64 expected = std::bit_cast<u64>(seen);
    return both().compare_exchange_strong(expected, std::bit_cast<u64>(next));
  }

 private:
  Atomic<u64>& both() noexcept { return *reinterpret_cast<Atomic<u64>*>(this); }
  const Atomic<u64>& both() const noexcept { return *reinterpret_cast<const Atomic<u64>*>(this); }
};
static_assert(sizeof(Slot) == 256 && offsetof(Slot, word) == 0 && offsetof(Slot, pid) == 4);

/// Is the process behind a slot gone? `word` is the slot's word as read by the caller.
inline bool slot_process_gone(const Slot& s) noexcept {
  const i32 pid = s.pid.load(std::memory_order_acquire);
  if (pid <= 0) return false;  // reserved, or between two states: unknown is alive
  // Not cached: a fork may have put us into another namespace. Where the pids mean nothing, everybody counts as alive.
  if (s.pidns != 0 && s.pidns != pid_namespace()) return false;
  return process_is_gone(pid, s.start_ticks.load(std::memory_order_relaxed),
                         s.start_stack.load(std::memory_order_relaxed));
}

enum class Owner : u8 {
  kAlive,   ///< or unknown
  kDied,    ///< killed, crashed, os._exit: what it held may be half-done
  kExited,  ///< ended by its bootstrap; what it holds, it holds on purpose
};

/// What became of the process `tag`, from the table alone (`ask_kernel` false: a few ns) or from the kernel too (7 us).
inline Owner owner_fate(Slot* slots, Tag tag, bool ask_kernel) noexcept {
  if (tag == kOrphaned) return Owner::kDied;
  const u32 index = slot_index(tag);
  if (index == 0 || index >= kMaxSlots) return Owner::kAlive;
  Slot& s = slots[index];
  u32 w = s.word.load(std::memory_order_acquire);
  // collect() marks what the dead held before it bumps the generation, so an older generation left on purpose.
  if (Slot::gen_of(w) != slot_gen(tag)) return Owner::kExited;
  switch (Slot::state_of(w)) {
    case SlotState::kDead: return Owner::kDied;
    case SlotState::kExited: return Owner::kExited;
    case SlotState::kLive: break;
    default: return Owner::kAlive;
  }
  if (!ask_kernel || !slot_process_gone(s)) return Owner::kAlive;
  // First come: the loser of this race (another finder, or the process itself, which said goodbye and then ended) agrees.
  if (s.word.compare_exchange_strong(w, Slot::make(slot_gen(tag), SlotState::kDead))) return Owner::kDied;
  return owner_fate(slots, tag, false);
}

/// Has `tag` left for good, so that an internal mutex or a block of its can be taken over? Unlike owner_fate, a process
/// that said goodbye still counts until the kernel has seen it end: a daemon thread of it may be inside an operation.
inline bool left_for_good(Slot* slots, Tag tag, bool ask_kernel) noexcept {
  const u32 index = slot_index(tag);
  if (index == 0 || index >= kMaxSlots) return false;
  Slot& s = slots[index];
  const u32 w = s.word.load(std::memory_order_acquire);
  if (Slot::gen_of(w) != slot_gen(tag)) return true;
  if (Slot::state_of(w) == SlotState::kDead) return true;
  if (!ask_kernel) return false;
  if (Slot::state_of(w) == SlotState::kExited) return slot_process_gone(s);
  return owner_fate(slots, tag, true) == Owner::kDied;
}

}  // namespace procession
