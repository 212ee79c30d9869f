// Greedy facility location that stays on the GPU: see facility_location.cu for the algorithm and its cost.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/metric.h"
#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

struct GreedyArguments {
  const double* weights = nullptr;       // [m] on the device; null for all 1
  const int64_t* preselected = nullptr;  // [preselected_count] on the device
  int64_t preselected_count = 0;
  double offset = 0;  // of distances, and of matrices of negated distances, s = offset - distance; >= 0
  bool find_offset = false;  // an upper bound of all distances instead, which finish() returns
  bool trim_offset =
      false;  // that bound in place of an offset far above it, beside which rounding would lose distances
  bool self_clients = false;
  cudaStream_t stream = nullptr;
  std::function<bool()> poll = nullptr;  // called while the GPU works; true stops the run by Cancelled
  int64_t work_at_once = 0;  // multiply-adds per launch, about; 0: what a GPU does in some 100 ms at most
};

// The fault in the data, found on the way and known once finish() has waited.
struct Verdict {
  enum Kind : int {
    kFine,
    kNotFinite,      // row and column of x or (in_clients) of the clients
    kOverflow,       // similarities or their sum leave the range of the type
    kVanishing,      // their sum is too close to its smallest number
    kBadWeight,      // row: negative, NaN or infinite
    kHeavyWeights,   // their sum leaves the range of the type
    kBadPreselected  // row: out of range or twice
  };
  Kind kind = kFine;
  bool in_clients = false;
  int64_t row = 0, column = 0;
};

// A run that advances pick by pick. Long work goes to the stream of the arguments in several launches, of
// which at most two are under way; so the GPU never idles, and `poll` is called. Apart from that, only
// finish() and step_among() wait for the GPU. Arrays must outlive the object. After Cancelled the run is
// over.
class FacilityLocation {
 public:
  virtual ~FacilityLocation() = default;

  // Starts up to `count` further picks; `naive` evaluates every candidate at every pick. Returns the number
  // of picks that there will be then.
  virtual int64_t step(int64_t count, bool naive) = 0;

  // One pick among candidates [count] on the device, at least one; waits, and returns the pick, or -1 if
  // verdict() says that something is wrong. Throws std::invalid_argument if one of them is not open.
  virtual int64_t step_among(const int64_t* candidates, int64_t count) = 0;

  // Writes the picks so far to arrays on the device: candidate, gain and client weight won, [picks], and the
  // pick that serves each client, [m], or -1. Waits; `objective` is f(S), the preselected included, `offset`
  // the value that distances were subtracted from. Nothing is written if verdict() says that something is
  // wrong.
  virtual void finish(int64_t* indices, double* gains, double* weights, int64_t* assignment,
                      double* objective, double* offset) = 0;

  // The fault that step_among() or finish() found.
  virtual Verdict verdict() const = 0;

  virtual int64_t candidates() const = 0;
  virtual int64_t clients() const = 0;
  virtual int64_t picks() const = 0;
  virtual int64_t completed() const = 0;  // of these picks, how many the GPU is known to have made
};

// x [n, d], clients [m, d] (null: the candidates themselves), on the device.
template <class T>
std::unique_ptr<FacilityLocation> facility_location_points(TensorView<const T, 2> x,
                                                           const TensorView<const T, 2>* clients,
                                                           Metric metric, const GreedyArguments& arguments);

// s [n, m], rows contiguous, on the device.
template <class T>
std::unique_ptr<FacilityLocation> facility_location_matrix(TensorView<const T, 2> s,
                                                           const GreedyArguments& arguments);

}  // namespace fc::cuda
