// Fuzzes pairwise distances: any shapes, layouts, values and threads either work or throw a documented
// exception.
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cpu/pairwise.h"
#include "input.h"

namespace {

template <class T>
void run(fuzz::Input& in) {
  const auto metric = static_cast<fc::Metric>(in.below(5));
  const int64_t n = in.below(40), m = in.below(40), d = in.below(20);
  const bool any = in.coin(), symmetric = in.coin();
  fc::ThreadTeam team(static_cast<int>(1 + in.below(3)));
  const fuzz::Array<T> x(in, n, d, any, false);
  const fuzz::Array<T> y(in, symmetric ? 0 : m, d, any, false);
  const auto columns = symmetric ? x.view : y.view;
  std::vector<T> out(n * columns.rows());
  const auto result = fc::TensorView<T, 2>::compact(out.data(), n, columns.rows());
  try {
    fc::pairwise<T>(x.view, columns, metric, symmetric, result, team);
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();  // finite numbers are accepted
    return;
  }
  for (const T value : out) {
    if (!any && value - value != 0) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
