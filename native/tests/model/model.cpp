// The protocols of the core, as models: sleep and wake, the mutex, publication and growth of the queue, redelivery.
// Each also with a bug put in on purpose, which the checker must report.
#include "explore.hpp"

using namespace model;

namespace {

using u8 = unsigned char;
int failed = 0;

template <class M>
void check(const char* name, const M& m, bool holds) {
  const Result r = explore(m, m.first());
  const bool ok = r.error.empty() == holds && r.error != "too many states";
  failed += !ok;
  std::printf("%s model: %s: %zu states, %.1f s%s%s\n", ok ? "ok  " : "FAIL", name, r.states, r.seconds,
              r.error.empty() ? (holds ? "" : ": the bug was not found") : ": ", r.error.c_str());
  std::fflush(stdout);
}

// --- sleep and wake -----------------------------------------------------------------------------------------------------

/// EventCount. Producers publish items and look for sleepers; consumers take one, or prepare, look again, sleep. The last
/// consumer stays busy for ever with the first item it takes. What counts of the word's sequence is whether it has changed
/// since one read it: `fresh`.
struct SleepWake {
  enum Bug { kNone, kClearThenWake, kNoSecondLook, kLookBeforePublish, kSecondLookFirst, kClearUnconditionally };
  Bug bug = kNone;
  bool slices = false;  ///< a sleep may end by itself
  int kills = 0;
  int consumers = 2, items = 2;

  static constexpr int kProducers = 2, kMost = 3;
  struct Process {
    u8 pc, left, fresh, asleep, dead, bit;
  };
  struct State {
    u8 items, bit, kills;
    Process p[kProducers], c[kMost];
  };
  enum : u8 { kPublish, kLook, kAdd, kWake, kClear, kRestore, kDone };         // producer
  enum : u8 { kTake, kPrepare, kAgain, kSleep, kAsleep, kBusy, kAgainEarly };  // consumer

  State first() const {
    State s{};
    for (auto& p : s.p)
      p = {static_cast<u8>(bug == kLookBeforePublish ? kLook : kPublish), static_cast<u8>(items), 0, 0, 0, 0};
    for (int i = consumers; i < kMost; ++i) s.c[i].dead = 1;
    return s;
  }
  static void changed(State& s) {
    for (auto& p : s.p) p.fresh = 0;
    for (auto& c : s.c) c.fresh = 0;
  }

