// The parameters of a random projection; python/flashcoreset/sketch/reference.py defines the matrices.
#pragma once

#include <cstdint>

namespace fc {

// The numbers are the last word of the generator's counter (4 and 5 are other streams of the library).
enum class SketchKind : uint32_t {
  kRademacher = 0,
  kGaussianBoxMuller = 1,
  kSjlt = 2,
  kSrht = 3,
  kGaussian = 6
};

struct Projection {
  SketchKind kind = SketchKind::kRademacher;
  uint64_t seed = 0;
  int64_t offset = 0;  // the projection's row that belongs to the first column of the input
  int64_t nnz = 1;     // sjlt: entries per row, at most dim
};

}  // namespace fc
