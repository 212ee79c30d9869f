// The entry of every test program, compiled for the plainest processor: a program for another instruction set
// must find out that it cannot run before its first instruction of that set. Exit status 77 tells ctest that
// it was skipped.
#include <cstdio>
#include <cstring>

extern const char* const fc_tests_isa;
int run_tests(bool thorough);

static bool processor_has(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "x86_64_v4") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "x86_64_v3") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (std::strcmp(isa, "x86_64_v2") == 0)
    return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
#endif
  (void)isa;
  return true;
}

int main(int argc, char** argv) {
  if (!processor_has(fc_tests_isa)) {
    std::printf("this processor has no %s\n", fc_tests_isa);
    return 77;
  }
  return run_tests(argc > 1 && std::strcmp(argv[1], "all") == 0);
}
