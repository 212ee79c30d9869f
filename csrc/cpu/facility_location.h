// Greedy facility location: maximise f(S) = sum_i w_i * max(0, max_{j in S} s(j, i)) over candidates j and
// clients i.
//
// See facility_location.cpp for the algorithm and its cost.
#pragma once

#include <cstdint>
#include <memory>

#include "core/greedy.h"
#include "core/metric.h"
#include "core/tensor_view.h"

namespace fc {

// What a run did, for benchmarks.
struct GreedyStats {
  int64_t evaluations = 0;   // candidates whose gain was computed, from pairs or from a list
  int64_t pairs = 0;         // similarities computed from features (a pair and its mirror image count once)
  int64_t matrix_reads = 0;  // similarities read from a matrix
  int64_t list_reads = 0;    // live pairs read
  int64_t sweeps = 0;        // how often all candidates were brought up to date together
  int64_t foreseen = 0;      // how often this had been done in advance
  int64_t ahead = 0;         // pairs of the region in progress, counted when it ends

  void count_region() {
    pairs += ahead;
    ahead = 0;
  }
};

// A greedy run that advances pick by pick. After an exception the object stays valid, and step() continues at
// the place it had reached.
class FacilityLocation {
 public:
  virtual ~FacilityLocation() = default;

  // Makes up to `count` further picks over all candidates left; `naive` evaluates every one of them at every
  // pick. Returns the number of picks made so far. Throws std::invalid_argument for NaN or infinity in the
  // data, Cancelled if polled so.
  virtual int64_t step(int64_t count, bool naive) = 0;

  // One pick among the given candidates, which must be open. Returns the candidate picked.
  virtual int64_t step_among(const int64_t* candidates, int64_t count) = 0;

  // One pick as step() makes it, if its gain is at least `stop_gain`. Returns the candidate picked, or -1.
  virtual int64_t pick(bool naive, double stop_gain) = 0;

  // These candidates are not picked from now on.
  virtual void close(const int64_t* candidates, int64_t count) = 0;

  // Writes the picks so far: candidate, gain and client weight won, [picks]; and the pick that serves each
  // client, [m], or -1. Returns f(S), the preselected included.
  virtual double finish(int64_t* indices, double* gains, double* weights, int64_t* assignment) = 0;

  virtual int64_t candidates() const = 0;
  virtual int64_t clients() const = 0;
  virtual int64_t picks() const = 0;

  // For a poll: the pairs computed so far, those of the region in progress included, in units of the pairs
  // that the first pick takes, about.
  virtual double work() const = 0;
  virtual bool is_open(int64_t candidate) const = 0;  // neither picked, preselected nor closed
  virtual GreedyStats stats() const = 0;
};

// x [n, d], clients [m, d] (nullptr: the candidates themselves). The arrays must outlive the object.
template <class T>
std::unique_ptr<FacilityLocation> facility_location_points(TensorView<const T, 2> x,
                                                           const TensorView<const T, 2>* clients,
                                                           Metric metric, GreedyOptions options);

// s [n, m].
template <class T>
std::unique_ptr<FacilityLocation> facility_location_matrix(TensorView<const T, 2> s, GreedyOptions options);

// Rows of a sparse s in compressed form: indptr [n + 1], indices and values [indptr[n]]; what is absent is 0.
template <class T>
struct SparseRows {
  int64_t n = 0, m = 0;
  const int64_t* indptr = nullptr;
  const int64_t* indices = nullptr;
  const T* values = nullptr;
};
template <class T>
std::unique_ptr<FacilityLocation> facility_location_sparse(SparseRows<T> s, GreedyOptions options);

}  // namespace fc
