// Loss, entropy, margin, EL2N and correctness of a classifier's outputs.
//
// See scores.cpp for the formulas and the cost.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/half.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

// The type that the scores of logits of type X are written in.
template <class X>
using ScoreOf = std::conditional_t<std::is_same_v<X, double>, double, float>;

// out [5, N, T]: loss, entropy, margin, EL2N and whether the prediction is correct (1 or 0), of logits [N, T,
// C] and targets [N, T]. With `masked` a target of -1 says that the token does not count: none of its logits
// is read, and its scores are 0. X is float, double, Half or BFloat16. Throws std::invalid_argument for a
// target outside [0, C), NaN and infinity, naming the first sample that has one.
template <class X>
void sample_scores(TensorView<const X, 3> logits, TensorView<const int64_t, 2> targets, bool masked,
                   TensorView<ScoreOf<X>, 3> out, ThreadTeam& team);

}  // namespace fc
