// Sinkhorn of the module _cuda.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "cuda/sinkhorn.h"

namespace fc {
namespace {

// The arrays of a batch, checked against each other, for as long as the object lives.
class Problems {
 public:
  // y is None if x has the costs; lengths may be None.
  Problems(py::handle x, py::handle y, const std::string& metric, py::handle a, py::handle b,
           py::handle x_lengths, py::handle y_lengths)
      : x_(keep(x, "x")), metric_(metric) {
    if ((metric == "precomputed") != y.is_none()) {
      throw py::value_error("y: expected points, or None for metric precomputed");
    }
    batch_ = x_.size(0);
    n_ = x_.size(1);
    m_ = x_.size(2);
    if (!y.is_none()) {
      d_ = m_;
      y_ = &keep(y, "y");
      m_ = y_->size(1);
    }
    if (batch_ < 1 || n_ < 1 || m_ < 1 || batch_ >= kLimit || n_ >= kLimit || m_ >= kLimit ||
        batch_ * std::max(n_, m_) >= kLimit) {
      throw py::value_error(
          "x: expected less than 2^30 rows and columns in all problems together, and at least one, got " +
          std::to_string(batch_) + " problems of " + std::to_string(n_) + " by " + std::to_string(m_));
    }
    a_ = compact<double>(a, "a", {batch_, n_});
    b_ = compact<double>(b, "b", {batch_, m_});
    if (!x_lengths.is_none()) x_lengths_ = compact<int64_t>(x_lengths, "x_lengths", {batch_});
    if (!y_lengths.is_none()) y_lengths_ = compact<int64_t>(y_lengths, "y_lengths", {batch_});
  }

  int64_t batch() const { return batch_; }
  int64_t n() const { return n_; }
  int64_t m() const { return m_; }
  int device() const { return x_.device_id(); }
  const ArrayArgument& x() const { return x_; }

  template <class T>
  cuda::SinkhornProblems<T> view() {
    cuda::SinkhornProblems<T> problems;
    problems.x = compact_view<T, 3>(x_, {batch_, n_, y_ == nullptr ? m_ : d_});
    if (y_ != nullptr) {
      problems.y = compact_view<T, 3>(*y_, {batch_, m_, d_});
      problems.metric = metric_from_name(metric_);
      if (problems.metric == Metric::kDot)
        throw py::value_error("metric: expected a distance or cosine, got 'dot'");
    }
    problems.batch = batch_;
    problems.n = n_;
    problems.m = m_;
    problems.d = d_;
    problems.a = a_;
    problems.b = b_;
    problems.x_lengths = x_lengths_;
    problems.y_lengths = y_lengths_;
    return problems;
  }

  // An array to read from, of this shape, kept with the others.
  template <class U, int Rank>
  const U* compact(py::handle array, const char* name, const int64_t (&shape)[Rank]) {
    return compact_view<U, Rank>(keep(array, name), shape);
  }

  // One to write to.
  template <class U, int Rank>
  U* output(py::handle array, const char* name, const int64_t (&shape)[Rank]) {
    return output<U>(keep(array, name), shape);
  }
  template <class U, int Rank>
  static U* output(const ArrayArgument& array, const int64_t (&shape)[Rank]) {
    const auto view = array.output<U, Rank>();
    check_layout(view, array.name(), shape);
    return view.data;
  }

  const ArrayArgument& keep(py::handle array, const char* name) {
    arrays_.push_back(std::make_unique<ArrayArgument>(array, name, kDevice));
    require_device(*arrays_.back(), arrays_.front()->device_id());
    return *arrays_.back();
  }

 private:
  // Tiles and lines are counted in ints.
  static constexpr int64_t kLimit = 1 << 30;

  template <class U, int Rank>
  static const U* compact_view(const ArrayArgument& array, const int64_t (&shape)[Rank]) {
    const auto view = array.input<U, Rank>();
    check_layout(view, array.name(), shape);
    return view.data;
  }

