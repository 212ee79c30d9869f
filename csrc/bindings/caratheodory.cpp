// Python's view of the Caratheodory reduction.
#include "cpu/caratheodory.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "bindings/run.h"

namespace fc {
namespace {

// Writes the rows and weights found to the first entries of the outputs.
int64_t write(const WeightedRows& found, const TensorView<int64_t, 1>& rows,
              const TensorView<double, 1>& weights) {
  const int64_t count = static_cast<int64_t>(found.rows.size());
  for (int64_t i = 0; i < count; ++i) {
    rows(i) = found.rows[i];
    weights(i) = found.weights[i];
  }
  return count;
}

// A reduction whose rows are elsewhere.
class PyReduction {
 public:
  PyReduction(py::object centre_array, Real shrink) : moments_(0) {
    const ArrayArgument centre(centre_array, "centre");
    const auto values = centre.input<double, 1>();
    moments_ = Moments(values.size());
    for (int64_t j = 0; j < moments_.d(); ++j) moments_.centre[j] = values(j);
    moments_.shrink = shrink.positive("shrink");
    if (moments_.d() == 0) throw py::value_error("centre: expected at least 1 number");
  }

  const Moments& moments() const { return moments_; }
  int64_t most_runs() const { return moments_.most_runs(); }

  void centre(py::object out_array) const {
    const ArrayArgument out(out_array, "out");
    const auto result = out.output<double, 1>();
    out.require_shape({moments_.d()});
    for (int64_t j = 0; j < moments_.d(); ++j) result(j) = moments_.centre[j];
  }

  bool take_total(py::object sums_array) {
    const ArrayArgument sums(sums_array, "sums");
    return fc::take_total(moments_, runs_of(sums));
  }

  bool move_to_mean(py::object sums_array) {
    const ArrayArgument sums(sums_array, "sums");
    runs_of(sums);
    require_total();
    return fc::move_to_mean(moments_, sums.output<double, 2>());
  }

  void factors(py::object sums_array, py::object out_array, Integer threads_number) const {
    const int threads = threads_number.threads();
    const ArrayArgument sums(sums_array, "sums"), out(out_array, "out");
    const auto runs = runs_of(sums);
    const auto result = out.output<double, 1>();
    out.require_shape({runs.rows()});
    require_total();
    const std::vector<double> found = without_gil([&] {
      ThreadTeam team(threads, signal_poll());
      return factors_of_runs(moments_, runs, team);
    });
    for (int64_t c = 0; c < runs.rows(); ++c) result(c) = found[c];
  }

  int64_t rest(py::object x_array, py::object weights_array, py::object indices_array,
               py::object new_weights_array, Integer threads_number) const {
    const int threads = threads_number.threads();
    const ArrayArgument x(x_array, "x"), weights(weights_array, "weights"), indices(indices_array, "indices"),
        new_weights(new_weights_array, "new_weights");
    const auto rows = indices.output<int64_t, 1>();
    const auto out_weights = new_weights.output<double, 1>();
    require_total();
    return dispatch_real(x, [&](auto zero) {
      using X = decltype(zero);
      const auto points = x.input<X, 2>();
      x.require_shape({points.rows(), moments_.d()});
      const auto w = positive(weights, points.rows());
      indices.require_shape({std::min(points.rows(), moments_.d() + 1)});
      new_weights.require_shape({rows.shape[0]});
      return write(without_gil([&] {
                     ThreadTeam team(threads, signal_poll());
                     return reduce_rest<X>(moments_, points, w, team);
                   }),
                   rows, out_weights);
    });
  }

