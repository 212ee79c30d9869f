// What gradient matching computes from many gradients without holding them all: the Adam updates that they
// would cause, the dimensions where a group's updates are largest on average, and the history that the chosen
// ones leave.
//
// See matching.cpp for the formulas and the cost.
#pragma once

#include <cstdint>

#include "core/gradients.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

// dims [G, top] = the dimensions of the largest |mean of u over the group's rows|, largest first, ties to the
// lower dimension; u [R, top] = the rows of `groups`, in its order, restricted to their group's dimensions. m
// and v [D] are read if the rule has a history. Throws std::invalid_argument for a NaN or infinity, naming
// its place.
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
