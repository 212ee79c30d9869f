// What gradient matching reads off many gradients without holding them all: the Adam updates that they would
// cause, the dimensions where a group's updates are largest on average, and the history that the chosen ones
// leave.
//
// See matching.cpp for the formulas and the cost.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

// What gradients of type X are computed in, and the history kept in.
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

// dims [G, top] = the dimensions of the largest |mean of u over the group's rows|, largest first, ties to the
// lower dimension; u [R, top] = the rows of `groups`, in its order, restricted to their group's dimensions. m
// and v [D] are read if the rule has a history. Throws std::invalid_argument for a NaN or infinity, naming
// where it is.
template <class Gradients, class T = HistoryOf<typename Gradients::Element>>
void top_updates(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m, TensorView<const T, 1> v,
                 const GroupedRows& groups, TensorView<int64_t, 2> dims, TensorView<double, 2> u,
                 ThreadTeam& team);

// new_m = beta1 m + (1 - beta1) mean g and new_v = beta2 v + (1 - beta2) mean g^2 over the rows `chosen`.
template <class Gradients, class T = HistoryOf<typename Gradients::Element>>
void update_history(const Gradients& g, double beta1, double beta2, TensorView<const T, 1> m,
                    TensorView<const T, 1> v, TensorView<const int64_t, 1> chosen, TensorView<T, 1> new_m,
                    TensorView<T, 1> new_v, ThreadTeam& team);

}  // namespace fc