  void correct(py::object x_array, py::object weights_array, py::object sums_array,
               Integer threads_number) const {
    const int threads = threads_number.threads();
    const ArrayArgument x(x_array, "x"), weights(weights_array, "weights"), sums(sums_array, "sums");
    const auto w = weights.output<double, 1>();
    const auto all = sums.input<double, 1>();
    sums.require_shape({1 + moments_.d()});
    require_total();
    dispatch_real(x, [&](auto zero) {
      using X = decltype(zero);
      const auto points = x.input<X, 2>();
      x.require_shape({points.rows(), moments_.d()});
      positive(weights, points.rows());
      without_gil([&] {
        ThreadTeam team(threads, signal_poll());
        correct_weights<X>(moments_, points, w, all, team);
      });
    });
  }

  void require_total() const {
    if (!(moments_.target[0] > 0)) throw py::value_error("sums: expected a total weight > 0 first");
  }

  // Weights [n] > 0.
  static TensorView<const double, 1> positive(ArrayArgument&& weights, int64_t n) = delete;
  static TensorView<const double, 1> positive(const ArrayArgument& weights, int64_t n) {
    const auto w = weights.input<double, 1>();
    weights.require_shape({n});
    bool any = false;
    for (int64_t i = 0; i < n; ++i) {
      if (!(w(i) >= 0 && w(i) < std::numeric_limits<double>::infinity())) {
        throw py::value_error("weights: expected finite numbers >= 0");
      }
      any = any || w(i) > 0;
    }
    if (!any) throw py::value_error("weights: expected one that is > 0");
    return w;
  }

 private:
  TensorView<const double, 2> runs_of(const ArrayArgument& sums) const {
    const auto view = sums.input<double, 2>();
    sums.require_shape({view.rows(), 1 + moments_.d()});
    if (view.rows() < 1) throw py::value_error("sums: expected at least 1 run");
    if (!view.has_contiguous_rows())
      throw py::value_error("sums: expected rows that are contiguous in memory");
    return view;
  }

  Moments moments_;
};

// The rows of a max_size, piece by piece.
class PySampler {
 public:
  PySampler(const PyReduction& reduction, py::object weights_array, Integer goal_number, Integer threads)
      : weights_(weights_array, "weights"),
        d_(reduction.moments().d()),
        team_(threads.threads(), signal_poll()) {
    const int64_t goal = goal_number.in("goal", 1);
    const auto w = weights_.output<double, 1>();
    count_ = w.size();
    for (int64_t i = 0; i < count_; ++i) {
      if (!(w(i) > 0 && w(i) < std::numeric_limits<double>::infinity())) {
        throw py::value_error("weights: expected finite numbers > 0");
      }
    }
    reduction.require_total();
    moments_ = std::make_unique<Moments>(reduction.moments());
    sampler_ = std::make_unique<Sampler>(*moments_, w, goal, team_);
  }

  bool push(py::object x_array) {
    const ArrayArgument x(x_array, "x");
    dispatch_real(x, [&](auto zero) {
      using X = decltype(zero);
      const auto points = x.input<X, 2>();
      x.require_shape({points.rows(), d_});
      if (pushed_ + points.rows() > count_) throw py::value_error("x: expected no more rows than weights");
      alone([&] { sampler_->push<X>(points); });
      pushed_ += points.rows();
    });
    return !sampler_->done();
  }

  void finish() {
    alone([&] { sampler_->finish(); });
  }

 private:
  // Runs fn without the GIL: two at a time would spoil each other's state, as would going on after Ctrl-C.
  template <class Fn>
  void alone(const Fn& fn) {
    one_call_([&] {
      if (interrupted_) throw std::runtime_error("this run was interrupted; start another");
      interrupted_ = true;
      fn();
      interrupted_ = false;
    });
  }

