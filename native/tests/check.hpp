// CHECK, TEST and a main(): what the C++ tests need of a framework, and no more.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
inline int& failures() {
  static int n = 0;
  return n;
}
/// What is printed beside a failure: which kill, which size.
inline std::string& context() {
  static std::string text;
  return text;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline bool report(bool ok, const char* what, const char* file, int line, const std::string& more = {}) {
  if (ok) return true;
  constexpr int kShown = 20;  // a broken invariant tends to fail everywhere
  const char* slash = std::strrchr(file, '/');
  if (failures()++ < kShown) {
    std::fprintf(stderr, "     %s:%d: %s%s%s%s%s\n", slash != nullptr ? slash + 1 : file, line, what,
                 more.empty() ? "" : ": ", more.c_str(), context().empty() ? "" : " | ", context().c_str());
  }
  return false;
}

template <class A, class B>
bool equal(const A& a, const B& b, const char* what, const char* file, int line) {
  if (a == static_cast<A>(b)) return true;
  return report(false, what, file, line,
                std::to_string(static_cast<long long>(a)) + " and " + std::to_string(static_cast<long long>(b)));
}

/// One line a test; arguments choose tests by a part of their names. A test that hangs is ended, and is a failure.
inline int run_all(int argc, char** argv, unsigned seconds = 60) {
  int passed = 0, failed = 0;
  for (const Test& t : tests()) {
    bool chosen = argc < 2;
    for (int i = 1; i < argc; ++i) chosen = chosen || std::strstr(t.name, argv[i]) != nullptr;
    if (!chosen) continue;
    std::fprintf(stderr, "     running %s\r", t.name);
    alarm(seconds);
    const int before = failures();
    t.run();
    alarm(0);
    const bool ok = failures() == before;
    (ok ? passed : failed) += 1;
    std::printf("%s %s\n", ok ? "ok  " : "FAIL", t.name);
    std::fflush(stdout);
  }
  return failed != 0 || passed == 0;
}

}  // namespace check

#define CHECK(...) ::check::report(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define CHECK_EQ(a, b) ::check::equal((a), (b), #a " == " #b, __FILE__, __LINE__)
#define CHECK_JOIN2(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN2(a, b)
// Numbered, not by line: several files may be compiled as one.
#define TEST(name) CHECK_TEST(name, __COUNTER__)
#define CHECK_TEST(name, n)                                                            \
  static void CHECK_JOIN(test_, n)();                                                  \
  static const ::check::Register CHECK_JOIN(register_, n)(name, CHECK_JOIN(test_, n)); \
  static void CHECK_JOIN(test_, n)()