  template <class Emit>
  void moves(const State& s, Emit&& emit) const {
    for (int i = 0; i < kProducers; ++i) {
      if (s.p[i].dead || s.p[i].pc == kDone) continue;
      if (s.kills < kills) {
        State n = s;
        n.p[i].dead = 1;
        ++n.kills;
        emit(n);
      }
      State n = s;
      Process& p = n.p[i];
      const auto next_item = [&] { p.pc = --p.left == 0 ? kDone : bug == kLookBeforePublish ? kLook : kPublish; };
      switch (p.pc) {
        case kPublish:
          ++n.items;
          if (bug == kLookBeforePublish) {
            if (p.bit) p.pc = kAdd;
            else next_item();
          } else {
            p.pc = kLook;
          }
          break;
        case kLook:
          p.bit = n.bit;
          if (bug == kLookBeforePublish) p.pc = kPublish;
          else if (!n.bit) next_item();
          else p.pc = kAdd;
          break;
        case kAdd:
          changed(n);
          p.fresh = 1;
          if (bug == kClearThenWake) n.bit = 0;
          p.pc = kWake;
          break;
        case kWake: {
          bool any = false;
          for (int k = 0; k < kMost; ++k) {
            if (!s.c[k].asleep || s.c[k].dead) continue;
            any = true;
            State w = n;
            w.c[k].asleep = 0;
            w.c[k].pc = kTake;
            if (bug == kClearThenWake) w.p[i].pc = kRestore;
            else if (--w.p[i].left == 0) w.p[i].pc = kDone;
            else w.p[i].pc = bug == kLookBeforePublish ? kLook : kPublish;
            emit(w);
          }
          if (any) continue;
          if (bug == kClearThenWake) next_item();
          else p.pc = kClear;
          break;
        }
        case kClear:
          if (p.fresh || bug == kClearUnconditionally) {
            changed(n);
            n.bit = 0;
          }
          next_item();
          break;
        case kRestore:  // somebody was woken: there may be more
          n.bit = 1;
          next_item();
          break;
      }
      emit(n);
    }
    for (int i = 0; i < consumers; ++i) {
      if (s.c[i].dead) continue;
      if (s.kills < kills) {
        State n = s;
        n.c[i].dead = 1;
        n.c[i].asleep = 0;
        ++n.kills;
        emit(n);
      }
      State n = s;
      Process& c = n.c[i];
      switch (c.pc) {
        case kTake:
          if (n.items == 0) {
            c.pc = bug == kSecondLookFirst ? kAgainEarly : kPrepare;
          } else {
            --n.items;
            c.pc = i == consumers - 1 ? kBusy : kTake;
          }
          break;
        case kAgainEarly: c.pc = n.items != 0 ? kTake : kPrepare; break;
        case kPrepare:
          if (bug != kClearThenWake) changed(n);
          n.bit = 1;
          c.fresh = 1;
          c.pc = bug == kNoSecondLook || bug == kSecondLookFirst ? kSleep : kAgain;
          break;
        case kAgain: c.pc = n.items != 0 ? kTake : kSleep; break;
        case kSleep:  // futex: atomically, if the word is as it was
          if (c.fresh) {
            c.asleep = 1;
            c.pc = kAsleep;
          } else {
            c.pc = kTake;
          }
          break;
        case kAsleep:
          if (!slices) continue;
          c.asleep = 0;
          c.pc = kTake;
          break;
        default: continue;
      }
      emit(n);
    }
  }
  const char* wrong(const State&) const { return nullptr; }
  bool good(const State& s) const {
    for (const auto& p : s.p) {
      if (!p.dead && p.pc != kDone) return false;
    }
    if (s.items == 0) return true;
    for (int i = 0; i < consumers; ++i) {
      if (!s.c[i].dead && s.c[i].pc != kBusy) return false;
    }
    return true;  // nobody is left to take them
  }
};

// --- mutex --------------------------------------------------------------------------------------------------------------

/// Mutex: `rounds` times lock, touch what it protects in two steps (torn in between), repair after kRecovered, unlock.
struct MutexModel {
  enum Bug { kNone, kForgetWaiters, kStoreToRecover, kRecoverOnTimeout, kUnlockThenLook };
  Bug bug = kNone;
  bool slices = true;
  int kills = 2, rounds = 2;

  static constexpr int kN = 3;
  struct Process {
    u8 pc, left, seen, waiters_seen, recovered, dead, asleep;
  };
  struct State {
    u8 owner, waiters, torn, kills;  ///< owner: 0, or 1 + index
    Process p[kN];
  };
  enum : u8 {
    kFast,
    kLoad,
    kMark,
    kSleep,
    kAsleep,
    kCheck,
    kTakeOver,
    kRepair,
    kTear,
    kMend,
    kUnlock,
    kWakeOne,
    kDone
  };

  State first() const {
    State s{};
    for (auto& p : s.p) p.left = static_cast<u8>(rounds);
    return s;
  }
  static bool inside(const Process& p) { return !p.dead && p.pc >= kRepair && p.pc <= kUnlock; }

