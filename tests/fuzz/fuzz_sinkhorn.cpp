// Fuzzes batched Sinkhorn: a run ends within its iterations with an error and a plan that are >= 0, the same
// however it is cut into steps, or the input is refused.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cpu/sinkhorn.h"
#include "input.h"

namespace {

struct Found {
  std::vector<double> f, g, scalars;
  std::vector<int64_t> iterations;
};

template <class T>
Found solve(const fc::SinkhornBatch<T>& batch, const fc::SinkhornOptions& options, const Found& start,
            int64_t part) {
  Found found = start;
  const int64_t count = batch.count();
  fc::SinkhornResult result{fc::TensorView<double, 2>::compact(found.f.data(), count, batch.a.cols()),
                            fc::TensorView<double, 2>::compact(found.g.data(), count, batch.b.cols())};
  result.value = found.scalars.data();
  result.transport_cost = found.scalars.data() + count;
  result.error = found.scalars.data() + 2 * count;
  result.tol = found.scalars.data() + 3 * count;
  result.iterations = found.iterations.data();
  const auto run = fc::make_sinkhorn<T>(batch, result, options);
  int64_t done = 0;
  for (int64_t turns = 0; done < run->total(); ++turns) {
    if (turns > count * (options.max_iter + 1)) std::abort();  // each step has to go on
    done = run->step(part);
  }
  return found;
}

std::vector<double> weights(fuzz::Input& in, int64_t count, int64_t n) {
  std::vector<double> w(count * n);
  for (int64_t p = 0; p < count; ++p) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += w[p * n + i] = i == 0 ? 1 : in.byte() % 4;
    for (int64_t i = 0; i < n; ++i) w[p * n + i] /= sum;
  }
  return w;
}

template <class T>
void run(fuzz::Input& in) {
  const int64_t count = 1 + in.below(3), n = 1 + in.below(in.coin() ? 4 : 40), m = 1 + in.below(20),
                d = 1 + in.below(5);
  const bool any = in.coin(), costs = in.coin(), relaxed = in.coin();
  const std::vector<T> x = in.numbers<T>(count * n * (costs ? m : d), any),
                       y = in.numbers<T>(costs ? 0 : count * m * d, any);
  const std::vector<double> a = weights(in, count, n), b = weights(in, count, m);
  fc::SinkhornBatch<T> batch;
  batch.x = fc::TensorView<const T, 3>::compact(x.data(), count, n, costs ? m : d);
  if (!costs) batch.y = fc::TensorView<const T, 3>::compact(y.data(), count, m, d);
  batch.is_cost = costs;
  batch.cosine = in.coin();
  batch.metric = batch.cosine ? fc::Metric::kCosine : static_cast<fc::Metric>(2 + in.below(3));
  batch.a = fc::TensorView<const double, 2>::compact(a.data(), count, n);
  batch.b = fc::TensorView<const double, 2>::compact(b.data(), count, m);
  fc::SinkhornOptions options;
  options.reg = std::ldexp(1.0, static_cast<int>(in.below(any ? 200 : 12)) - (any ? 100 : 6));
  if (relaxed)
    (in.byte() % 2 == 0 ? options.rho_a : options.rho_b) =
        std::ldexp(1.0, static_cast<int>(in.below(40)) - 20);
  options.max_iter = 1 + in.below(30);
  options.tol = in.coin() ? 0 : 1e-4;
  options.memory_budget = in.coin() ? 0 : 1 << 20;
  options.threads = static_cast<int>(1 + in.below(3));
  Found start{std::vector<double>(count * n), std::vector<double>(count * m), std::vector<double>(4 * count),
              std::vector<int64_t>(count)};
  const bool warm = in.coin();
  // Few iterations from potentials that are large beside rho leave masses exp(-g / rho) beyond all numbers,
  // which the public function refuses.
  const bool may_overflow = any || (warm && relaxed);
  for (double& f : start.f) f = warm ? in.number<double>(any) : 0;
  for (double& g : start.g) g = warm ? in.number<double>(any) : 0;
  options.l2 = in.coin();
  if (warm) {
    options.f =
        fc::TensorView<const double, 2>::compact(static_cast<const double*>(start.f.data()), count, n);
    options.g =
        fc::TensorView<const double, 2>::compact(static_cast<const double*>(start.g.data()), count, m);
  }
  Found found;
  try {
    found = solve<T>(batch, options, start, 1 + in.below(7));
    const Found whole = solve<T>(batch, options, start, count * options.max_iter);
    if (std::memcmp(found.f.data(), whole.f.data(), sizeof(double) * found.f.size()) != 0 ||
        found.iterations != whole.iterations) {
      std::abort();
    }
    std::vector<T> plan(count * n * m);
    fc::sinkhorn_plan<T>(batch, fc::TensorView<const double, 2>::compact(found.f.data(), count, n),
                         fc::TensorView<const double, 2>::compact(found.g.data(), count, m), options.reg,
                         fc::TensorView<T, 3>::compact(plan.data(), count, n, m), options.threads, nullptr);
    for (const T mass : plan) {
      if (!may_overflow && !(mass >= 0 && std::isfinite(mass))) std::abort();
    }
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    if (found.iterations[p] < 0 || found.iterations[p] > options.max_iter) std::abort();
    if (!may_overflow && !(found.scalars[2 * count + p] >= 0 && std::isfinite(found.scalars[p])))
      std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
