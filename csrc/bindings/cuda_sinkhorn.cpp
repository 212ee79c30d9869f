// Sinkhorn of the module _cuda.
#include <algorithm>
#include <string>

#include "bindings/boundary.h"
#include "bindings/cuda_module.h"
#include "bindings/sinkhorn.h"
#include "cuda/sinkhorn.h"

namespace fc {
namespace {

// A problem whose arrays are all on one device, each in one piece.
struct DeviceBatch : SinkhornProblem {
  explicit DeviceBatch(py::handle object) : SinkhornProblem(Fields(object, kDevice)) {
    if (count >= kLimit || n >= kLimit || m >= kLimit || count * std::max(n, m) >= kLimit) {
      throw py::value_error("x: expected less than 2^30 rows and columns in all problems together, got " +
                            std::to_string(count) + " problems of " + std::to_string(n) + " by " +
                            std::to_string(m));
    }
  }

  int device() const { return x.device_id(); }

  template <class U, int Rank>
  const U* data(const ArrayArgument& array) const {
    return compact_input<U, Rank>(array, device()).data;
  }
  template <class U, int Rank>
  const U* data(const std::optional<ArrayArgument>& array) const {
    return array ? data<U, Rank>(*array) : nullptr;
  }

  template <class T>
  cuda::SinkhornBatch<T> batch() const {
    cuda::SinkhornBatch<T> result;
    result.x = data<T, 3>(x);
    result.y = data<T, 3>(y);
    result.shared = is_shared();
    result.metric = metric;
    result.batch = count;
    result.n = n;
    result.m = m;
    result.d = y ? x.size(2) : 0;
    result.a = data<double, 2>(a);
    result.b = data<double, 2>(b);
    result.x_lengths = data<int64_t, 1>(x_lengths);
    result.y_lengths = data<int64_t, 1>(y_lengths);
    return result;
  }

 private:
  // Tiles and lines are counted in ints.
  static constexpr int64_t kLimit = 1 << 30;
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

py::tuple sinkhorn(py::object object, py::object f, py::object g, py::object scalars, py::object iterations,
                   Integer shared_bytes, Integer stream) {
  const DeviceBatch problem(object);
  const SinkhornOutput output(f, g, scalars, iterations, kDevice, problem);
  cuda::SinkhornOptions options{problem.settings};
  options.f = problem.data<double, 2>(problem.f);
  options.g = problem.data<double, 2>(problem.g);
  options.shared_bytes = shared_bytes.in("shared_bytes", -1, INT32_MAX);
  options.stream = stream_of(stream);
  const int device = problem.device();
  cuda::SinkhornResult result;
  result.f = compact_output<double, 2>(output.f, device).data;
  result.g = compact_output<double, 2>(output.g, device).data;
  output.set_numbers(result, compact_output<double, 2>(output.scalars, device),
                     compact_output<int64_t, 1>(output.iterations, device));
  cuda::SinkhornVerdict verdict;
  dispatch_floating(problem.x, [&](auto zero) {
    using T = decltype(zero);
    const auto batch = problem.batch<T>();
    const DeviceGuard guard(device);
    without_gil([&] { verdict = cuda::sinkhorn<T>(batch, options, result); });
  });
  return tuple_of(verdict);
}

void sinkhorn_apply(py::object object, py::object v_array, Flag transpose_flag, py::object out_array,
                    Integer stream_number) {
  const bool transpose = transpose_flag.on("transpose");
  const cudaStream_t stream = stream_of(stream_number);
  const DeviceBatch problem(object);
  problem.require_potentials();
  const ArrayArgument v(v_array, "v", kDevice), out(out_array, "out", kDevice);
  const int64_t rows = problem.n, columns = problem.m, k = v.size(2);
  v.require_shape({problem.count, transpose ? rows : columns, k});
  out.require_shape({problem.count, transpose ? columns : rows, k});
  const double *const f = problem.data<double, 2>(problem.f), *const g = problem.data<double, 2>(problem.g),
                      *const factors = problem.data<double, 3>(v);
  double* const result = compact_output<double, 3>(out, problem.device()).data;
  if (k == 0) return;
  dispatch_floating(problem.x, [&](auto zero) {
    using T = decltype(zero);
    const auto batch = problem.batch<T>();
    const DeviceGuard guard(problem.device());
    without_gil([&] {
      cuda::sinkhorn_apply<T>(batch, problem.settings.reg, f, g, factors, k, transpose, result, stream);
    });
  });
}

void sinkhorn_plan(py::object object, py::object out_array, Integer stream_number) {
  const cudaStream_t stream = stream_of(stream_number);
  const DeviceBatch problem(object);
  problem.require_potentials();
  const ArrayArgument out(out_array, "out", kDevice);
  out.require_shape({problem.count, problem.n, problem.m});
  const double *const f = problem.data<double, 2>(problem.f), *const g = problem.data<double, 2>(problem.g);
  double* const result = compact_output<double, 3>(out, problem.device()).data;
  dispatch_floating(problem.x, [&](auto zero) {
    using T = decltype(zero);
    const auto batch = problem.batch<T>();
    const DeviceGuard guard(problem.device());
    without_gil([&] { cuda::sinkhorn_plan<T>(batch, problem.settings.reg, f, g, result, stream); });
  });
}

}  // namespace

void bind_cuda_sinkhorn(py::module_& m) {
  m.def("sinkhorn", &sinkhorn, py::arg("problem"), py::arg("f"), py::arg("g"), py::arg("scalars"),
        py::arg("iterations"), py::arg("shared_bytes"), py::arg("stream"),
        "Writes f, g and a number a problem; waits; returns (what is wrong or None, argument, problem, row, "
        "column).");
  m.def("sinkhorn_apply", &sinkhorn_apply, py::arg("problem"), py::arg("v"), py::arg("transpose"),
        py::arg("out"), py::arg("stream"), "out [batch, n, k] = P v, or [batch, m, k] = P^T v.");
  m.def("sinkhorn_plan", &sinkhorn_plan, py::arg("problem"), py::arg("out"), py::arg("stream"),
        "out [batch, n, m] = P.");
}

}  // namespace fc
