// What a greedy run of facility location is given beside its points or similarities, on the CPU and on the
// GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "core/host_device.h"

namespace fc {

// Arrays have to outlive the run, and are where it runs. What one device alone reads says so.
struct GreedyOptions {
  const double* weights = nullptr;       // [m], finite and >= 0; null for all 1
  const int64_t* preselected = nullptr;  // [preselected_count] candidates already chosen, distinct
  int64_t preselected_count = 0;
  const double* costs = nullptr;  // [n] > 0: picks go by gain per cost; null: by gain
  double offset = 0;  // of distances, and of matrices of negated distances, s = offset - distance; >= 0
  bool self_clients = false;             // the clients are the candidates
  std::function<bool()> poll = nullptr;  // asked now and then whether to stop

  // CPU
  int64_t memory_budget = 0;  // bytes for everything larger than n + m
  // How many picks the run is expected to make; a wrong number costs time, not correctness.
  int64_t expected_picks = INT64_MAX;
  int threads = 1;

  // GPU
  bool find_offset = false;  // an upper bound of all distances in the place of `offset`
  int64_t work_at_once = 0;  // multiply-adds per launch, about; 0: what a GPU does in some 100 ms at most

  double weight(int64_t client) const { return weights == nullptr ? 1.0 : weights[client]; }
  double total_weight(int64_t clients) const {
    if (weights == nullptr) return static_cast<double>(clients);
    double total = 0;
    for (int64_t i = 0; i < clients; ++i) total += weights[i];
    return total;
  }
};

// What candidates are compared by: the gain, or the bits of gain / cost, which have the order of such
// numbers.
FC_HOST_DEVICE inline int64_t pick_key(int64_t gain, const double* costs, int64_t candidate) {
  if (costs == nullptr) return gain;
  const double ratio = static_cast<double>(gain) / costs[candidate];
  int64_t bits;
  memcpy(&bits, &ratio, sizeof bits);
  return bits;
}

}  // namespace fc
