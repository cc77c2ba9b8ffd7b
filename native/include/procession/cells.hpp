// Cells: a few numbers that several processes read and write, each by itself; no lock, nothing to repair after a kill.
#pragma once

#include "arena.hpp"

namespace procession {

struct CellsState {
  Object object;
  u64 count;
  Atomic<i64> at[1];  ///< `count` of them

  static u64 size(u64 count) noexcept { return sizeof(CellsState) + (count - 1) * sizeof(Atomic<i64>); }
};

}  // namespace procession
