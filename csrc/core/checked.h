// Sums and products of sizes that come from outside. A result that does not fit in 64 bits is more than any
// memory holds: it is refused as such, instead of becoming a small number that a buffer is made of.
#pragma once

#include <cstdint>
#include <new>

namespace fc {

// More elements than any array has, with room for the sums and products by constants that kernels form: no
// address space holds as many. Sizes of arrays and counts of things are below it from the boundary on.
inline constexpr int64_t kMostElements = int64_t{1} << 48;

// Raised in Python as MemoryError.
class TooLarge : public std::bad_alloc {
 public:
  const char* what() const noexcept override {
    return "a working array would have more elements than fit in 64 bits";
  }
};

inline int64_t checked_add(int64_t a, int64_t b) {
  int64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) throw TooLarge();
  return sum;
}

inline int64_t checked_mul(int64_t a, int64_t b) {
  int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) throw TooLarge();
  return product;
}

template <class... More>
int64_t checked_mul(int64_t a, int64_t b, More... more) {
  return checked_mul(checked_mul(a, b), more...);
}

// The product of sizes >= 0, or INT64_MAX if the product is more. For comparing with a budget.
inline int64_t saturated_mul(int64_t a, int64_t b) {
  int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? INT64_MAX : product;
}

// ceil(count / part) of count >= 0 and part > 0, without the sum that may not fit.
constexpr int64_t ceil_div(int64_t count, int64_t part) { return count / part + (count % part != 0); }

}  // namespace fc
