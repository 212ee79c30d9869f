// The block product under pairwise() and under the stored similarities of facility location.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/metric.h"
#include "core/threads.h"
#include "cpu/pack.h"

namespace fc {

// The height of blocks is a multiple of this, which every tile side divides.
inline constexpr int64_t kStep = 96;
inline constexpr int64_t kMostRows = 2 * kStep;

// Rows of a batch whose packed features fill at most half of a second-level cache, a multiple of both tile
// sides.
template <class T>
int64_t block_rows(int64_t d) {
  static_assert(kStep % Tile<T>::kRows == 0 && kStep % Tile<T>::kCols == 0,
                "blocks must end on tile borders");
  const int64_t fit = (int64_t{512} << 10) / (static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(d, 1));
  return std::clamp<int64_t>(fit / kStep * kStep, kStep, kMostRows);
}

// A buffer of `size` values per thread.
template <class T>
std::vector<Buffer<T>> per_thread(int threads, int64_t size) {
  std::vector<Buffer<T>> buffers;
  for (int i = 0; i < threads; ++i) buffers.emplace_back(size);
  return buffers;
}

// out [n, columns.rows()], rows `stride` apart: the metric's values (negated if asked) between rows[0..n) and
// the columns. `symmetric`: rows and columns are the same points, so half of the tiles are computed and
// mirrored.
//
// Cost: n * m * d multiply-adds, half of it if symmetric; n * m values written. The threads share a packed
// block of rows and split the panels of columns, so that even a hundred points occupy them all.
template <class T>
void pairwise_panels(const Rows<T>& rows, int64_t n, const Panels<T>& columns, Metric metric, bool negate,
                     bool symmetric, T* out, int64_t stride, ThreadTeam& team) {
  constexpr int kRows = Tile<T>::kRows, kCols = Tile<T>::kCols;
  const int64_t d = columns.features(), m = columns.rows();
  const int64_t fit = (int64_t{2} << 20) / (static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(d, 1));
  const int64_t block = std::min(round_up(n, kRows), std::max(fit / kStep * kStep, kStep));
  Buffer<T> packed(block * d);
  std::vector<int64_t> index(n);
  std::iota(index.begin(), index.end(), int64_t{0});
  with_form(metric, [&](auto form) {
    for (int64_t begin = 0; begin < n; begin += block) {
      const int64_t count = std::min(block, n - begin);
      team.parallel_for((count + kRows - 1) / kRows, 16, [&](int, int64_t first, int64_t last) {
        const int64_t end = std::min(count, last * kRows);
        rows.pack_batch(index.data() + begin + first * kRows, end - first * kRows,
                        packed.data() + first * kRows * d);
      });
      const int64_t first_panel = symmetric ? begin / kCols : 0;
      team.parallel_for(columns.count() - first_panel, 1, [&](int, int64_t which, int64_t) {
        // The last panel first: in the symmetric case it has the most rows above it.
        const int64_t p = columns.count() - 1 - which, first = p * kCols,
                      width = std::min<int64_t>(kCols, m - first);
        alignas(64) T s[kRows * kCols];
        // A pair of the symmetric case belongs to the panel of the later of its two points, and to that
        // alone.
        const int64_t rows_here = symmetric ? std::min(count, first + kCols - begin) : count;
        for (int64_t r = 0; r < rows_here; r += kRows) {
          const int64_t here = std::min<int64_t>(kRows, rows_here - r);
          tile_rows<T, form()>(here, packed.data() + r * d, columns.panel(p), d, s);
          finish_values(metric, negate, s, here * kCols);
          for (int64_t i = 0; i < here; ++i)
            std::copy(s + i * kCols, s + i * kCols + width, out + (begin + r + i) * stride + first);
          if (!symmetric) continue;
          for (int64_t c = 0; c < width; ++c) {
            for (int64_t i = 0; i < here; ++i) out[(first + c) * stride + begin + r + i] = s[i * kCols + c];
          }
        }
      });
    }
  });
}

}  // namespace fc
