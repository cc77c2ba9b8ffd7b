// A small explicit-state model checker: all interleavings of all processes, and a SIGKILL at each step.
//
// A model is a type with a trivially copyable State without padding surprises (value-initialised, so that equal states are
// equal bytes), and
//   void moves(const State&, Emit&&)    every state one step away; emit(next) or emit.bad("why")
//   const char* wrong(const State&)     an invariant that does not hold, or nullptr
//   bool good(const State&)             everything is as it should be in the end
// Checked: no state is wrong, and from every state a good one can be reached (so nothing is stuck, nor ever will be).
// Memory is sequentially consistent here; what the orders must do is in docs/crash-safety.md and under ThreadSanitizer.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <string>
#include <unordered_map>
#include <vector>

namespace model {

struct Result {
  size_t states = 0;
  std::string error;  ///< empty: the model holds
  double seconds = 0;
};

template <class M>
Result explore(const M& m, typename M::State first, size_t most = 6'000'000) {
  using State = typename M::State;
  struct Hash {
    size_t operator()(const State& s) const {
      uint64_t h = 14695981039346656037u;
      const auto* p = reinterpret_cast<const unsigned char*>(&s);
      for (size_t i = 0; i < sizeof s; ++i) h = (h ^ p[i]) * 1099511628211u;
      return h;
    }
  };
  struct Same {
    bool operator()(const State& a, const State& b) const { return std::memcmp(&a, &b, sizeof a) == 0; }
  };
  const std::clock_t start = std::clock();
  std::unordered_map<State, uint32_t, Hash, Same> seen;
  std::vector<State> all;
  std::vector<std::pair<uint32_t, uint32_t>> edges;
  Result r;
  const auto visit = [&](const State& s) {
    const auto [it, fresh] = seen.try_emplace(s, static_cast<uint32_t>(all.size()));
    if (fresh) all.push_back(s);
    return it->second;
  };
  visit(first);
  for (uint32_t i = 0; i < all.size() && r.error.empty(); ++i) {
    const State s = all[i];
    if (const char* why = m.wrong(s)) r.error = why;
    m.moves(s, [&](const State& next) { edges.emplace_back(visit(next), i); });
    if (all.size() > most) r.error = "too many states";
  }
  r.states = all.size();
  if (r.error.empty()) {
    // Backwards from the good states.
    std::vector<uint32_t> begin(all.size() + 1), from(edges.size());
    for (const auto& e : edges) ++begin[e.first + 1];
    for (size_t i = 0; i < all.size(); ++i) begin[i + 1] += begin[i];
    std::vector<uint32_t> at(begin.begin(), begin.end() - 1);
    for (const auto& e : edges) from[at[e.first]++] = e.second;
    std::vector<bool> fine(all.size());
    std::vector<uint32_t> todo;
    for (uint32_t i = 0; i < all.size(); ++i) {
      if (m.good(all[i])) {
        fine[i] = true;
        todo.push_back(i);
      }
    }
    while (!todo.empty()) {
      const uint32_t i = todo.back();
      todo.pop_back();
      for (uint32_t k = begin[i]; k < begin[i + 1]; ++k) {
        if (!fine[from[k]]) {
          fine[from[k]] = true;
          todo.push_back(from[k]);
        }
      }
    }
    for (uint32_t i = 0; i < all.size() && r.error.empty(); ++i) {
      if (!fine[i]) r.error = "stuck: somebody waits for ever";
    }
  }
  r.seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  return r;
}

}  // namespace model
