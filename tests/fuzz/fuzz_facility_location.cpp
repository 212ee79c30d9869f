// Fuzzes greedy runs from points, matrices and sparse rows (with pointers and columns that may lie): for any
// input, a run either throws a documented exception or makes distinct picks whose gains never rise.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../cpp/greedy_oracle.h"
#include "cpu/facility_location.h"
#include "input.h"

namespace {

double gain_of_last(fc::FacilityLocation& run) {
  const int64_t k = run.picks();
  std::vector<int64_t> indices(k), assignment(run.clients());
  std::vector<double> gains(k), weights(k);
  run.finish(indices.data(), gains.data(), weights.data(), assignment.data());
  return gains.back();
}

void drive(fuzz::Input& in, fc::FacilityLocation& run, bool greedy) {
  const int64_t n = run.candidates();
  for (int64_t turn = 0; turn < 6; ++turn) {
    const int what = in.byte() % 8;
    if (what == 2) {
      const int64_t closed[] = {in.below(n), in.below(n)};
      run.close(closed, 2);
    } else if (what == 3) {
      const double stop = static_cast<double>(in.byte()) / 4;
      const bool open = run.pick(in.coin(), stop) >= 0;
      if (open && !(gain_of_last(run) >= stop)) std::abort();
    } else if (what < 2) {
      std::vector<int64_t> open;
      for (int64_t j = 0; j < n; ++j) {
        if (run.is_open(j) && in.coin()) open.push_back(j);
      }
      if (open.empty()) continue;
      greedy = false;
      run.step_among(open.data(), static_cast<int64_t>(open.size()));
    } else {
      run.step(in.below(12), in.coin());
    }
  }
  const int64_t k = run.picks(), m = run.clients();
  std::vector<int64_t> indices(k), assignment(m);
  std::vector<double> gains(k), weights(k);
  run.finish(indices.data(), gains.data(), weights.data(), assignment.data());
  for (int64_t p = 1; p < k; ++p) {
    if (greedy && gains[p] > gains[p - 1]) std::abort();
  }
  for (const int64_t owner : assignment) {
    if (owner < -1 || owner >= k) std::abort();
  }
  std::sort(indices.begin(), indices.end());
  for (int64_t p = 0; p < k; ++p) {
    if (indices[p] < 0 || indices[p] >= n || (p > 0 && indices[p] == indices[p - 1])) std::abort();
  }
}

template <class T>
void run(fuzz::Input& in) {
  const int64_t n = 1 + in.below(40), m = 1 + in.below(40), d = 1 + in.below(12);
  const int64_t kind = in.below(8);
  const bool any = in.coin(), self = in.coin();
  const int64_t clients = self ? n : m;
  std::vector<double> weights, costs;
  std::vector<int64_t> preselected;
  if (in.coin()) {
    for (int64_t i = 0; i < clients; ++i) weights.push_back(static_cast<double>(in.byte()) / 8);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (in.byte() % 16 == 0) preselected.push_back(j);
  }
  if (in.byte() % 4 == 0) {
    for (int64_t j = 0; j < n; ++j) costs.push_back(1 + static_cast<double>(in.byte()));
  }
  fc::GreedyOptions options = oracle::options_of(weights, preselected);
  options.costs = costs.empty() ? nullptr : costs.data();
  options.threads = static_cast<int>(1 + in.below(3));
  options.memory_budget = in.coin() ? in.below(20000) : int64_t{1} << 30;
  options.self_clients = self;
  options.offset = 1 + static_cast<double>(in.byte());
  try {
    if (kind < 5) {
      const fuzz::Array<T> x(in, n, d, any, false), y(in, self ? 0 : m, d, any, false);
      drive(in,
            *fc::facility_location_points<T>(x.view, self ? nullptr : &y.view, static_cast<fc::Metric>(kind),
                                             options),
            costs.empty());
    } else if (kind == 5) {
      const fuzz::Array<T> s(in, n, clients, any, true);
      drive(in, *fc::facility_location_matrix<T>(s.view, options), costs.empty());
    } else {
      std::vector<int64_t> indptr{0}, indices;
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < clients; ++i) {
          if (in.byte() % 3 == 0) indices.push_back(i);
        }
        indptr.push_back(static_cast<int64_t>(indices.size()));
      }
      // The last pointer is the arrays' length, which the binding checks; everything else may be anything.
      if (any && n > 1) indptr[in.below(n)] = static_cast<int64_t>(in.below(1000)) - 100;
      if (any && !indices.empty())
        indices[in.below(static_cast<int64_t>(indices.size()))] = in.below(100) - 20;
      const auto values = in.numbers<T>(static_cast<int64_t>(indices.size()), any);
      drive(in,
            *fc::facility_location_sparse<T>({n, clients, indptr.data(), indices.data(), values.data()},
                                             options),
            costs.empty());
    }
  } catch (const std::invalid_argument&) {
    if (!any) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
