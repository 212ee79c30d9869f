// Python's view of batched Sinkhorn.
#include "cpu/sinkhorn.h"

#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/run.h"

namespace fc {
namespace {

// The arrays of a batch, kept alive, and the batch as the kernels see it.
class PyBatch {
 public:
  PyBatch(py::object x, py::object y, py::object a, py::object b, const std::string& metric,
          py::object x_lengths, py::object y_lengths)
      : x_(x, "x"), a_(a, "a"), b_(b, "b") {
    if (!y.is_none()) y_.emplace_back(y, "y");
    if ((metric == "precomputed") != y.is_none())
      throw py::value_error("y: expected points, or None for metric 'precomputed'");
    if (!y.is_none()) {
      is_cosine_ = metric == "cosine";
      metric_ = metric_from_name(metric);
      if (metric_ == Metric::kDot) throw py::value_error("metric: dot products are no costs");
    }
    weights_[0] = a_.input<double, 2>();
    weights_[1] = b_.input<double, 2>();
    lengths(x_lengths, "x_lengths", weights_[0], x_lengths_);
    lengths(y_lengths, "y_lengths", weights_[1], y_lengths_);
  }

  template <class T>
  SinkhornBatch<T> batch() const {
    SinkhornBatch<T> result;
    result.x = x_.input<T, 3>();
    const int64_t count = result.x.shape[0], n = result.x.shape[1];
    int64_t m = result.x.shape[2];
    if (!y_.empty()) {
      result.y = y_[0].input<T, 3>();
      if (result.y.shape[2] != m || result.y.shape[0] != count)
        throw py::value_error("y: expected as many problems and columns as x has");
      m = result.y.shape[1];
    }
    if (weights_[0].shape[0] != count || weights_[0].shape[1] != n || weights_[1].shape[0] != count ||
        weights_[1].shape[1] != m) {
      throw py::value_error("a, b: expected a weight for each row and column of every problem");
    }
    if (count == 0 || n == 0 || m == 0)
      throw py::value_error("x: expected at least one problem, row and column");
    result.is_cost = y_.empty();
    result.cosine = is_cosine_;
    result.metric = metric_;
    result.a = weights_[0];
    result.b = weights_[1];
    result.x_lengths = x_lengths_.empty() ? nullptr : x_lengths_.data();
    result.y_lengths = y_lengths_.empty() ? nullptr : y_lengths_.data();
    return result;
  }

  const ArrayArgument& x() const { return x_; }

 private:
  static void lengths(py::object array, const char* name, const TensorView<const double, 2>& weights,
                      std::vector<int64_t>& result) {
    if (array.is_none()) return;
    const ArrayArgument argument(array, name);
    const auto view = argument.input<int64_t, 1>();
    if (view.shape[0] != weights.shape[0])
      throw py::value_error(std::string(name) + ": expected one for each problem");
    for (int64_t p = 0; p < view.shape[0]; ++p) {
      if (view(p) < 1 || view(p) > weights.shape[1])
        throw py::value_error(std::string(name) + ": expected sizes in [1, " +
                              std::to_string(weights.shape[1]) + "], got " + std::to_string(view(p)));
      result.push_back(view(p));
    }
  }

  ArrayArgument x_;
  std::vector<ArrayArgument> y_;
  ArrayArgument a_, b_;
  TensorView<const double, 2> weights_[2];
  bool is_cosine_ = false;
  Metric metric_ = Metric::kSqeuclidean;
  std::vector<int64_t> x_lengths_, y_lengths_;
};

class PySinkhorn {
 public:
  PySinkhorn(py::object x, py::object y, py::object a, py::object b, const std::string& metric,
             py::object x_lengths, py::object y_lengths, Real reg, Real reg_marginal_a, Real reg_marginal_b,
             Integer max_iter, Real tol, Flag warm, Integer memory_budget, Integer threads, py::object f,
             py::object g, py::object scalars, py::object iterations)
      : batch_(x, y, a, b, metric, x_lengths, y_lengths),
        f_(f, "f"),
        g_(g, "g"),
        scalars_(scalars, "scalars"),
        iterations_(iterations, "iterations") {
    SinkhornOptions options;
    options.reg = reg.positive("reg");
    options.reg_marginal[0] = reg_marginal_a.positive_or_infinite("reg_marginal_a");
    options.reg_marginal[1] = reg_marginal_b.positive_or_infinite("reg_marginal_b");
    options.max_iter = max_iter.in("max_iter", 1, int64_t{1} << 40);
    options.tol = tol.not_negative("tol");
    options.warm = warm.on("warm");
    options.memory_budget = memory_budget.memory_budget();
    options.threads = threads.threads();
    options.poll = signal_poll();
    dispatch_floating(batch_.x(), [&](auto zero) {
      using T = decltype(zero);
      const SinkhornBatch<T> batch = batch_.batch<T>();
      checked_mul(batch.count(), options.max_iter);  // all problems' iterations are counted together
      f_.require_shape({batch.a.shape[0], batch.a.shape[1]});
      g_.require_shape({batch.b.shape[0], batch.b.shape[1]});
      scalars_.require_shape({4, batch.count()});
      iterations_.require_shape({batch.count()});
      const auto numbers = scalars_.output<double, 2>();
      const auto counts = iterations_.output<int64_t, 1>();
      if (!numbers.is_compact() || !counts.is_compact())
        throw py::value_error("scalars, iterations: expected contiguous arrays");
      SinkhornResult result{f_.output<double, 2>(), g_.output<double, 2>()};
      result.value = numbers.data;
      result.transport_cost = numbers.data + batch.count();
      result.error = numbers.data + 2 * batch.count();
      result.tol = numbers.data + 3 * batch.count();
      result.iterations = counts.data;
      run_ = without_gil([&] { return make_sinkhorn<T>(batch, result, options); });
    });
  }

