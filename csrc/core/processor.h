// Which builds the processor can run, found out in code that every processor of the architecture runs.
#pragma once

namespace fc {

// The builds of the kernels that this processor can run, best first, by the names that FLASHCORESET_ISA
// takes; ends with nullptr.
inline const char* const* supported_isas() {
#if defined(__x86_64__)
  static const char* const names[] = {"x86-64-v4", "x86-64-v3", "x86-64-v2", nullptr};
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("popcnt") ||
      !__builtin_cpu_supports("ssse3")) {
    return names + 3;
  }
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi") ||
      !__builtin_cpu_supports("bmi2")) {
    return names + 2;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl")) {
    return names + 1;
  }
  return names;
#elif defined(__aarch64__)
  static const char* const names[] = {"aarch64", nullptr};
  return names;
#else
  static const char* const names[] = {"generic", nullptr};
  return names;
#endif
}

}  // namespace fc
