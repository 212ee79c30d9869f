// Fuzzes the Caratheodory reduction: few rows with positive weights, and the total weight of all, or the
// input is refused.
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cpu/caratheodory.h"
#include "input.h"

namespace {

template <class T>
void run(fuzz::Input& in) {
  const int64_t n = 1 + in.below(in.coin() ? 9 : 300), d = 1 + in.below(in.coin() ? 5 : 40);
  const bool any = in.coin(), weighted = in.coin();
  const fuzz::Array<T> x(in, n, d, any, false);
  std::vector<double> weights(weighted ? n : 0);
  for (double& w : weights) w = in.byte() / 16.0;
  if (weighted) weights[0] = 1;
  double total = weighted ? 0 : static_cast<double>(n);
  for (const double w : weights) total += w;
  const int64_t max_size = in.coin() ? in.below(n + 2) : 0;
  const auto w = fc::TensorView<const double, 1>::compact(weights.data(), n);
  fc::ThreadTeam team(static_cast<int>(1 + in.below(2)));
  fc::WeightedRows found;
  try {
    found = fc::caratheodory<T>(x.view, weighted ? &w : nullptr, max_size, team);
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();
    return;
  }
  double sum = 0;
  for (size_t i = 0; i < found.rows.size(); ++i) {
    if (!(found.weights[i] > 0) || found.rows[i] < 0 || found.rows[i] >= n) std::abort();
    if (i > 0 && found.rows[i] <= found.rows[i - 1]) std::abort();
    sum += found.weights[i];
  }
  if (static_cast<int64_t>(found.rows.size()) > std::max(d + 1, max_size)) std::abort();
  if (!(std::fabs(sum - total) <= 1e-12 * total)) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
