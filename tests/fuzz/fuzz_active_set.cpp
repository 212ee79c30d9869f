// Fuzzes the least-squares problem inside matching pursuit with products that need not be those of any rows:
// the fit ends, with weights that are finite and, if the numbers are those of rows, of the right sign.
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cpu/active_set.h"
#include "input.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  const bool any = in.coin(), nonnegative = in.coin();
  const int64_t picks = 1 + in.below(12), d = 1 + in.below(16);
  const double ridge = in.coin() ? 0.0 : in.byte() / 16.0;
  const std::vector<double> rows = in.numbers<double>(picks * d, false),
                            target = in.numbers<double>(d, false);
  fc::ActiveSet set(nonnegative, ridge,
                    any ? in.number<double>(true) : std::sqrt(fc::dot(target.data(), target.data(), d)));
  std::vector<int64_t> added;
  for (int64_t p = 0; p < picks; ++p) {
    std::vector<double> products(set.size() + 1);
    for (size_t q = 0; q < products.size(); ++q) {
      const double* const other = &rows[(q + 1 < products.size() ? added[q] : p) * d];
      products[q] = any ? in.number<double>(true) : fc::dot(&rows[p * d], other, d);
    }
    const double correlation = any ? in.number<double>(true) : fc::dot(&rows[p * d], target.data(), d);
    try {
      if (set.add(products, correlation)) added.push_back(p);
    } catch (const std::invalid_argument&) {
      if (!any) std::abort();
      return 0;
    }
    if (static_cast<int64_t>(added.size()) != set.size()) std::abort();
    for (const double weight : set.weights()) {
      if (!any && !(std::isfinite(weight) && (weight >= 0 || !nonnegative))) std::abort();
    }
    if (!any && !(set.squared_residual() >= -1e-6 * (1 + fc::dot(target.data(), target.data(), d)))) {
      std::abort();
    }
  }
  return 0;
}
