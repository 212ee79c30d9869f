// Python's view of batched Sinkhorn.
#include "bindings/sinkhorn.h"

#include <memory>
#include <string>
#include <vector>

#include "bindings/boundary.h"
#include "bindings/run.h"
#include "cpu/sinkhorn.h"

namespace fc {
namespace {

// A problem whose sizes are known, and the batch as the kernels see it.
struct PyBatch : SinkhornProblem {
  explicit PyBatch(py::handle object)
      : SinkhornProblem(Fields(object)), rows_(sizes(x_lengths, n)), columns_(sizes(y_lengths, m)) {}

  template <class T>
  SinkhornBatch<T> batch() const {
    SinkhornBatch<T> result;
    result.x = x.input<T, 3>();
    result.shared = is_shared();
    if (result.shared) {
      result.x.shape[0] = count;
      result.x.stride[0] = 0;
    }
    if (y) result.y = y->input<T, 3>();
    result.is_cost = is_cost();
    result.cosine = metric == Metric::kCosine;
    result.metric = metric;
    result.a = a.input<double, 2>();
    result.b = b.input<double, 2>();
    result.x_lengths = x_lengths ? rows_.data() : nullptr;
    result.y_lengths = y_lengths ? columns_.data() : nullptr;
    return result;
  }

 private:
  std::vector<int64_t> sizes(const std::optional<ArrayArgument>& lengths, int64_t most) const {
    std::vector<int64_t> result;
    if (!lengths) return result;
    const auto view = lengths->input<int64_t, 1>();
    for (int64_t p = 0; p < count; ++p) {
      if (view(p) < 1 || view(p) > most)
        throw py::value_error(std::string(lengths->name()) + ": expected sizes in [1, " +
                              std::to_string(most) + "], got " + std::to_string(view(p)));
      result.push_back(view(p));
    }
    return result;
  }

  std::vector<int64_t> rows_, columns_;
};

class PySinkhorn {
 public:
  PySinkhorn(py::object problem, py::object f, py::object g, py::object scalars, py::object iterations,
             Integer threads)
      : problem_(problem), output_(f, g, scalars, iterations, dlpack::kCpu, problem_) {
    SinkhornOptions options{problem_.settings};
    options.memory_budget = problem_.memory_budget;
    options.threads = threads.threads();
    options.poll = signal_poll();
    if (problem_.f) {
      options.f = problem_.f->input<double, 2>();
      options.g = problem_.g->input<double, 2>();
    }
    checked_mul(problem_.count, options.max_iter);  // all problems' iterations are counted together
    SinkhornResult result{output_.f.output<double, 2>(), output_.g.output<double, 2>()};
    output_.set_numbers(result, output_.scalars.output<double, 2>(), output_.iterations.output<int64_t, 1>());
    dispatch_floating(problem_.x, [&](auto zero) {
      using T = decltype(zero);
      const SinkhornBatch<T> batch = problem_.batch<T>();
      run_ = without_gil([&] { return make_sinkhorn<T>(batch, result, options); });
    });
  }

  int64_t total() const { return run_->total(); }

  int64_t step(Integer iterations_number) {
    const int64_t iterations = iterations_number.in("iterations", 1);
    return one_call_([&] { return run_->step(iterations); });
  }

 private:
  const PyBatch problem_;
  const SinkhornOutput output_;
  OneCall one_call_;
  std::unique_ptr<Sinkhorn> run_;
};

void apply(py::object problem, py::object v_array, Flag transpose_flag, py::object out_array,
           Integer threads_number) {
  const bool transpose = transpose_flag.on("transpose");
  const int threads = threads_number.threads();
  const PyBatch arrays(problem);
  arrays.require_potentials();
  const ArrayArgument v(v_array, "v"), out(out_array, "out");
  const int64_t rows = arrays.n, columns = arrays.m, k = v.size(2);
  v.require_shape({arrays.count, transpose ? rows : columns, k});
  out.require_shape({arrays.count, transpose ? columns : rows, k});
  dispatch_floating(arrays.x, [&](auto zero) {
    using T = decltype(zero);
    const SinkhornBatch<T> batch = arrays.batch<T>();
    const auto f = arrays.f->input<double, 2>(), g = arrays.g->input<double, 2>();
    const auto values = v.input<T, 3>();
    const auto result = out.output<T, 3>();
    without_gil([&] {
      sinkhorn_apply<T>(batch, f, g, arrays.settings.reg, values, transpose, result, threads, signal_poll());
    });
  });
}

void plan(py::object problem, py::object out_array, Integer threads_number) {
  const int threads = threads_number.threads();
  const PyBatch arrays(problem);
  arrays.require_potentials();
  const ArrayArgument out(out_array, "out");
  out.require_shape({arrays.count, arrays.n, arrays.m});
  dispatch_floating(arrays.x, [&](auto zero) {
    using T = decltype(zero);
    const SinkhornBatch<T> batch = arrays.batch<T>();
    const auto f = arrays.f->input<double, 2>(), g = arrays.g->input<double, 2>();
    const auto result = out.output<T, 3>();
    if (!result.has_contiguous_rows())
      throw py::value_error("out: expected rows that are contiguous in memory");
    without_gil([&] { sinkhorn_plan<T>(batch, f, g, arrays.settings.reg, result, threads, signal_poll()); });
  });
}

}  // namespace

void bind_sinkhorn(py::module_& m) {
  py::class_<PySinkhorn>(m, "Sinkhorn", "A batch of entropic optimal transport problems, advanced in steps.",
                         py::module_local())
      .def(py::init<py::object, py::object, py::object, py::object, py::object, Integer>(),
           py::arg("problem"), py::arg("f"), py::arg("g"), py::arg("scalars"), py::arg("iterations"),
           py::arg("threads"),
           "f [B, n], g [B, m] float64: potentials, written at the end; scalars [4, B] float64: value, "
           "transport cost, error and the error at which the problem is solved; iterations [B] int64.")
      .def("total", &PySinkhorn::total, "The most iterations that all problems together may take.")
      .def("step", &PySinkhorn::step, py::arg("iterations"),
           "Goes on for about so many iterations; returns how many of the total are done or no longer "
           "needed.");
  m.def("sinkhorn_apply", &apply, py::arg("problem"), py::arg("v"), py::arg("transpose"), py::arg("out"),
        py::arg("threads"), "out = P v, or P^T v, of the plans with the problem's potentials.");
  m.def("sinkhorn_plan", &plan, py::arg("problem"), py::arg("out"), py::arg("threads"),
        "out [B, n, m] = the plans with the problem's potentials.");
}

}  // namespace fc
