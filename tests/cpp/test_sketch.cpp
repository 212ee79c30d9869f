// Random projections: the product with the matrix that the same kernels write, for every kind, size and
// layout, and the matrix against the generator if a few lines define it.
#include <cmath>
#include <vector>

#include "check.h"
#include "core/philox.h"
#include "cpu/sketch.h"
#include "samples.h"

namespace {

using fc::Projection;
using fc::SketchKind;
using fc::TensorView;

constexpr SketchKind kKinds[] = {SketchKind::kRademacher, SketchKind::kGaussian, SketchKind::kSjlt,
                                 SketchKind::kSrht, SketchKind::kGaussianBoxMuller};

template <class T>
std::vector<T> matrix_of(const Projection& p, int64_t rows, int64_t dim) {
  std::vector<T> matrix(static_cast<size_t>(rows * dim));
  fc::ThreadTeam team(2);
  fc::projection_matrix<T>(p, TensorView<T, 2>::compact(matrix.data(), rows, dim), team);
  return matrix;
}

template <class T>
void test_product(int64_t batch, int64_t columns, int64_t dim, int64_t nnz, int64_t offset) {
  samples::Random random(static_cast<uint64_t>(columns * 31 + dim));
  std::vector<T> x(static_cast<size_t>(batch * columns));
  for (T& value : x) value = static_cast<T>(random.normal());
  for (const SketchKind kind : kKinds) {
    const Projection p{kind, 0x123456789ABCDEFull, offset, nnz};
    const std::vector<T> matrix = matrix_of<T>(p, columns, dim);
    std::vector<T> one(static_cast<size_t>(batch * dim)), three(one.size());
    for (const int threads : {1, 3}) {
      fc::ThreadTeam team(threads);
      fc::sketch<T>(TensorView<const T, 2>::compact(x.data(), batch, columns), p,
                    TensorView<T, 2>::compact((threads == 1 ? one : three).data(), batch, dim), team);
    }
    CHECK(one == three);
    double worst = 0, largest = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = 0; c < dim; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < columns; ++i)
          sum += static_cast<double>(x[b * columns + i]) * static_cast<double>(matrix[i * dim + c]);
        worst = std::max(worst, std::abs(sum - static_cast<double>(one[b * dim + c])));
        largest = std::max(largest, std::abs(sum));
      }
    }
    CHECK(worst <= (sizeof(T) == 4 ? 1e-5 : 1e-12) * largest);

    // A row alone, and every second column of a wider array, give the same bits.
    std::vector<T> wide(2 * x.size()), alone(static_cast<size_t>(dim)), strided(one.size());
    for (size_t i = 0; i < x.size(); ++i) wide[2 * i] = x[i];
    fc::ThreadTeam team(2);
    fc::sketch<T>(TensorView<const T, 2>::compact(x.data() + (batch - 1) * columns, 1, columns), p,
                  TensorView<T, 2>::compact(alone.data(), 1, dim), team);
    fc::sketch<T>(TensorView<const T, 2>{wide.data(), {batch, columns}, {2 * columns, 2}}, p,
                  TensorView<T, 2>::compact(strided.data(), batch, dim), team);
    CHECK(strided == one);
    CHECK(alone == std::vector<T>(one.end() - dim, one.end()));
  }
}

void test_signs() {
  const Projection p{SketchKind::kRademacher, 77, (int64_t{1} << 33) + 3, 1};
  const std::vector<double> matrix = matrix_of<double>(p, 2, 300);
  for (int64_t i = 0; i < 2; ++i) {
    for (int64_t c = 0; c < 300; ++c) {
      const auto words =
          fc::philox4x32(77, static_cast<uint64_t>(p.offset + i), static_cast<uint64_t>(c / 128));
      const bool negative = words[c % 128 / 32] >> (c % 32) & 1;
      CHECK_EQUAL(matrix[i * 300 + c], (negative ? -1 : 1) / std::sqrt(300.0));
    }
  }
}

