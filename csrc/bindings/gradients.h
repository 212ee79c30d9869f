// Gradients as the bindings of gradient matching get them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "core/gradients.h"

namespace fc {

// The elements from `begin` on of the directions from `first` on.
struct DirectionsFrom {
  int64_t begin;
  uint32_t first;
};

template <class T>
DirectionsFrom directions_from(Integer begin, Integer first, const TensorView<T, 2>& out) {
  // Kernels work in whole blocks of random numbers, so they go beyond the last element.
  const int64_t most = INT64_MAX - (int64_t{1} << 16) - out.cols();
  const int64_t directions = (int64_t{1} << 32) - out.rows();
  if (directions < 0)
    throw py::value_error("out: expected at most 2^32 rows, got " + std::to_string(out.rows()));
  return {begin.in("begin", 0, most),
          static_cast<uint32_t>(first.in("first", 0, std::min(directions, int64_t{UINT32_MAX})))};
}

inline AdamRule rule_from(py::handle m, Real m_scale, Real m_step, Real v_scale, Real v_step, Real eps) {
  return {!m.is_none(),
          m_scale.not_negative("m_scale"),
          m_step.not_negative("m_step"),
          v_scale.not_negative("v_scale"),
          v_step.not_negative("v_step"),
          eps.not_negative("eps")};
}

// fn(gradients): rows [B, D], or with a length the coefficients [B, q] of directions from `seed`.
template <class Fn>
void dispatch_gradients(const ArrayArgument& g, Integer seed_number, Integer length_number, Fn&& fn) {
  const uint64_t seed = seed_number.seed();
  if (length_number.given.is_none()) {
    dispatch_real(g, [&](auto zero) {
      using X = decltype(zero);
      fn(DenseGradients<X>{g.input<X, 2>()});
    });
  } else {
    const int64_t length = length_number.count("length", 1);
    dispatch_floating(g, [&](auto zero) {
      using X = decltype(zero);
      fn(LowRankGradients<X>{g.input<X, 2>(), seed, length});
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