  template <class Emit>
  void moves(const State& s, Emit&& emit) const {
    for (int i = 0; i < kN; ++i) {
      if (s.p[i].dead || s.p[i].pc == kDone) continue;
      if (s.kills < kills) {
        State n = s;
        n.p[i].dead = 1;
        n.p[i].asleep = 0;
        ++n.kills;
        emit(n);
      }
      State n = s;
      Process& p = n.p[i];
      const u8 me = static_cast<u8>(1 + i);
      const auto finish = [&] { p.pc = --p.left == 0 ? kDone : kFast; };
      switch (p.pc) {
        case kFast:
          if (n.owner == 0 && n.waiters == 0) {
            n.owner = me;
            p.recovered = 0;
            p.pc = kRepair;
          } else {
            p.pc = kLoad;
          }
          break;
        case kLoad:
          p.seen = n.owner;
          p.waiters_seen = n.waiters;
          if (n.owner == 0) {  // compare and exchange: one step, as it fails when the word has changed
            n.owner = me;
            n.waiters = bug == kForgetWaiters ? 0 : 1;
            p.recovered = 0;
            p.pc = kRepair;
          } else {
            p.pc = n.waiters ? kSleep : kMark;
          }
          break;
        case kMark:
          if (n.owner == p.seen && n.waiters == 0) {
            n.waiters = 1;
            p.pc = kSleep;
          } else {
            p.pc = kLoad;
          }
          break;
        case kSleep:
          if (n.owner == p.seen && n.waiters == 1) {
            p.asleep = 1;
            p.pc = kAsleep;
          } else {
            p.pc = kCheck;
          }
          break;
        case kAsleep:
          if (!slices) continue;
          p.asleep = 0;
          p.pc = kCheck;
          break;
        case kCheck: {
          const bool gone = p.seen != 0 && s.p[p.seen - 1].dead;
          p.pc = n.owner == p.seen && n.waiters == 1 && (gone || bug == kRecoverOnTimeout) ? kTakeOver : kLoad;
          break;
        }
        case kTakeOver:
          if ((n.owner == p.seen && n.waiters == 1) || bug == kStoreToRecover) {
            n.owner = me;
            n.waiters = 1;
            p.recovered = 1;
            p.pc = kRepair;
          } else {
            p.pc = kLoad;
          }
          break;
        case kRepair:
          if (p.recovered) n.torn = 0;
          p.pc = kTear;
          break;
        case kTear:
          n.torn = 1;
          p.pc = kMend;
          break;
        case kMend:
          n.torn = 0;
          p.pc = kUnlock;
          break;
        case kUnlock:
          p.waiters_seen = n.waiters;
          if (bug == kUnlockThenLook) {
            n.owner = 0;  // two steps: the bit is looked at, and lost, after the word was given up
            p.waiters_seen = 0;
          } else {
            n.owner = 0;
          }
          n.waiters = 0;
          if (p.waiters_seen) p.pc = kWakeOne;
          else finish();
          break;
        case kWakeOne: {
          bool any = false;
          for (int k = 0; k < kN; ++k) {
            if (!s.p[k].asleep) continue;
            any = true;
            State w = n;
            w.p[k].asleep = 0;
            w.p[k].pc = kCheck;
            w.p[i].pc = --w.p[i].left == 0 ? kDone : kFast;
            emit(w);
          }
          if (any) continue;
          finish();
          break;
        }
      }
      emit(n);
    }
  }
  const char* wrong(const State& s) const {
    int n = 0;
    for (const auto& p : s.p) n += inside(p);
    if (n > 1) return "two are inside";
    for (const auto& p : s.p) {
      if (!p.dead && p.pc == kTear && s.torn) return "entered on what a dead holder left half-done";
    }
    return nullptr;
  }
  bool good(const State& s) const {
    for (const auto& p : s.p) {
      if (!p.dead && p.pc != kDone) return false;
    }
    return true;
  }
};

// --- queue --------------------------------------------------------------------------------------------------------------

/// Publication, growth and retirement, and a JoinableQueue's records. Rings hold two messages and are left for good when
/// full; ring 0 is never freed. The locks are one step each, with recovery once their holder is dead (the mutex has a model
/// of its own). Producers put one or two items; consumers get until none can come. A store is a step.
struct QueueModel {
  enum Bug {
    kNone,
    kTwoStores,
    kFreeBeforeMove,
    kForgetPutRing,
    kNoRepairPut,
    kPublishFirst,
    kRecordAfterTail,
    kNoRepairGet,
    kOwnerAfterMove,
  };
  Bug bug = kNone;
  bool joinable = false;
  int kills = 1;

