// Whether a computation is the same under every schedule. A kernel that lacks a barrier, races with another
// block or reads uninitialised memory is not.
#pragma once

#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "emulator/emulator.h"

#if defined(__has_feature)
#define FC_ADDRESS_SANITIZER __has_feature(address_sanitizer)  // Clang's way to say it
#elif defined(__SANITIZE_ADDRESS__)
#define FC_ADDRESS_SANITIZER 1
#else
#define FC_ADDRESS_SANITIZER 0
#endif

namespace fc::emulator {

#if FC_ADDRESS_SANITIZER
// What a kernel reads and writes hardly depends on the order, and each one takes minutes.
constexpr const char* kSchedules[] = {"forward", "random:1"};
#else
constexpr const char* kSchedules[] = {"forward", "reverse", "random:1", "random:2", "random:3"};
#endif

// Takes a schedule for as long as it lives.
class UnderSchedule {
 public:
  explicit UnderSchedule(const std::string& name) : before_(schedule()) { set_schedule(name); }
  ~UnderSchedule() { set_schedule(before_); }
  UnderSchedule(const UnderSchedule&) = delete;
  UnderSchedule& operator=(const UnderSchedule&) = delete;

 private:
  std::string before_;
};

template <class T>
struct Compared {
  T result;                // under the first schedule
  std::string difference;  // empty if all are the same, bit for bit
};

// Calls compute(), which returns a vector, under every schedule.
template <class Compute>
auto compare_schedules(Compute compute) {
  Compared<decltype(compute())> all;
  using T = typename decltype(all.result)::value_type;
  static_assert(std::is_trivially_copyable_v<T>, "results are compared as bytes");
  for (const char* name : kSchedules) {
    const UnderSchedule under(name);
    auto result = compute();
    if (name == kSchedules[0]) {
      all.result = std::move(result);
      continue;
    }
    if (!all.difference.empty()) continue;
    const std::string differs = std::string(name) + " differs from " + kSchedules[0];
    if (result.size() != all.result.size()) {
      all.difference = differs + " in the number of its results";
      continue;
    }
    for (size_t i = 0; i < result.size(); ++i)
      if (std::memcmp(&result[i], &all.result[i], sizeof(T)) != 0) {
        all.difference = differs + ", first in element " + std::to_string(i);
        break;
      }
  }
  return all;
}

// The same as a check of the test that calls it; returns the result for comparison with the oracle.
template <class Compute>
auto check_schedules(Compute compute, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  auto all = compare_schedules(std::move(compute));
  check::record(all.difference.empty(), file, line, "the same under every schedule: " + all.difference);
  return std::move(all.result);
}

}  // namespace fc::emulator
