// Strided views: element access with any stride, the layout questions kernels ask, and the conversion to a
// view of const.
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/tensor_view.h"

namespace {

using fc::TensorView;

std::vector<float> counting(int n) {
  std::vector<float> values(n);
  for (int i = 0; i < n; ++i) values[i] = static_cast<float>(i);
  return values;
}

void test_compact() {
  auto values = counting(24);
  const auto view = TensorView<float, 3>::compact(values.data(), 2, 3, 4);
  CHECK_EQUAL(view.size(), 24);
  CHECK_EQUAL(view.rows(), 2);
  CHECK_EQUAL(view.cols(), 3);
  CHECK_EQUAL(view(1, 2, 3), 23.0f);
  CHECK_EQUAL(view(1, 0, 2), 14.0f);
  CHECK(view.is_compact() && view.has_contiguous_rows());
  CHECK_EQUAL(view.row(1), values.data() + 12);
}

void test_strides() {
  auto values = counting(12);  // [3, 4]
  const TensorView<float, 2> transposed{values.data(), {4, 3}, {1, 4}};
  CHECK_EQUAL(transposed(3, 2), 11.0f);
  CHECK_EQUAL(transposed(1, 2), 9.0f);
  CHECK(!transposed.is_compact() && !transposed.has_contiguous_rows());
  const TensorView<float, 2> reversed{values.data() + 8, {3, 4}, {-4, 1}};
  CHECK_EQUAL(reversed(0, 0), 8.0f);
  CHECK_EQUAL(reversed(2, 3), 3.0f);
  CHECK(reversed.has_contiguous_rows() && !reversed.is_compact());
  const TensorView<float, 1> backwards{values.data() + 11, {12}, {-1}};
  for (int i = 0; i < 12; ++i) CHECK_EQUAL(backwards(i), 11.0f - static_cast<float>(i));
  const TensorView<float, 2> repeated{values.data() + 5, {3, 4}, {0, 0}};
  CHECK_EQUAL(repeated(2, 3), 5.0f);
  reversed(1, 1) = 100;
  CHECK_EQUAL(values[5], 100.0f);
}

// For dimensions of size 0 and 1 strides do not matter.
void test_degenerate() {
  float value = 3;
  CHECK((TensorView<float, 2>{&value, {1, 1}, {77, -5}}).is_compact());
  CHECK((TensorView<float, 2>{&value, {1, 1}, {77, -5}}).has_contiguous_rows());
  CHECK((TensorView<float, 2>{nullptr, {0, 5}, {3, 9}}).is_compact());
  CHECK((TensorView<float, 2>{nullptr, {5, 0}, {3, 9}}).has_contiguous_rows());
  CHECK_EQUAL((TensorView<float, 2>{nullptr, {5, 0}, {3, 9}}).size(), 0);
  const TensorView<float, 2> column{&value, {1, 1}, {5, 3}};
  CHECK_EQUAL(column(0, 0), 3.0f);
}

// 64-bit arithmetic: an offset beyond 2^31 elements. Only the address is formed.
void test_large_offsets() {
  const auto view = TensorView<const char, 2>::compact(nullptr, int64_t{1} << 20, int64_t{1} << 20);
  CHECK_EQUAL(view.size(), int64_t{1} << 40);
  CHECK_EQUAL(view.stride[0], int64_t{1} << 20);
}

void test_const() {
  auto values = counting(6);
  const auto view = TensorView<float, 2>::compact(values.data(), 2, 3);
  const TensorView<const float, 2> frozen = view;
  static_assert(std::is_same_v<decltype(frozen(0, 0)), const float&>);
  static_assert(!std::is_convertible_v<TensorView<const float, 2>, TensorView<float, 2>>);
  CHECK_EQUAL(frozen(1, 2), 5.0f);
  CHECK_EQUAL(frozen.data, view.data);
}

}  // namespace

TEST_PROGRAM {
  test_compact();
  test_strides();
  test_degenerate();
  test_large_offsets();
  test_const();
  return check::verdict("tensor_view");
}