  static constexpr int kRings = 4, kRoom = 1, kItems = 3, kP = 2, kC = 2;
  static constexpr u8 kFree = 0, kQueue = 100;
  struct Ring {
    u8 owner, head, count, tail, next,
        content[kRoom];  ///< owner: kFree, kQueue, or 1 + process; count: the bug's 2nd word
  };
  struct Process {
    u8 pc, left, item, ring, old, dead, got;
  };
  struct State {
    Ring r[kRings];
    u8 put_ring, get_ring, put_lock, get_lock, kills;
    u8 hand[kItems];  ///< per item: 0, or 1 + consumer that has it in hand, or kQueue: returned (joinable)
    u8 linked[kItems], done[kItems], unused;
    Process p[kP + kC];
  };
  enum : u8 {
    pLock,
    pRepair1,
    pRepair2,
    pWrite,
    pHead,
    pCount,
    pAlloc,
    pFill,
    pLink,
    pOwn,
    pAdopt,
    pUnlock,
    pDone,
    cLock,
    cRepair,
    cLook,
    cPutRing,
    cOwner,
    cMove,
    cRelease,
    cRecord,
    cTail,
    cMark,
    cUnlock,
    cWork,
    cDone,
    cBack,
  };

  State first() const {
    State s{};
    s.r[0].owner = kQueue;
    s.p[0] = {pLock, 2, 1, 0, 0, 0, 0};
    s.p[1] = {pLock, 1, 3, 0, 0, 0, 0};
    for (int i = kP; i < kP + kC; ++i) s.p[i].pc = cLock;
    return s;
  }
  static bool producers_over(const State& s) {
    for (int i = 0; i < kP; ++i) {
      if (!s.p[i].dead && s.p[i].pc != pDone) return false;
    }
    return true;
  }
  bool readable(const State& s, const Ring& r) const {
    return (bug == kTwoStores ? r.count : r.head) > r.tail && (bug != kTwoStores || s.kills < 99);
  }