  template <class View, int Rank>
  static void check_layout(const View& view, const char* name, const int64_t (&shape)[Rank]) {
    bool same = view.is_compact();
    std::string expected;
    for (int axis = 0; axis < Rank; ++axis) {
      same = same && view.shape[axis] == shape[axis];
      expected += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
    }
    if (!same) throw py::value_error(std::string(name) + ": expected a contiguous array [" + expected + "]");
  }

  std::vector<std::unique_ptr<ArrayArgument>> arrays_;  // before the members that refer to them
  const ArrayArgument& x_;
  const ArrayArgument* y_ = nullptr;
  const std::string metric_;
  int64_t batch_ = 0, n_ = 0, m_ = 0, d_ = 0;
  const double *a_ = nullptr, *b_ = nullptr;
  const int64_t *x_lengths_ = nullptr, *y_lengths_ = nullptr;
};

// What is wrong, or None; then the argument, problem, row, column.
py::tuple tuple_of(const cuda::SinkhornVerdict& verdict) {
  static constexpr const char* kKinds[] = {nullptr,   "not finite", "weight",   "no weight",
                                           "unequal", "overflow",   "small reg"};
  const char* kind = kKinds[verdict.kind];
  const bool of_points = verdict.kind == cuda::SinkhornVerdict::kNotFinite;
  const char* const argument = of_points ? (verdict.second ? "y" : "x") : (verdict.second ? "b" : "a");
  return py::make_tuple(kind == nullptr ? py::object(py::none()) : py::str(kind), argument, verdict.problem,
                        verdict.row, verdict.column);
}

py::tuple sinkhorn(py::object x, py::object y, const std::string& metric, py::object a, py::object b,
                   py::object x_lengths, py::object y_lengths, Real reg, Real reg_marginal_a,
                   Real reg_marginal_b, Integer max_iter, Real tol, py::object start_f, py::object start_g,
                   py::object f, py::object g, py::object value, py::object transport_cost, py::object error,
                   py::object tolerance, py::object iterations, Integer shared_bytes, Integer stream) {
  Problems problems(x, y, metric, a, b, x_lengths, y_lengths);
  const int64_t batch = problems.batch(), n = problems.n(), m = problems.m();
  cuda::SinkhornOptions options;
  options.reg = reg.positive("reg");
  options.rho_a = reg_marginal_a.positive_or_infinite("reg_marginal_a");
  options.rho_b = reg_marginal_b.positive_or_infinite("reg_marginal_b");
  options.tol = tol.not_negative("tol");
  options.max_iter = max_iter.in("max_iter", 1, int64_t{1} << 40);
  if (!start_f.is_none() && !start_g.is_none()) {
    options.f = problems.compact<double>(start_f, "f", {batch, n});
    options.g = problems.compact<double>(start_g, "g", {batch, m});
  }
  options.shared_bytes = shared_bytes.in("shared_bytes", -1, INT32_MAX);
  options.stream = stream_of(stream);
  cuda::SinkhornResult result;
  result.f = problems.output<double>(f, "f", {batch, n});
  result.g = problems.output<double>(g, "g", {batch, m});
  result.value = problems.output<double>(value, "value", {batch});
  result.transport_cost = problems.output<double>(transport_cost, "transport_cost", {batch});
  result.error = problems.output<double>(error, "error", {batch});
  result.tol = problems.output<double>(tolerance, "tolerance", {batch});
  result.iterations = problems.output<int64_t>(iterations, "iterations", {batch});
  cuda::SinkhornVerdict verdict;
  dispatch_floating(problems.x(), [&](auto zero) {
    using T = decltype(zero);
    const auto view = problems.view<T>();
    const DeviceGuard guard(problems.device());
    without_gil([&] { verdict = cuda::sinkhorn<T>(view, options, result); });
  });
  return tuple_of(verdict);
}

void sinkhorn_apply(py::object x, py::object y, const std::string& metric, py::object a, py::object b,
                    py::object x_lengths, py::object y_lengths, Real reg_number, py::object f, py::object g,
                    py::object v, Flag transpose_flag, py::object out, Integer stream_number) {
  const double reg = reg_number.positive("reg");
  const bool transpose = transpose_flag.on("transpose");
  const cudaStream_t stream = stream_of(stream_number);
  Problems problems(x, y, metric, a, b, x_lengths, y_lengths);
  const int64_t batch = problems.batch(), n = problems.n(), m = problems.m();
  const double* const start_f = problems.compact<double>(f, "f", {batch, n});
  const double* const start_g = problems.compact<double>(g, "g", {batch, m});
  const ArrayArgument& written = problems.keep(out, "out");
  const int64_t k = written.size(2);
  const double* const factors = problems.compact<double>(v, "v", {batch, transpose ? n : m, k});
  double* const result = Problems::output<double>(written, {batch, transpose ? m : n, k});
  if (k == 0) return;
  dispatch_floating(problems.x(), [&](auto zero) {
    using T = decltype(zero);
    const auto view = problems.view<T>();
    const DeviceGuard guard(problems.device());
    without_gil(
        [&] { cuda::sinkhorn_apply<T>(view, reg, start_f, start_g, factors, k, transpose, result, stream); });
  });
}

void sinkhorn_plan(py::object x, py::object y, const std::string& metric, py::object a, py::object b,
                   py::object x_lengths, py::object y_lengths, Real reg_number, py::object f, py::object g,
                   py::object out, Integer stream_number) {
  const double reg = reg_number.positive("reg");
  const cudaStream_t stream = stream_of(stream_number);
  Problems problems(x, y, metric, a, b, x_lengths, y_lengths);
  const int64_t batch = problems.batch(), n = problems.n(), m = problems.m();
  const double* const start_f = problems.compact<double>(f, "f", {batch, n});
  const double* const start_g = problems.compact<double>(g, "g", {batch, m});
  double* const result = problems.output<double>(out, "out", {batch, n, m});
  dispatch_floating(problems.x(), [&](auto zero) {
    using T = decltype(zero);
    const auto view = problems.view<T>();
    const DeviceGuard guard(problems.device());
    without_gil([&] { cuda::sinkhorn_plan<T>(view, reg, start_f, start_g, result, stream); });
  });
}

}  // namespace

void bind_cuda_sinkhorn(py::module_& m) {
  m.def("sinkhorn", &sinkhorn, py::arg("x"), py::arg("y"), py::arg("metric"), py::arg("a"), py::arg("b"),
        py::arg("x_lengths"), py::arg("y_lengths"), py::arg("reg"), py::arg("reg_marginal_a"),
        py::arg("reg_marginal_b"), py::arg("max_iter"), py::arg("tol"), py::arg("start_f"),
        py::arg("start_g"), py::arg("f"), py::arg("g"), py::arg("value"), py::arg("transport_cost"),
        py::arg("error"), py::arg("tolerance"), py::arg("iterations"), py::arg("shared_bytes"),
        py::arg("stream"),
        "Writes f, g and a number a problem; waits; returns (what is wrong or None, argument, problem, row, "
        "column).");
  m.def("sinkhorn_apply", &sinkhorn_apply, py::arg("x"), py::arg("y"), py::arg("metric"), py::arg("a"),
        py::arg("b"), py::arg("x_lengths"), py::arg("y_lengths"), py::arg("reg"), py::arg("f"), py::arg("g"),
        py::arg("v"), py::arg("transpose"), py::arg("out"), py::arg("stream"),
        "out [batch, n, k] = P v, or [batch, m, k] = P^T v.");
  m.def("sinkhorn_plan", &sinkhorn_plan, py::arg("x"), py::arg("y"), py::arg("metric"), py::arg("a"),
        py::arg("b"), py::arg("x_lengths"), py::arg("y_lengths"), py::arg("reg"), py::arg("f"), py::arg("g"),
        py::arg("out"), py::arg("stream"), "out [batch, n, m] = P.");
}

}  // namespace fc
