// The 16-bit floating types as they lie in memory; kernels widen them to float (simd.h) and compute in that.
#pragma once

#include <cstdint>

namespace fc {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

}  // namespace fc
