// The whole test framework: CHECK counts, remembers where it failed, and the program returns the verdict.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

#ifndef FC_ISA_NAME
#define FC_ISA_NAME "generic"
#endif

// main.cpp runs run_tests() only on a processor that has the instruction set this program's kernels were
// compiled for.
extern const char* const fc_tests_isa;
int run_tests(bool thorough);

#define TEST_PROGRAM                                   \
  extern const char* const fc_tests_isa = FC_ISA_NAME; \
  int run_tests([[maybe_unused]] bool thorough)

namespace check {

struct Tally {
  long passed = 0, failed = 0;
};

inline Tally& tally() {
  static Tally counts;
  return counts;
}

inline void record(bool ok, const char* file, int line, const std::string& what) {
  if (ok) {
    ++tally().passed;
    return;
  }
  if (++tally().failed <= 20) std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what.c_str());
}

template <class A, class B>
void record_equal(const A& a, const B& b, const char* file, int line, const char* what) {
  if (a == b) {
    ++tally().passed;
    return;
  }
  std::ostringstream text;
  text.precision(17);
  text << what << ": " << a << " is not " << b;
  record(false, file, line, text.str());
}

// The exit status of a test program; a program that checked nothing has failed.
inline int verdict(const char* name) {
  std::printf("%s (%s): %ld passed, %ld failed\n", name, FC_ISA_NAME, tally().passed, tally().failed);
  return tally().failed == 0 && tally().passed > 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) check::record((condition), __FILE__, __LINE__, #condition)
#define CHECK_EQUAL(a, b) check::record_equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define CHECK_THROWS(expression, Exception)                                       \
  do {                                                                            \
    bool thrown = false;                                                          \
    try {                                                                         \
      expression;                                                                 \
    } catch (const Exception&) {                                                  \
      thrown = true;                                                              \
    }                                                                             \
    check::record(thrown, __FILE__, __LINE__, #expression " throws " #Exception); \
  } while (false)
