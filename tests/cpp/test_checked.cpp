// Sums and products of sizes: right if they fit in 64 bits, refused if they do not.
#include <cstdint>
#include <new>

#include "check.h"
#include "core/checked.h"

namespace {

constexpr int64_t kMost = INT64_MAX, kLeast = INT64_MIN;
constexpr int64_t kValues[] = {kLeast,
                               kLeast + 1,
                               -(int64_t{1} << 32),
                               -3,
                               -1,
                               0,
                               1,
                               2,
                               3,
                               7,
                               int64_t{1} << 31,
                               (int64_t{1} << 32) + 1,
                               int64_t{1} << 62,
                               kMost - 1,
                               kMost};

bool fits(__int128 value) { return value >= kLeast && value <= kMost; }

void test_sums_and_products() {
  for (const int64_t a : kValues) {
    for (const int64_t b : kValues) {
      const __int128 sum = static_cast<__int128>(a) + b, product = static_cast<__int128>(a) * b;
      if (fits(sum)) {
        CHECK(fc::checked_add(a, b) == sum);
      } else {
        CHECK_THROWS(fc::checked_add(a, b), std::bad_alloc);
      }
      if (fits(product)) {
        CHECK(fc::checked_mul(a, b) == product);
      } else {
        CHECK_THROWS(fc::checked_mul(a, b), fc::TooLarge);
      }
      if (a < 0 || b < 0) continue;
      CHECK_EQUAL(fc::saturated_mul(a, b), fits(product) ? static_cast<int64_t>(product) : kMost);
      if (b > 0) CHECK(fc::ceil_div(a, b) == (static_cast<__int128>(a) + b - 1) / b);
    }
  }
}

void test_several_factors() {
  CHECK_EQUAL(fc::checked_mul(3, 5, 7), 105);
  CHECK_EQUAL(fc::checked_mul(int64_t{1} << 20, int64_t{1} << 21, int64_t{1} << 21), int64_t{1} << 62);
  // The last factor would bring the product back to 0, were the product not checked before.
  CHECK_THROWS(fc::checked_mul(int64_t{1} << 32, int64_t{1} << 32, 0), fc::TooLarge);
}

}  // namespace

TEST_PROGRAM {
  test_sums_and_products();
  test_several_factors();
  return check::verdict("checked");
}