  template <class Emit>
  void moves(const State& s, Emit&& emit) const {
    for (int i = 0; i < kP + kC; ++i) {
      const Process& was = s.p[i];
      if (was.dead || was.pc == pDone || was.pc == cDone) continue;
      if (s.kills < kills) {
        State n = s;
        n.p[i].dead = 1;
        ++n.kills;
        emit(n);
      }
      State n = s;
      Process& p = n.p[i];
      const u8 me = static_cast<u8>(1 + i);
      const auto take = [&](u8& lock, u8 plain, u8 repair) {
        if (lock == 0) p.pc = plain;
        else if (s.p[lock - 1].dead) p.pc = repair;
        else return false;
        lock = me;
        return true;
      };
      switch (p.pc) {
        case pLock:
          if (!take(n.put_lock, pWrite, bug == kNoRepairPut ? pWrite : pRepair1)) continue;
          break;
        case pRepair1: {  // under both locks
          if (n.get_lock != 0 && !s.p[n.get_lock - 1].dead) continue;
          if (n.get_lock != 0 && joinable) mend_get(n);
          n.get_lock = 0;
          const u8 next = n.r[n.put_ring].next;
          if (next == 0) {
            p.pc = pWrite;
          } else {
            n.r[next].owner = kQueue;
            n.put_ring = next;
          }
          break;
        }
        case pWrite: {
          Ring& r = n.r[n.put_ring];
          if (r.owner == kFree) {
            emit_bad(n, emit);
            continue;
          }
          if (r.head == kRoom) {
            p.pc = pAlloc;
          } else if (bug == kPublishFirst) {
            ++r.head;
            p.pc = pHead;
          } else {
            r.content[r.head] = p.item;
            p.pc = bug == kTwoStores ? pCount : pHead;
          }
          break;
        }
        case pCount:
          ++n.r[n.put_ring].count;
          p.pc = pHead;
          break;
        case pHead:
          if (bug == kPublishFirst) n.r[n.put_ring].content[n.r[n.put_ring].head - 1] = p.item;
          else ++n.r[n.put_ring].head;
          p.pc = pUnlock;
          break;
        case pAlloc: {
          u8 k = 1;
          while (k < kRings && n.r[k].owner != kFree) ++k;
          if (k == kRings) continue;  // full: no more in this model than items
          n.r[k] = {me, 0, 0, 0, 0, {}};
          p.ring = k;
          p.pc = pFill;
          break;
        }
        case pFill:
          n.r[p.ring].content[0] = p.item;
          n.r[p.ring].head = n.r[p.ring].count = 1;
          p.pc = pLink;
          break;
        case pLink:
          n.r[n.put_ring].next = p.ring;
          p.pc = pOwn;
          break;
        case pOwn:
          n.r[p.ring].owner = kQueue;
          p.pc = pAdopt;
          break;
        case pAdopt:
          n.put_ring = p.ring;
          p.pc = pUnlock;
          break;
        case pUnlock:
          n.put_lock = 0;
          ++p.item;
          p.pc = --p.left == 0 ? pDone : pLock;
          break;

        case cLock:
          if (!take(n.get_lock, cLook, cRepair)) continue;
          break;
        case cRepair:
          if (joinable && bug != kNoRepairGet) mend_get(n);
          p.pc = cLook;
          break;
        case cLook: {
          if (joinable) {
            bool again = false;
            for (int k = 0; k < kItems && !again; ++k) {
              const u8 h = n.hand[k];
              if (h == 0 || h == me || h == kQueue || !s.p[h - 1].dead) continue;
              n.hand[k] = kQueue;  // its consumer died: to be delivered again
              again = true;
            }
            if (again) break;
            for (int k = 0; k < kItems && !again; ++k) {
              if (n.hand[k] != kQueue) continue;
              n.hand[k] = me;
              p.got = static_cast<u8>(k + 1);
              p.pc = cUnlock;
              again = true;
            }
            if (again) break;
          }
          Ring& r = n.r[n.get_ring];
          if (r.owner == kFree) {
            emit_bad(n, emit);
            continue;
          }
          if (readable(n, r)) {
            p.item = r.content[r.tail];
            p.pc = joinable && bug != kRecordAfterTail ? cRecord : cTail;
          } else if (r.next != 0 && r.head == kRoom && r.tail == kRoom) {
            p.ring = r.next;
            p.old = n.get_ring;
            p.pc = bug == kForgetPutRing ? cOwner : cPutRing;
          } else {
            p.got = 0;
            p.pc = cUnlock;
          }
          break;
        }
        case cPutRing:
          if (n.put_ring == p.old) n.put_ring = p.ring;
          p.pc = bug == kFreeBeforeMove ? cRelease : bug == kOwnerAfterMove ? cMove : cOwner;
          break;
        case cOwner:
          if (p.old != 0) n.r[p.old].owner = me;
          p.pc = bug == kOwnerAfterMove ? cRelease : cMove;
          break;
        case cMove:
          n.get_ring = p.ring;
          p.pc = bug == kFreeBeforeMove ? cLook : bug == kOwnerAfterMove ? cOwner : cRelease;
          break;
        case cRelease:
          if (p.old != 0) n.r[p.old] = {kFree, 0, 0, 0, 0, {}};
          p.pc = bug == kFreeBeforeMove ? cMove : cLook;
          break;
        case cRecord:
          if (p.item == 0) {
            emit_bad(n, emit);
            continue;
          }
          n.linked[p.item - 1] = me;
          n.hand[p.item - 1] = me;
          p.pc = cTail;
          break;
        case cTail:
          ++n.r[n.get_ring].tail;
          p.got = p.item;
          if (bug == kRecordAfterTail && joinable) {
            p.pc = cMark;
          } else {
            if (!joinable) p.pc = cMark;
            else p.pc = cUnlock;
          }
          if (joinable && bug != kRecordAfterTail) n.linked[p.item - 1] = kQueue;
          break;
        case cMark:
          if (p.item == 0) {
            emit_bad(n, emit);
            continue;
          }
          if (joinable) n.hand[p.item - 1] = me;
          p.pc = cUnlock;
          break;
        case cUnlock:
          n.get_lock = 0;
          if (p.got != 0) p.pc = cWork;
          else p.pc = producers_over(s) && nothing_left(n, me) ? cDone : cLock;
          break;
        case cWork:  // and task_done()
          if (!joinable && n.done[p.got - 1]) {
            emit_bad(n, emit);
            continue;
          }
          if (joinable && (n.done[p.got - 1] || n.hand[p.got - 1] != me)) {
            emit_bad(n, emit);
            continue;
          }
          n.done[p.got - 1] = 1;
          n.hand[p.got - 1] = 0;
          p.got = 0;
          p.pc = cLock;
          break;
      }
      emit(n);
    }
    if (bug == kNone || bug == kOwnerAfterMove) collect(s, emit);
  }

