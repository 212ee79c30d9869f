// All similarities or distances between two sets of points: n * m * d multiply-adds (half of it when both
// sets are the same), 4 * (n + m) * d bytes read, 4 * n * m written. The columns are packed once, the rows
// block by block.
#include "cpu/pairwise.h"

#include "cpu/pack.h"
#include "cpu/pairwise_panels.h"

namespace fc {

template <class T>
void pairwise(TensorView<const T, 2> x, TensorView<const T, 2> y, Metric metric, bool symmetric,
              TensorView<T, 2> out, ThreadTeam& team) {
  const bool normalise = metric == Metric::kCosine;
  const Panels<T> columns = Panels<T>::pack(y, normalise, symmetric ? "x" : "y", team);
  Rows<T> rows;
  Buffer<RowScale> scales;
  if (symmetric) {
    rows.panels = &columns;
  } else {
    rows.view = x;
    scales = Buffer<RowScale>(normalise ? x.shape[0] : 0);
    team.parallel_for(x.shape[0], 64, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Panels<T>::check_row(x, i, "x");
        if (normalise) scales[i] = RowScale::of(x, i);
      }
    });
    if (normalise) rows.scale = scales.data();
  }
  pairwise_panels<T>(rows, x.shape[0], columns, metric, false, symmetric, out.data, out.stride[0], team);
}

template void pairwise<float>(TensorView<const float, 2>, TensorView<const float, 2>, Metric, bool,
                              TensorView<float, 2>, ThreadTeam&);
template void pairwise<double>(TensorView<const double, 2>, TensorView<const double, 2>, Metric, bool,
                               TensorView<double, 2>, ThreadTeam&);

}  // namespace fc
