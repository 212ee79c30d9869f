// Python's view of matching pursuit and Frank-Wolfe.
#include "cpu/pursuit.h"

#include <memory>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/fields.h"
#include "cpu/active_set.h"

namespace fc {
namespace {

// Runs solve(g view, target, k, budget, team) on a problem as flashcoreset.pursuit.problem has it, and writes
// its result into the arrays, whose length is k; returns the numbers of rows and of steps.
template <class Solve>
py::tuple pursue(const Fields& problem, const py::object& indices_array, const py::object& weights_array,
                 const py::object& norms_array, Integer threads_number, Solve&& solve) {
  const int threads = threads_number.threads();
  const int64_t budget = problem.integer("memory_budget").memory_budget();
  const ArrayArgument g = problem.array("g"), target = problem.array("target"),
                      indices(indices_array, "indices"), weights(weights_array, "weights"),
                      norms(norms_array, "residual_norms");
  std::pair<int64_t, int64_t> counts;
  dispatch_floating(g, [&](auto zero) {
    using X = decltype(zero);
    const auto rows = g.input<X, 2>();
    const auto b = target.input<double, 1>();
    const auto i = indices.output<int64_t, 1>();
    const auto w = weights.output<double, 1>(), r = norms.output<double, 1>();
    target.require_shape({rows.cols()});
    weights.require_shape({i.shape[0]});
    norms.require_shape({i.shape[0]});
    if (!rows.has_contiguous_rows() || !b.is_compact()) {
      throw py::value_error("g, target: expected rows that are contiguous in memory; pass a contiguous copy");
    }
    if (rows.rows() == 0 || rows.cols() == 0 || i.shape[0] < 1) {
      throw py::value_error("g, indices: expected at least 1 row, 1 column and room for 1 index");
    }
    const PursuitResult found = without_gil([&] {
      ThreadTeam team(threads, signal_poll());
      return solve(rows, b.data, i.shape[0], budget, team);
    });
    counts = {static_cast<int64_t>(found.indices.size()), static_cast<int64_t>(found.residual_norms.size())};
    for (int64_t p = 0; p < counts.first; ++p) {
      i(p) = found.indices[p];
      w(p) = found.weights[p];
    }
    for (int64_t p = 0; p < counts.second; ++p) r(p) = found.residual_norms[p];
  });
  return py::make_tuple(counts.first, counts.second);
}

// The fit of the weights for backends whose kernels find the picks.
class PyActiveSet {
 public:
  PyActiveSet(Flag nonnegative, Real ridge, Real target_norm)
      : set_(nonnegative.on("nonnegative"), ridge.not_negative("ridge"),
             target_norm.not_negative("target_norm")) {}

  bool add(py::object products_array, Real correlation) {
    const ArrayArgument products(products_array, "products");
    const auto values = products.input<double, 1>();
    products.require_shape({set_.size() + 1});
    std::vector<double> copy(values.shape[0]);
    for (int64_t p = 0; p < values.shape[0]; ++p) copy[p] = values(p);
    return set_.add(std::move(copy), correlation.finite("correlation"));
  }

  void weights(py::object out_array) const {
    const ArrayArgument out(out_array, "out");
    const auto values = out.output<double, 1>();
    out.require_shape({set_.size()});
    for (int64_t p = 0; p < values.shape[0]; ++p) values(p) = set_.weights()[p];
  }

  double noise() const { return ActiveSet::kNoise * set_.scale(); }
  double squared_residual() const { return set_.squared_residual(); }

 private:
  ActiveSet set_;
};

}  // namespace

void bind_pursuit(py::module_& m) {
  py::class_<PyActiveSet>(m, "ActiveSet", py::module_local(),
                          "Least squares, non-negative or not, over rows that come one by one.")
      .def(py::init<Flag, Real, Real>(), py::arg("nonnegative"), py::arg("ridge"), py::arg("target_norm"))
      .def("add", &PyActiveSet::add, py::arg("products"), py::arg("correlation"),
           "Takes in a row with its products [p + 1] with the rows so far and itself, and with the target; "
           "False for one that depends on them.")
      .def("weights", &PyActiveSet::weights, py::arg("out"), "Writes the weights [p] so far.")
      .def_property_readonly("noise", &PyActiveSet::noise,
                             "Correlations of at most this times |g_j| are rounding errors.")
      .def_property_readonly("squared_residual", &PyActiveSet::squared_residual,
                             "|target - sum_i w_i g_i|^2, which cancels where little is left.");
  m.def(
      "orthogonal_matching_pursuit",
      [](py::object object, py::object indices, py::object weights, py::object residual_norms,
         Integer threads) {
        const Fields problem(object);
        MatchingPursuit options;
        options.nonnegative = problem.flag("nonnegative").on("nonnegative");
        options.ridge = problem.real("ridge").not_negative("ridge");
        return pursue(problem, indices, weights, residual_norms, threads,
                      [&](const auto& rows, const double* b, int64_t k, int64_t budget, ThreadTeam& team) {
                        options.k = k;
                        options.memory_budget = budget;
                        return orthogonal_matching_pursuit(rows, b, options, team);
                      });
      },
      py::arg("problem"), py::arg("indices"), py::arg("weights"), py::arg("residual_norms"),
      py::arg("threads") = 1,
      "Writes up to k = len(indices) rows of g [B, D] and their float64 weights, and the residual's norm "
      "after each step; returns the numbers of rows and steps.");
  m.def(
      "frank_wolfe",
      [](py::object problem, py::object indices, py::object weights, py::object residual_norms,
         Integer threads) {
        return pursue(Fields(problem), indices, weights, residual_norms, threads,
                      [&](const auto& rows, const double* b, int64_t k, int64_t budget, ThreadTeam& team) {
                        return frank_wolfe(rows, b, k, budget, team);
                      });
      },
      py::arg("problem"), py::arg("indices"), py::arg("weights"), py::arg("residual_norms"),
      py::arg("threads") = 1, "The same by Frank-Wolfe, in k = len(indices) steps.");
}

}  // namespace fc