// Normal numbers against Box and Muller's formula in double, from the words and columns that the reference
// documents, across a change of the upper half of the rows' numbers.
void test_normal_numbers() {
  constexpr int64_t kDim = 600;
  const Projection p{SketchKind::kGaussian, 0x123456789ABCDEFull, (int64_t{1} << 32) - 2, 1};
  const std::vector<double> matrix = matrix_of<double>(p, 4, kDim);
  const double scale = 1 / std::sqrt(static_cast<double>(kDim));
  double worst = 0;
  for (int64_t i = 0; i < 4; ++i) {
    const auto row = static_cast<uint64_t>(p.offset + i);
    for (int64_t c = 0; c < kDim; ++c) {
      const int64_t j = c % 32 / 8, l = c % 8 / 2;
      const auto words =
          fc::philox4x32<7>({static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                             static_cast<uint32_t>(c / 32 * 4 + l), 6},
                            {static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32)});
      uint32_t a = words[j / 2 * 2], b = words[j / 2 * 2 + 1];
      if (c % 2 == 1) {
        a = a << 16 | a >> 16;
        b = b << 16 | b >> 16;
      }
      const double u = (static_cast<double>(a & 0x7FFFFFFF) + 0.5) * 0x1p-31;
      const double radius = std::sqrt(-2 * std::log(u)) * (a >> 31 ? -1 : 1);
      const double angle = static_cast<int32_t>(b << 1 | 1) * 0x1p-31 * std::atan(1.0);
      const double cosine = radius * std::cos(angle), sine = std::abs(radius) * std::sin(angle);
      const double expected = (b >> 31 != 0) == (j % 2 == 0) ? cosine : sine;
      worst = std::max(worst,
                       std::abs(matrix[i * kDim + c] / scale - expected) / std::max(std::abs(expected), 0.1));
    }
  }
  CHECK(worst <= 6e-6);
}

// Rows that are zero but for some parts, against the same rows in full.
template <class T>
void test_parts() {
  constexpr int64_t kBatch = 3, kCount = 5, kWidth = 19, kParts = 7, kDim = 21;
  samples::Random random(5);
  std::vector<T> g(kBatch * kCount * kWidth), full(kBatch * kParts * kWidth, T(0));
  std::vector<int64_t> indices(kBatch * kCount);
  for (T& value : g) value = static_cast<T>(random.normal());
  for (int64_t& index : indices) index = random.below(kParts);
  for (int64_t b = 0; b < kBatch; ++b) {
    for (int64_t t = 0; t < kCount; ++t) {
      for (int64_t i = 0; i < kWidth; ++i)
        full[(b * kParts + indices[b * kCount + t]) * kWidth + i] += g[(b * kCount + t) * kWidth + i];
    }
  }
  for (const SketchKind kind : kKinds) {
    const Projection p{kind, 3, 1000, 2};
    fc::ThreadTeam team(2);
    std::vector<T> expected(kBatch * kDim), found(kBatch * kDim, T(1));
    fc::sketch<T>(TensorView<const T, 2>::compact(full.data(), kBatch, kParts * kWidth), p,
                  TensorView<T, 2>::compact(expected.data(), kBatch, kDim), team);
    fc::sketch_rows<T>(TensorView<const int64_t, 2>::compact(indices.data(), kBatch, kCount),
                       TensorView<const T, 3>::compact(g.data(), kBatch, kCount, kWidth), p,
                       TensorView<T, 2>::compact(found.data(), kBatch, kDim), team);
    for (size_t i = 0; i < found.size(); ++i)
      CHECK(std::abs(found[i] - 1 - expected[i]) <= (sizeof(T) == 4 ? T(2e-5) : T(1e-13)));
  }
}

template <class T>
void test_all() {
  test_product<T>(1, 1, 1, 1, 0);
  test_product<T>(2, 7, 5, 1, 3);
  test_product<T>(17, 97, 130, 3, 11);
  test_product<T>(9, 2100, 65, 4, 1000);
  test_product<T>(20, 600, 513, 513, 4097);
  test_product<T>(3, 150, 4200, 2, int64_t{1} << 40);
  test_product<T>(33, 9000, 3, 2, 5);
  test_parts<T>();
}

}  // namespace

void test_no_columns() {
  for (const auto kind : kKinds) {
    fc::Projection projection;
    projection.kind = kind;
    std::vector<float> out(6, 7.0f);
    fc::ThreadTeam team(2);
    fc::sketch<float>(fc::TensorView<const float, 2>::compact(static_cast<const float*>(nullptr), 2, 0),
                      projection, fc::TensorView<float, 2>::compact(out.data(), 2, 3), team);
    CHECK(out == std::vector<float>(6, 0.0f));
  }
}

TEST_PROGRAM {
  test_no_columns();
  test_signs();
  test_normal_numbers();
  test_all<float>();
  test_all<double>();
  return check::verdict("sketch");
}