  /// repair_get(): a record whose item the ring still has was never taken.
  static void mend_get(State& n) {
    for (int k = 0; k < kItems; ++k) {
      if (n.linked[k] != 0 && n.linked[k] != kQueue) {
        n.linked[k] = 0;
        n.hand[k] = 0;
      }
    }
  }
  static bool reachable(const State& s, int ring) {
    for (u8 r = s.get_ring;; r = s.r[r].next) {
      if (r == ring) return true;
      if (s.r[r].next == 0) return false;
    }
  }
  /// collect(), in one step where both locks are free or the dead's: what a dead process owns is the queue's or free.
  template <class Emit>
  void collect(const State& s, Emit&& emit) const {
    for (int k = 1; k < kRings; ++k) {
      const u8 o = s.r[k].owner;
      if (o == kFree || o == kQueue || !s.p[o - 1].dead) continue;
      if ((s.put_lock != 0 && !s.p[s.put_lock - 1].dead) || (s.get_lock != 0 && !s.p[s.get_lock - 1].dead)) continue;
      State n = s;
      while (n.r[n.put_ring].next != 0) n.put_ring = n.r[n.put_ring].next;
      if (joinable && n.get_lock != 0) mend_get(n);
      n.put_lock = n.get_lock = 0;
      if (reachable(n, k)) n.r[k].owner = kQueue;
      else n.r[k] = {kFree, 0, 0, 0, 0, {}};
      emit(n);
    }
  }
  bool nothing_left(const State& s, u8 me) const {
    for (u8 r = s.get_ring;; r = s.r[r].next) {
      if (readable(s, s.r[r])) return false;
      if (s.r[r].next == 0) break;
    }
    for (const u8 h : s.hand) {
      if (joinable && h != 0 && h != me) return false;  // it may come back
    }
    return true;
  }
  template <class Emit>
  static void emit_bad(State n, Emit&& emit) {
    n.unused = 1;
    emit(n);
  }
  const char* wrong(const State& s) const {
    if (s.unused) return "a freed ring is used, or an item is taken that was not, or twice";
    for (const Ring& r : s.r) {
      for (int k = r.tail; k < r.head; ++k) {
        if (r.owner != kFree && r.content[k] == 0) return "bytes are published before they are written";
      }
      if (bug == kTwoStores && r.count != r.head) {
        if (s.put_lock == 0 && s.get_lock == 0) return "head and count disagree, and nobody is at work";
      }
    }
    return nullptr;
  }
  bool good(const State& s) const {
    bool consumer = false;
    for (int i = 0; i < kP + kC; ++i) {
      if (!s.p[i].dead && s.p[i].pc != pDone && s.p[i].pc != cDone) return false;
      consumer = consumer || (i >= kP && !s.p[i].dead);
    }
    if (!consumer) return true;
    // Every item of a producer that lived is done, if no consumer was killed with it in hand; joinable: in any case.
    for (int k = 0; k < kItems; ++k) {
      const int producer = k < 2 ? 0 : 1;
      if (!s.p[producer].dead && !s.done[k] && (joinable || s.kills == 0)) return false;
    }
    for (int k = 1; k < kRings; ++k) {
      if (s.r[k].owner != kFree && !(s.r[k].owner == kQueue && reachable(s, k))) return false;  // leaked
    }
    return true;
  }
};

}  // namespace

