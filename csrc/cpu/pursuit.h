// Orthogonal matching pursuit and Frank-Wolfe (GIGA): few rows whose weighted sum is close to a target.
//
// See pursuit.cpp for the algorithms and their cost, python/flashcoreset/pursuit/reference.py for the
// definition.
#pragma once

#include <cstdint>
#include <vector>

#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

struct PursuitResult {
  std::vector<int64_t> indices;        // distinct, in pick order
  std::vector<double> weights;         // of these rows, none of them 0
  std::vector<double> residual_norms;  // |target - sum_i w_i g_i| after each step
};

struct MatchingPursuit {
  int64_t k = 1;  // the most picks
  bool nonnegative = true;
  double ridge = 0;
  int64_t memory_budget = 0;  // bytes for columns of the Gram matrix; if k columns need more, none is kept
};

// g [B, D], rows contiguous, and target [D]. Both functions throw std::invalid_argument for NaN and infinity,
// and if squares of the rows overflow. X is float or double; every sum is in double.
template <class X>
PursuitResult orthogonal_matching_pursuit(TensorView<const X, 2> g, const double* target,
                                          const MatchingPursuit& options, ThreadTeam& team);

// k steps; a step may come back to a row that it has.
template <class X>
PursuitResult frank_wolfe(TensorView<const X, 2> g, const double* target, int64_t k, int64_t memory_budget,
                          ThreadTeam& team);

}  // namespace fc
