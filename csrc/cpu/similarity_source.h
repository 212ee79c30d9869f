// Where the similarities of a greedy run come from: points (point_source.h), a dense matrix, or the rows of a
// sparse one (matrix_source.h).
//
// A source evaluates gains
//   gain(j) = sum_i trunc(max(0, s(j, i) - best_i) * weight_i)
// as exact 64-bit integers: the weights carry a power of two that fills the 62 bits. So a gain does not
// depend on the order of summation, can be corrected for changed clients alone, and two of them tie exactly
// or not at all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "core/tensor_view.h"
#include "core/threads.h"
#include "cpu/facility_location.h"
#include "cpu/live_lists.h"
#include "cpu/tile.h"

namespace fc {

// The clients' best similarities so far and their scaled weights, filled up to a whole panel with clients
// that cannot gain.
template <class T>
struct Cover {
  Buffer<T> best, weight;

  Cover() = default;
  Cover(int64_t m, T floor)
      : best(round_up(m, Tile<T>::kCols), std::numeric_limits<T>::max()),
        weight(round_up(m, Tile<T>::kCols), T(0)) {
    std::fill_n(best.data(), m, floor);
  }
};

template <class T>
class Source {
 public:
  virtual ~Source() = default;
  virtual int64_t candidates() const = 0;
  virtual int64_t clients() const = 0;

  // Checks the values and returns sum_i w_i * (an upper bound of max(0, s(j, i) - floor) over j).
  virtual double prepare(const GreedyOptions& options, ThreadTeam& team) = 0;

  // gains[i] of candidate index[i]. Stores live lists if `lists` is given and has room for them.
  virtual void evaluate(const int64_t* index, int64_t count, const Cover<T>& cover, LiveLists<T>* lists,
                        int64_t* gains, ThreadTeam& team, GreedyStats& stats) = 0;

  // Candidates that evaluate() wants at a time to use the machine well.
  virtual int64_t batch(const ThreadTeam& team) const = 0;

  // Similarities of up to sample_rows() candidates to every client, rows `stride` apart.
  virtual int64_t sample_rows() const = 0;
  virtual void similarities(const int64_t* index, int64_t count, T* out, int64_t stride,
                            ThreadTeam& team) = 0;

  // Similarity of candidate j to client j.
  virtual T self_similarity(int64_t j) = 0;

  // Share of live pairs from which on lists are worth their memory.
  virtual double list_density() const = 0;

  // gains[t][j] = gain of every candidate j under covers[t].
  virtual void sweep(const std::vector<const Cover<T>*>& covers, const std::vector<int64_t*>& gains,
                     ThreadTeam& team, GreedyStats& stats) {
    const std::vector<int64_t> all = everyone();
    stats.ahead = saturated_mul(candidates(), clients());
    for (size_t t = 0; t < covers.size(); ++t)
      evaluate(all.data(), candidates(), *covers[t], nullptr, gains[t], team, stats);
    stats.ahead = 0;  // nothing was computed from features
  }

 protected:
  std::vector<int64_t> everyone() const {
    std::vector<int64_t> all(candidates());
    std::iota(all.begin(), all.end(), int64_t{0});
    return all;
  }
};

}  // namespace fc