int main(int argc, char** argv) {
  const bool full = argc > 1 && std::strcmp(argv[1], "full") == 0;
  using S = SleepWake;
  check("sleep/wake, 2 producers, 2 consumers (1 busy for ever), no slices", S{S::kNone, false, 0, 2, 2}, true);
  check("sleep/wake, 2 producers, 3 consumers (1 busy for ever), no slices", S{S::kNone, false, 0, 3, full ? 3 : 2},
        true);
  check("sleep/wake, with slices, killed anywhere", S{S::kNone, true, full ? 2 : 1, 3, 2}, true);
  check("sleep/wake, bug: a kill and no slices", S{S::kNone, false, 1, 2, 2}, false);
  check("sleep/wake, bug: clear the flag, wake, restore it", S{S::kClearThenWake, false, 0, 3, 2}, false);
  check("sleep/wake, bug: no second look", S{S::kNoSecondLook, false, 0, 2, 2}, false);
  check("sleep/wake, bug: second look before the flag", S{S::kSecondLookFirst, false, 0, 2, 2}, false);
  check("sleep/wake, bug: no barrier between publication and look", S{S::kLookBeforePublish, false, 0, 2, 2}, false);
  check("sleep/wake, bug: flag cleared though somebody came", S{S::kClearUnconditionally, false, 0, 2, 2}, false);

  using M = MutexModel;
  check("mutex, 3 processes, no kill, no slices", M{M::kNone, false, 0, 2}, true);
  check("mutex, 3 processes, 2 killed anywhere", M{M::kNone, true, 2, full ? 3 : 2}, true);
  check("mutex, bug: waiters' bit forgotten", M{M::kForgetWaiters, false, 0, 2}, false);
  check("mutex, bug: unlocked without a look at the waiters", M{M::kUnlockThenLook, false, 0, 2}, false);
  check("mutex, bug: taken over by a store", M{M::kStoreToRecover, true, 1, 2}, false);
  check("mutex, bug: taken over from one that is only slow", M{M::kRecoverOnTimeout, true, 0, 2}, false);

  using Q = QueueModel;
  check("queue, no kill", Q{Q::kNone, false, 0}, true);
  check("queue, 1 killed anywhere", Q{Q::kNone, false, 1}, true);
  if (full) check("queue, 2 killed anywhere", Q{Q::kNone, false, 2}, true);
  check("JoinableQueue, 1 killed anywhere", Q{Q::kNone, true, 1}, true);
  if (full) check("JoinableQueue, 2 killed anywhere", Q{Q::kNone, true, 2}, true);
  check("queue, bug: two stores for one publication", Q{Q::kTwoStores, false, 1}, false);
  check("queue, bug: published before it is written", Q{Q::kPublishFirst, false, 0}, false);
  check("queue, bug: ring freed before it is left", Q{Q::kFreeBeforeMove, false, 1}, false);
  check("queue, bug: ring left before it has an owner to free it", Q{Q::kOwnerAfterMove, false, 1}, false);
  check("queue, bug: producers left on a ring that is freed", Q{Q::kForgetPutRing, false, 1}, false);
  check("queue, bug: producer's death not repaired", Q{Q::kNoRepairPut, false, 1}, false);
  check("JoinableQueue, bug: recorded after it was taken", Q{Q::kRecordAfterTail, true, 1}, false);
  check("JoinableQueue, bug: consumer's death not repaired", Q{Q::kNoRepairGet, true, 1}, false);
  return failed != 0;
}