  ArrayArgument weights_;
  int64_t d_, count_ = 0, pushed_ = 0;
  OneCall one_call_;
  bool interrupted_ = false;
  ThreadTeam team_;
  std::unique_ptr<Moments> moments_;
  std::unique_ptr<Sampler> sampler_;
};

}  // namespace

void bind_caratheodory(py::module_& m) {
  m.def(
      "caratheodory",
      [](py::object object, py::object indices_array, py::object new_weights_array, Integer threads_number) {
        const Fields problem(object);
        const int64_t max_size = problem.integer("max_size").in("max_size", 0);
        const bool one_scale = problem.flag("one_scale").on("one_scale");
        const int threads = threads_number.threads();
        const ArrayArgument x = problem.array("x"), indices(indices_array, "indices"),
                            new_weights(new_weights_array, "new_weights");
        const std::optional<ArrayArgument> given = problem.optional_array("weights");
        const auto out = indices.output<int64_t, 1>();
        const auto out_weights = new_weights.output<double, 1>();
        int64_t count = 0;
        dispatch_real(x, [&](auto zero) {
          using X = decltype(zero);
          const auto points = x.input<X, 2>();
          const int64_t n = points.shape[0], d = points.shape[1];
          if (n == 0 || d == 0) throw py::value_error("x: expected at least 1 row and 1 column");
          indices.require_shape({std::min(n, std::max(d + 1, max_size))});
          new_weights.require_shape({out.shape[0]});
          TensorView<const double, 1> weights{};
          if (given) weights = PyReduction::positive(*given, n);
          const WeightedRows found = without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            return caratheodory<X>(points, weights.data ? &weights : nullptr, max_size, team, one_scale);
          });
          count = write(found, out, out_weights);
        });
        return count;
      },
      py::arg("problem"), py::arg("indices"), py::arg("new_weights"), py::arg("threads") = 1,
      "Writes at most rank + 1 rows of x [n, d] with the weighted mean and total weight of all into indices "
      "and new_weights [min(n, max(d + 1, max_size))] and returns their number; with max_size > 0 it stops "
      "as soon as at most that many are left. one_scale: what is small beside the largest of all numbers is "
      "rounding.");
  py::class_<PyReduction>(
      m, "CaratheodoryReduction", py::module_local(),
      "A reduction whose rows are elsewhere. Sums [runs, 1 + d] come from there: of w (1, "
      "shrink * x - centre) over neighbouring rows, at most most_runs of them.")
      .def(py::init<py::object, Real>(), py::arg("centre"), py::arg("shrink"))
      .def_property_readonly("most_runs", &PyReduction::most_runs)
      .def("centre", &PyReduction::centre, py::arg("out"), "Writes the centre [d].")
      .def("take_total", &PyReduction::take_total, py::arg("sums"),
           "Makes the sum of all rows' sums what has to be kept; whether none is so large that later ones "
           "may overflow.")
      .def(
          "move_to_mean", &PyReduction::move_to_mean, py::arg("sums"),
          "Makes the mean the centre and moves sums along, if it can: where not, they have to be taken anew.")
      .def("factors", &PyReduction::factors, py::arg("sums"), py::arg("out"), py::arg("threads") = 1,
           "Writes the factors [runs] of a round.")
      .def("rest", &PyReduction::rest, py::arg("x"), py::arg("weights"), py::arg("indices"),
           py::arg("new_weights"), py::arg("threads") = 1,
           "Reduces the rows that are left to the end; outputs [min(n, d + 1)]; returns their number.")
      .def("correct", &PyReduction::correct, py::arg("x"), py::arg("weights"), py::arg("sums"),
           py::arg("threads") = 1,
           "Adds to weights [k] of rows x [k, d] what the sums [1 + d] of all that are left are short of.");
  py::class_<PySampler>(m, "CaratheodorySampler", py::module_local(),
                        "Brings weights [n] to 0 until at most `goal` are not, given their rows in pieces.")
      .def(py::init<const PyReduction&, py::object, Integer, Integer>(), py::arg("reduction"),
           py::arg("weights"), py::arg("goal"), py::arg("threads") = 1)
      .def("push", &PySampler::push, py::arg("x"), "The next rows; whether more are wanted.")
      .def("finish", &PySampler::finish, "After the last rows.");
}

}  // namespace fc
