// A typed window onto memory that somebody else owns: what every kernel takes. It depends on no framework.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fc {

template <class T, int Rank>
struct TensorView {
  static_assert(Rank >= 1);

  T* data;
  int64_t shape[Rank];
  int64_t stride[Rank];  // in elements; may be negative or 0

  // A view of compact memory, last dimension fastest.
  template <class... Sizes, class = std::enable_if_t<sizeof...(Sizes) == Rank>>
  static TensorView compact(T* data, Sizes... sizes) {
    TensorView view{data, {static_cast<int64_t>(sizes)...}, {}};
    int64_t step = 1;
    for (int axis = Rank - 1; axis >= 0; --axis) {
      view.stride[axis] = step;
      step *= view.shape[axis];
    }
    return view;
  }

  int64_t rows() const { return shape[0]; }
  int64_t cols() const {
    static_assert(Rank >= 2);
    return shape[1];
  }

  int64_t size() const {
    int64_t product = 1;
    for (int axis = 0; axis < Rank; ++axis) product *= shape[axis];
    return product;
  }

  template <class... Indices>
  T& operator()(Indices... indices) const {
    static_assert(sizeof...(Indices) == Rank);
    const int64_t at[Rank] = {static_cast<int64_t>(indices)...};
    int64_t offset = 0;
    for (int axis = 0; axis < Rank; ++axis) offset += at[axis] * stride[axis];
    return data[offset];
  }

  // The first element of row i; the row itself is data[0..cols) only if has_contiguous_rows().
  T* row(int64_t i) const { return data + i * stride[0]; }

  // Whether the elements of a row (of the last dimension) follow each other in memory.
  bool has_contiguous_rows() const { return shape[Rank - 1] <= 1 || stride[Rank - 1] == 1; }

  // Whether all elements follow each other in memory, last dimension fastest.
  bool is_compact() const {
    if (size() == 0) return true;
    int64_t step = 1;
    for (int axis = Rank - 1; axis >= 0; --axis) {
      if (shape[axis] != 1 && stride[axis] != step) return false;
      step *= shape[axis];
    }
    return true;
  }

  operator TensorView<const T, Rank>() const {
    TensorView<const T, Rank> view{data, {}, {}};
    for (int axis = 0; axis < Rank; ++axis) {
      view.shape[axis] = shape[axis];
      view.stride[axis] = stride[axis];
    }
    return view;
  }
};

}  // namespace fc
