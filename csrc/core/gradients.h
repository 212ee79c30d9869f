// What gradient matching is given: gradients in either form, their groups, and the rule that makes updates of
// them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "core/tensor_view.h"

namespace fc {

// The type that gradients of type X are computed in and the history is kept in.
template <class X>
using HistoryOf = std::conditional_t<std::is_same_v<X, double>, double, float>;

// u = (m_scale m + m_step g) / (sqrt(v_scale v + v_step g^2) + eps); without a history u = g.
struct AdamRule {
  bool has_history = false;
  double m_scale = 0, m_step = 1, v_scale = 0, v_step = 0, eps = 0;
};

// Gradients as rows, [B, D].
template <class X>
struct DenseGradients {
  using Element = X;
  TensorView<const X, 2> rows;
  int64_t numel() const { return rows.cols(); }
};

// Gradients as coefficients [B, q] of directions that are made from a seed; X is float or double.
template <class X>
struct LowRankGradients {
  using Element = X;
  TensorView<const X, 2> coefficients;
  uint64_t seed = 0;
  int64_t length = 0;
  int64_t numel() const { return length; }
};

// The groups' members: group i has the rows member[offset[i]] to member[offset[i + 1] - 1]. None is empty.
struct GroupedRows {
  TensorView<const int64_t, 1> member;  // [R]
  TensorView<const int64_t, 1> offset;  // [G + 1]
};

}  // namespace fc
