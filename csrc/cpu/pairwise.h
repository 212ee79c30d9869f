// All similarities or distances between two sets of points.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/metric.h"
#include "cpu/pack.h"

namespace fc {

// Rows of a batch whose packed features fill at most half of a second-level cache, a multiple of both tile sides.
template <class T>
int64_t block_rows(int64_t d) {
  constexpr int64_t kStep = 96;
  static_assert(kStep % Tile<T>::kRows == 0 && kStep % Tile<T>::kCols == 0, "blocks must end on tile borders");
  const int64_t fit = (int64_t{512} << 10) / (static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(d, 1));
  return std::clamp<int64_t>(fit / kStep * kStep, kStep, 2 * kStep);
}

// A buffer of `size` values for each thread.
template <class T>
std::vector<Buffer<T>> per_thread(int threads, int64_t size) {
  std::vector<Buffer<T>> buffers;
  for (int i = 0; i < threads; ++i) buffers.emplace_back(size);
  return buffers;
}

// out [n, columns.rows()], rows `stride` apart: the metric's values (negated if asked) between rows[0..n) and the columns.
// `symmetric`: rows and columns are the same points, so half of the tiles are computed and mirrored.
//
// Cost: n * m * d multiply-adds, half of it if symmetric; n * m values written.
template <class T>
void pairwise_panels(const Rows<T>& rows, int64_t n, const Panels<T>& columns, Metric metric, bool negate, bool symmetric, T* out,
                     int64_t stride, ThreadTeam& team) {
  constexpr int kRows = Tile<T>::kRows, kCols = Tile<T>::kCols;
  const int64_t d = columns.features(), m = columns.rows();
  // Small problems still have to give every thread several blocks.
  const int64_t block = n > 8 * 192 * team.size() ? block_rows<T>(d) : std::min<int64_t>(block_rows<T>(d), 96);
  auto packed = per_thread<T>(team.size(), block * d);
  auto values = per_thread<T>(team.size(), block * kCols);
  with_form(metric, [&](auto form) {
    team.parallel_for((n + block - 1) / block, 1, [&](int thread, int64_t which, int64_t) {
      const int64_t begin = which * block, count = std::min(block, n - begin);
      std::vector<int64_t> index(count);
      for (int64_t i = 0; i < count; ++i) index[i] = begin + i;
      T* a = packed[thread].data();
      T* s = values[thread].data();
      rows.pack_batch(index.data(), count, a);
      for (int64_t p = symmetric ? begin / kCols : 0; p < columns.count(); ++p) {
        const T* b = columns.panel(p);
        for (int64_t q = 0; q * kRows < count; ++q) tile<T, form()>(a + q * kRows * d, b, d, s + q * kRows * kCols);
        finish_values(metric, negate, s, round_up(count, kRows) * kCols);
        const int64_t first = p * kCols, width = std::min<int64_t>(kCols, m - first);
        for (int64_t r = 0; r < count; ++r) std::copy(s + r * kCols, s + r * kCols + width, out + (begin + r) * stride + first);
        if (symmetric && first >= begin + block) {
          for (int64_t c = 0; c < width; ++c) {
            T* mirrored = out + (first + c) * stride + begin;
            for (int64_t r = 0; r < count; ++r) mirrored[r] = s[r * kCols + c];
          }
        }
      }
    });
  });
}

// out [n, m] with unit column stride: the metric's values between the rows of x [n, d] and of y [m, d]; y is x if `symmetric`.
// Throws std::invalid_argument for NaN or infinity in x or y.
template <class T>
void pairwise(TensorView<const T, 2> x, TensorView<const T, 2> y, Metric metric, bool symmetric, TensorView<T, 2> out,
              ThreadTeam& team);

}  // namespace fc
