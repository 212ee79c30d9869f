// Fuzzes random projections: for any shapes, layouts, seeds and offsets, the sketch equals the product with
// the matrix itself, of whole rows or of long rows given by their parts.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "cpu/sketch.h"
#include "input.h"

namespace {

// Whether `got` is x times the column within rounding; `size` is |x| times its magnitude.
template <class T>
bool close(double got, double expected, double size) {
  const double slack = (sizeof(T) == 4 ? 1e-5 : 1e-13) * size;
  return std::fabs(got - expected) <= slack;
}

template <class T>
void run(fuzz::Input& in) {
  const int64_t batch = in.below(6), dim = 1 + in.below(in.coin() ? 40 : 600),
                columns = 1 + in.below(in.coin() ? 9 : 300);
  const bool any = in.coin(), rows_of_parts = in.coin();
  fc::Projection projection;
  projection.kind = static_cast<fc::SketchKind>(in.below(rows_of_parts ? 3 : 4));
  projection.seed = static_cast<uint64_t>(in.below(1 << 15)) << in.below(50);
  if (projection.kind != fc::SketchKind::kSrht && in.coin())
    projection.offset = in.below(1 << 15) << in.below(47);
  if (projection.kind == fc::SketchKind::kSjlt) projection.nnz = 1 + in.below(std::min<int64_t>(dim, 5));
  fc::ThreadTeam team(static_cast<int>(1 + in.below(3)));
  std::vector<T> matrix(columns * dim), got(batch * dim);
  fc::projection_matrix<T>(projection, fc::TensorView<T, 2>::compact(matrix.data(), columns, dim), team);
  const auto out = fc::TensorView<T, 2>::compact(got.data(), batch, dim);
  std::vector<T> dense(batch * columns);
  if (rows_of_parts) {
    // Parts of `width` columns: as many as fit, some of them twice.
    const int64_t width = 1 + in.below(columns), parts = columns / width, count = in.below(6);
    std::vector<int64_t> numbers(batch * count);
    for (int64_t& number : numbers) number = parts > 0 ? in.below(parts) : 0;
    const std::vector<T> g = in.numbers<T>(batch * count * width, any);
    fc::sketch_rows<T>(fc::TensorView<const int64_t, 2>::compact(numbers.data(), batch, count),
                       fc::TensorView<const T, 3>::compact(g.data(), batch, count, width), projection, out,
                       team);
    if (parts == 0) return;
    for (int64_t i = 0; i < batch * count; ++i) {
      for (int64_t w = 0; w < width; ++w) {
        dense[i / std::max<int64_t>(count, 1) * columns + numbers[i] * width + w] += g[i * width + w];
      }
    }
  } else {
    const fuzz::Array<T> x(in, batch, columns, any, false);
    fc::sketch<T>(x.view, projection, out, team);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t j = 0; j < columns; ++j) dense[b * columns + j] = x.view(b, j);
    }
  }
  if (any) return;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t q = 0; q < dim; ++q) {
      double expected = 0, size = 1e-300;
      for (int64_t j = 0; j < columns; ++j) {
        const double term = static_cast<double>(dense[b * columns + j]) * matrix[j * dim + q];
        expected += term;
        size += 8 * std::fabs(static_cast<double>(matrix[j * dim + q]));  // numbers are below 8
      }
      // srht adds all columns of a block before it takes some of the sums.
      if (projection.kind == fc::SketchKind::kSrht) size += 8 * static_cast<double>(columns);
      if (!close<T>(got[b * dim + q], expected, size)) std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
