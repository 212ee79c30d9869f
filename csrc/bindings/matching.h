// Gradient matching as Python describes it (flashcoreset/matching/problem.py), for both devices. `Arrays`
// says how a kernel's arrays are read and written: HostArrays or DeviceArrays.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "bindings/bindings.h"
#include "bindings/fields.h"
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

inline AdamRule rule_of(const Fields& problem) {
  const Fields rule = problem.nested("rule");
  const auto number = [&](const char* name) { return rule.real(name).not_negative(name); };
  return {problem.has("history"), number("m_scale"), number("m_step"),
          number("v_scale"),      number("v_step"),  number("eps")};
}

class GradientsArgument {
 public:
  explicit GradientsArgument(const Fields& g)
      : seed_(g.integer("seed").seed()),
        length_(g.has("length") ? g.integer("length").count("length", 1) : 0),
        values_(g.array("values")) {}

  int device() const { return values_.device_id(); }

  // fn(gradients): rows [B, D], or with a length the coefficients [B, q] of directions from the seed.
  template <class Fn>
  void dispatch(Fn&& fn) const {
    if (length_ == 0) {
      dispatch_real(values_, [&](auto zero) {
        using X = decltype(zero);
        fn(DenseGradients<X>{values_.input<X, 2>()});
      });
    } else {
      dispatch_floating(values_, [&](auto zero) {
        using X = decltype(zero);
        fn(LowRankGradients<X>{values_.input<X, 2>(), seed_, length_});
      });
    }
  }

 private:
  uint64_t seed_;
  int64_t length_;  // 0 for rows
  ArrayArgument values_;
};

template <class Gradients>
int64_t row_count(const Gradients& g) {
  if constexpr (std::is_same_v<Gradients, DenseGradients<typename Gradients::Element>>)
    return g.rows.rows();
  else
    return g.coefficients.rows();
}

template <class Gradients>
using HistoryFor = HistoryOf<typename Gradients::Element>;

// The problem `Updates`.
class UpdatesArgument {
 public:
  explicit UpdatesArgument(const Fields& problem)
      : rule_(rule_of(problem)),
        g_(problem.nested("g")),
        member_(problem.array("member")),
        offset_(problem.array("offset")) {
    if (!rule_.has_history) return;
    const Fields history = problem.nested("history");
    m_.emplace(history.array("m"));
    v_.emplace(history.array("v"));
  }

  const AdamRule& rule() const { return rule_; }
  int device() const { return g_.device(); }

  // fn(gradients, m, v, groups), after checking that the array `dims` [G, top] fits them.
  template <class Arrays, class Fn>
  void with(const Arrays& arrays, const ArrayArgument& dims, const Fn& fn) const {
    const GroupedRows groups{arrays.template input<int64_t, 1>(member_),
                             arrays.template input<int64_t, 1>(offset_)};
    if (groups.offset.size() < 2) throw py::value_error("offset: expected at least 2 entries");
    const int64_t top = dims.size(1);
    dims.require_shape({groups.offset.size() - 1, top});
    g_.dispatch([&](const auto& gradients) {
      using T = HistoryFor<std::decay_t<decltype(gradients)>>;
      if (top < 1 || top > gradients.numel())
        throw py::value_error("dims: expected 1 to " + std::to_string(gradients.numel()) + " columns, got " +
                              std::to_string(top));
      TensorView<const T, 1> m{}, v{};
      if (rule_.has_history) {
        m_->require_shape({gradients.numel()});
        v_->require_shape({gradients.numel()});
        m = arrays.template input<T, 1>(*m_);
        v = arrays.template input<T, 1>(*v_);
      }
      fn(gradients, m, v, groups);
    });
  }

 private:
  AdamRule rule_;
  GradientsArgument g_;
  ArrayArgument member_, offset_;
  std::optional<ArrayArgument> m_, v_;
};

// A step of Adam's history, whose means go to new_m and new_v.
class StepArgument {
 public:
  StepArgument(const Fields& gradients, const Fields& history, py::handle chosen, py::handle new_m,
               py::handle new_v, dlpack::DeviceType where)
      : beta1_(beta(history, 0, "betas[0]")),
        beta2_(beta(history, 1, "betas[1]")),
        g_(gradients),
        m_(history.array("m")),
        v_(history.array("v")),
        chosen_(chosen, "chosen", where),
        new_m_(new_m, "new_m", where),
        new_v_(new_v, "new_v", where) {}

  int device() const { return g_.device(); }

  // fn(gradients, beta1, beta2, m, v, chosen, new_m, new_v).
  template <class Arrays, class Fn>
  void with(const Arrays& arrays, const Fn& fn) const {
    const auto rows = arrays.template input<int64_t, 1>(chosen_);
    if (rows.size() == 0) throw py::value_error("chosen: expected at least 1 row, got 0");
    g_.dispatch([&](const auto& gradients) {
      using T = HistoryFor<std::decay_t<decltype(gradients)>>;
      const auto m = arrays.template input<T, 1>(m_), v = arrays.template input<T, 1>(v_);
      const auto new_m = arrays.template output<T, 1>(new_m_), new_v = arrays.template output<T, 1>(new_v_);
      for (const ArrayArgument* array : {&m_, &v_, &new_m_, &new_v_})
        array->require_shape({gradients.numel()});
      fn(gradients, beta1_, beta2_, m, v, rows, new_m, new_v);
    });
  }

 private:
  static double beta(const Fields& history, Py_ssize_t i, const char* name) {
    const py::object betas = history["betas"];
    if (!PyTuple_Check(betas.ptr()) || PyTuple_GET_SIZE(betas.ptr()) != 2)
      detail::refuse_type("betas", "a tuple of two numbers", betas);
    return Real::of(PyTuple_GET_ITEM(betas.ptr(), i)).finite(name);
  }

  double beta1_, beta2_;
  GradientsArgument g_;
  ArrayArgument m_, v_, chosen_, new_m_, new_v_;
};

}  // namespace fc
