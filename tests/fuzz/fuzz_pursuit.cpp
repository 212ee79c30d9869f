// Fuzzes matching pursuit and Frank-Wolfe: rows are distinct, weights finite and of the right sign, norms no
// larger than the target's, or the input is refused.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cpu/pursuit.h"
#include "input.h"

namespace {

void check(const fc::PursuitResult& found, int64_t n, int64_t k, bool nonnegative) {
  std::vector<int64_t> rows = found.indices;
  std::sort(rows.begin(), rows.end());
  bool ok = std::adjacent_find(rows.begin(), rows.end()) == rows.end() &&
            static_cast<int64_t>(found.residual_norms.size()) <= k &&
            found.indices.size() <= found.residual_norms.size() &&
            found.indices.size() == found.weights.size();
  for (const int64_t row : rows) ok = ok && row >= 0 && row < n;
  for (const double weight : found.weights) {
    ok = ok && std::isfinite(weight) && weight != 0 && (weight > 0 || !nonnegative);
  }
  for (const double norm : found.residual_norms) ok = ok && norm >= 0 && std::isfinite(norm);
  if (!ok) std::abort();
}

template <class X>
void run(fuzz::Input& in) {
  const int64_t n = 1 + in.below(in.coin() ? 9 : 60), d = 1 + in.below(in.coin() ? 5 : 40);
  const bool any = in.coin(), nonnegative = in.coin();
  fc::MatchingPursuit options;
  options.k = 1 + in.below(n);
  options.nonnegative = nonnegative;
  options.ridge = in.coin() ? 0.0 : in.byte() / 16.0;
  options.memory_budget = in.coin() ? 1 << 20 : 8 * n * in.below(8);
  const fuzz::Array<X> g(in, n, d, any, true);
  std::vector<double> target(d);
  for (double& value : target) value = in.number<double>(any);
  fc::ThreadTeam team(static_cast<int>(1 + in.below(2)));
  try {
    check(fc::orthogonal_matching_pursuit<X>(g.view, target.data(), options, team), n, options.k,
          nonnegative);
    check(fc::frank_wolfe<X>(g.view, target.data(), options.k, options.memory_budget, team), n, options.k,
          true);
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