  int64_t total() const { return run_->total(); }

  int64_t step(Integer iterations_number) {
    const int64_t iterations = iterations_number.in("iterations", 1);
    return one_call_([&] { return run_->step(iterations); });
  }

 private:
  PyBatch batch_;
  ArrayArgument f_, g_, scalars_, iterations_;
  OneCall one_call_;
  std::unique_ptr<Sinkhorn> run_;
};

// The views of potentials that fit the batch.
struct Potentials {
  ArrayArgument f, g;
  Potentials(py::object f_array, py::object g_array) : f(f_array, "f"), g(g_array, "g") {}
  template <class T>
  void require(const SinkhornBatch<T>& batch) const {
    f.require_shape({batch.a.shape[0], batch.a.shape[1]});
    g.require_shape({batch.b.shape[0], batch.b.shape[1]});
  }
};

}  // namespace

void bind_sinkhorn(py::module_& m) {
  py::class_<PySinkhorn>(m, "Sinkhorn", "A batch of entropic optimal transport problems, advanced in steps.",
                         py::module_local())
      .def(py::init<py::object, py::object, py::object, py::object, const std::string&, py::object,
                    py::object, Real, Real, Real, Integer, Real, Flag, Integer, Integer, py::object,
                    py::object, py::object, py::object>(),
           py::arg("x"), py::arg("y"), py::arg("a"), py::arg("b"), py::arg("metric"), py::arg("x_lengths"),
           py::arg("y_lengths"), py::arg("reg"), py::arg("reg_marginal_a"), py::arg("reg_marginal_b"),
           py::arg("max_iter"), py::arg("tol"), py::arg("warm"), py::arg("memory_budget"), py::arg("threads"),
           py::arg("f"), py::arg("g"), py::arg("scalars"), py::arg("iterations"),
           "f [B, n], g [B, m] float64: potentials, written at the end; scalars [4, B] float64: value, "
           "transport cost, error and the error at which the problem is solved; iterations [B] int64.")
      .def("total", &PySinkhorn::total, "The most iterations that all problems together may take.")
      .def("step", &PySinkhorn::step, py::arg("iterations"),
           "Goes on for about so many iterations; returns how many of the total are done or no longer "
           "needed.");
  m.def(
      "sinkhorn_apply",
      [](py::object x, py::object y, py::object a, py::object b, const std::string& metric,
         py::object x_lengths, py::object y_lengths, py::object f, py::object g, Real reg_number,
         py::object v_array, Flag transpose_flag, py::object out_array, Integer threads_number) {
        const double reg = reg_number.positive("reg");
        const bool transpose = transpose_flag.on("transpose");
        const int threads = threads_number.threads();
        const PyBatch arrays(x, y, a, b, metric, x_lengths, y_lengths);
        const Potentials potentials(f, g);
        const ArrayArgument v(v_array, "v"), out(out_array, "out");
        dispatch_floating(arrays.x(), [&](auto zero) {
          using T = decltype(zero);
          const SinkhornBatch<T> batch = arrays.batch<T>();
          potentials.require(batch);
          const int64_t n = batch.a.shape[1], columns = batch.b.shape[1];
          const auto values = v.input<T, 3>();
          const auto result = out.output<T, 3>();
          v.require_shape({batch.count(), transpose ? n : columns, values.shape[2]});
          out.require_shape({batch.count(), transpose ? columns : n, values.shape[2]});
          without_gil([&] {
            sinkhorn_apply<T>(batch, potentials.f.input<double, 2>(), potentials.g.input<double, 2>(), reg,
                              values, transpose, result, threads, signal_poll());
          });
        });
      },
      py::arg("x"), py::arg("y"), py::arg("a"), py::arg("b"), py::arg("metric"), py::arg("x_lengths"),
      py::arg("y_lengths"), py::arg("f"), py::arg("g"), py::arg("reg"), py::arg("v"), py::arg("transpose"),
      py::arg("out"), py::arg("threads") = 1, "out = P v, or P^T v, of the plans with the potentials f, g.");
  m.def(
      "sinkhorn_plan",
      [](py::object x, py::object y, py::object a, py::object b, const std::string& metric,
         py::object x_lengths, py::object y_lengths, py::object f, py::object g, Real reg_number,
         py::object out_array, Integer threads_number) {
        const double reg = reg_number.positive("reg");
        const int threads = threads_number.threads();
        const PyBatch arrays(x, y, a, b, metric, x_lengths, y_lengths);
        const Potentials potentials(f, g);
        const ArrayArgument out(out_array, "out");
        dispatch_floating(arrays.x(), [&](auto zero) {
          using T = decltype(zero);
          const SinkhornBatch<T> batch = arrays.batch<T>();
          potentials.require(batch);
          const auto result = out.output<T, 3>();
          out.require_shape({batch.count(), batch.a.shape[1], batch.b.shape[1]});
          if (!result.has_contiguous_rows())
            throw py::value_error("out: expected rows that are contiguous in memory");
          without_gil([&] {
            sinkhorn_plan<T>(batch, potentials.f.input<double, 2>(), potentials.g.input<double, 2>(), reg,
                             result, threads, signal_poll());
          });
        });
      },
      py::arg("x"), py::arg("y"), py::arg("a"), py::arg("b"), py::arg("metric"), py::arg("x_lengths"),
      py::arg("y_lengths"), py::arg("f"), py::arg("g"), py::arg("reg"), py::arg("out"),
      py::arg("threads") = 1, "out [B, n, m] = the plans with the potentials f, g.");
}

}  // namespace fc
