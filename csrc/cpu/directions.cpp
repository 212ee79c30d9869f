// Element j of direction p is a standard normal number of the Philox block (j / 4 low, j / 4 high, p, 4)
// under the key `seed`: words 0 and 1 of the block make its elements 0 and 1, words 2 and 3 the other two.
//
// Cost: ten rounds and two pairs of normal numbers for four elements, about 2 ns per element with AVX-512;
// nothing is read.
#include "cpu/directions.h"

#include <algorithm>

#include "core/normal_simd.h"

namespace fc {

namespace {

constexpr uint32_t kStream = 4;  // the number after those of the kinds of sketches
constexpr int64_t kChunk = int64_t{1} << 14;

// value[k][r] = number k of the block of row[r].
inline void block_normals(uint64_t seed, uint32_t p, simd::Words row, float (&value)[4][simd::kPhiloxRows]) {
  simd::Words c[4];
  simd::philox_rows(seed, row, p, kStream, c);
  simd::normal_pairs(c[0], c[1], value[0], value[1]);
  simd::normal_pairs(c[2], c[3], value[2], value[3]);
}

}  // namespace

void direction_part(uint64_t seed, uint32_t p, int64_t begin, int64_t count, float* out) {
  alignas(64) float value[4][simd::kPhiloxRows];
  constexpr int64_t kStep = 4 * simd::kPhiloxRows;
  const int64_t end = begin + count;
  for (int64_t j = begin / 4 * 4; j < end; j += kStep) {
    simd::Words row;
    for (int r = 0; r < simd::kPhiloxRows; ++r) row[r] = static_cast<uint64_t>(j / 4 + r);
    block_normals(seed, p, row, value);
    if (j >= begin && j + kStep <= end) {
      for (int r = 0; r < simd::kPhiloxRows; ++r) {
        for (int k = 0; k < 4; ++k) out[j - begin + 4 * r + k] = value[k][r];
      }
    } else {
      for (int64_t i = std::max(j, begin); i < std::min(j + kStep, end); ++i)
        out[i - begin] = value[(i - j) % 4][(i - j) / 4];
    }
  }
}

void direction_elements(uint64_t seed, uint32_t p, const int64_t* j, int64_t count, float* out) {
  alignas(64) float value[4][simd::kPhiloxRows];
  for (int64_t i = 0; i < count; i += simd::kPhiloxRows) {
    const int64_t here = std::min<int64_t>(simd::kPhiloxRows, count - i);
    simd::Words row{};
    for (int64_t r = 0; r < here; ++r) row[r] = static_cast<uint64_t>(j[i + r] / 4);
    block_normals(seed, p, row, value);
    for (int64_t r = 0; r < here; ++r) out[i + r] = value[j[i + r] % 4][r];
  }
}

template <class T>
void directions(uint64_t seed, int64_t begin, uint32_t first, TensorView<T, 2> out, ThreadTeam& team) {
  const int64_t width = out.cols(), chunks = (width + kChunk - 1) / kChunk;
  team.parallel_for(out.rows() * chunks, 1, [&](int, int64_t number, int64_t) {
    const int64_t row = number / chunks, from = number % chunks * kChunk;
    const int64_t count = std::min(kChunk, width - from);
    alignas(64) float z[kChunk];
    direction_part(seed, first + static_cast<uint32_t>(row), begin + from, count, z);
    T* const to = out.row(row) + from;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(z[i]);
  });
}

template void directions<float>(uint64_t, int64_t, uint32_t, TensorView<float, 2>, ThreadTeam&);
template void directions<double>(uint64_t, int64_t, uint32_t, TensorView<double, 2>, ThreadTeam&);

}  // namespace fc
