// A growing list of (process, value) pairs inside an object: who holds it, who waits in it.
#pragma once

#include "mutex.hpp"

namespace procession {

/// One entry. `tag` != 0 is the commit: an entry whose process died reads as that process's, and nobody else's.
struct RosterEntry {
  Atomic<u32> tag;
  Atomic<u32> value;
};

constexpr u32 kRosterInline = 5;
constexpr u32 kRosterChunkEntries = 31;

/// Further entries, in a block of their own (256 bytes), linked from the object.
struct RosterChunk {
  Atomic<u32> next;  ///< block of the next chunk, 0 for none
  u32 unused;
  RosterEntry entry[kRosterChunkEntries];
};
static_assert(sizeof(RosterChunk) == 256);

struct Roster {
  RosterEntry entry[kRosterInline];
  Atomic<u32> more;  ///< block of the first RosterChunk
  u32 unused;
};

}  // namespace procession
