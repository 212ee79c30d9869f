// Greedy facility location that stays on the GPU: see facility_location.cu for the algorithm and its cost.
#pragma once

#include <cstdint>
#include <memory>

#include "core/greedy.h"
#include "core/metric.h"
#include "core/tensor_view.h"
#include "cuda/runtime.h"

namespace fc::cuda {

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

// A run that advances pick by pick. Long work goes to the stream in several launches, of
// which at most two are under way; so the GPU never idles, and `poll` is called. Apart from that, only the
// calls that say so wait for the GPU. Arrays must outlive the object. After Cancelled the run is
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

  // One pick as step() makes it, if its gain is at least `stop_gain`; waits. Returns the candidate picked, or
  // -1, also if verdict() says that something is wrong.
  virtual int64_t pick(bool naive, double stop_gain) = 0;

  // These candidates, an array of the host's, are not picked from now on; waits.
  virtual void close(const int64_t* candidates, int64_t count) = 0;

  // Writes the picks so far to arrays on the device: candidate, gain and client weight won, [picks], and the
  // pick that serves each client, [m], or -1. Waits; `objective` is f(S), the preselected included, `offset`
  // the value that distances were subtracted from, which is not the given one if that is far above them all.
  // Nothing is written if verdict() says that something is wrong.
  virtual void finish(int64_t* indices, double* gains, double* weights, int64_t* assignment,
                      double* objective, double* offset) = 0;

  // The fault that step_among(), pick() or finish() found.
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
                                                           Metric metric, const GreedyOptions& options,
                                                           cudaStream_t stream);

// s [n, m], rows contiguous, on the device.
template <class T>
std::unique_ptr<FacilityLocation> facility_location_matrix(TensorView<const T, 2> s,
                                                           const GreedyOptions& options, cudaStream_t stream);

}  // namespace fc::cuda
