// Gradient matching on the GPU: the functions of csrc/cpu/matching.h and csrc/cpu/directions.h, for arrays on
// the device.
#pragma once

#include <cstdint>
#include <functional>

#include "core/gradients.h"
#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// out [q, n], rows contiguous, = elements begin to begin + n of the directions first to first + q. The call
// does not wait.
template <class T>
void directions(uint64_t seed, int64_t begin, uint32_t first, TensorView<T, 2> out, cudaStream_t stream);

// dims and values [G, top] = the dimensions of the largest |mean of u over the group's rows| and these means,
// in no order; if means are equal, the lower dimensions are taken. `refused` [1] becomes the first dimension
// with a NaN, an infinity or v < 0, if there is one; then dims and values have no meaning. m and v [D] are
// read if the rule has a history. All arrays but g are compact. `groups` is not checked before it is used.
// Work goes to `stream`, two chunks of the dimensions at a time: the host waits for the ones before, asking
// `poll` whether to stop (then Cancelled is thrown). Chunks have `first_chunk` dimensions (`top` at least),
// then twice as many each.
template <class Gradients, class T = HistoryOf<typename Gradients::Element>>
void top_dimensions(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m,
                    TensorView<const T, 1> v, const GroupedRows& groups, TensorView<int64_t, 2> dims,
                    TensorView<double, 2> values, int64_t* refused, cudaStream_t stream,
                    std::function<bool()> poll, int64_t first_chunk = int64_t{1} << 12);

// u [R, top] = the rows of `groups`, in its order, restricted to their group's dimensions. The call does not
// wait.
template <class Gradients, class T = HistoryOf<typename Gradients::Element>>
void restrict_updates(const Gradients& g, const AdamRule& rule, TensorView<const T, 1> m,
                      TensorView<const T, 1> v, const GroupedRows& groups, TensorView<const int64_t, 2> dims,
                      TensorView<double, 2> u, cudaStream_t stream);

// new_m = beta1 m + (1 - beta1) mean g and new_v = beta2 v + (1 - beta2) mean g^2 over the rows `chosen`; all
// arrays are compact. `overflows` [1] becomes 1 if one of them is not finite. A call of several long launches
// waits as top_dimensions() does; a launch makes about `at_once` products.
template <class Gradients, class T = HistoryOf<typename Gradients::Element>>
void update_history(const Gradients& g, double beta1, double beta2, TensorView<const T, 1> m,
                    TensorView<const T, 1> v, TensorView<const int64_t, 1> chosen, TensorView<T, 1> new_m,
                    TensorView<T, 1> new_v, int64_t* overflows, cudaStream_t stream,
                    std::function<bool()> poll, int64_t at_once = int64_t{1} << 34);

}  // namespace fc::cuda
