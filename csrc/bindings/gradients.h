// Gradients as the bindings of gradient matching get them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "core/gradients.h"

namespace fc {

// fn(gradients): rows [B, D], or with a length the coefficients [B, q] of directions from `seed`.
template <class Fn>
void dispatch_gradients(const ArrayArgument& g, int64_t seed, py::object length, Fn&& fn) {
  if (length.is_none()) {
    dispatch_real(g, [&](auto zero) {
      using X = decltype(zero);
      fn(DenseGradients<X>{g.input<X, 2>()});
    });
  } else {
    dispatch_floating(g, [&](auto zero) {
      using X = decltype(zero);
      fn(LowRankGradients<X>{g.input<X, 2>(), static_cast<uint64_t>(seed), length.cast<int64_t>()});
    });
  }
}

template <class Gradients>
int64_t row_count(const Gradients& g) {
  if constexpr (std::is_same_v<Gradients, DenseGradients<typename Gradients::Element>>)
    return g.rows.rows();
  else
    return g.coefficients.rows();
}

}  // namespace fc
