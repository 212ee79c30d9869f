// Exact optimal transport between k equal sources and V equal sinks, kept optimal while sources are exchanged
// one at a time.
//
// See transport.cpp for the algorithm and its cost.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "core/tensor_view.h"

namespace fc {

// An exchange that its bound does not rule out.
struct ExchangeBound {
  int64_t row;    // of the item that would enter
  int64_t place;  // of the source that would leave
  double bound;   // not above the transport cost after the exchange
};

struct BestExchange {
  int64_t index;  // among the candidates; -1 if no exchange leads below the ceiling
  double value;   // the transport cost after it, or the ceiling
  int64_t tried;  // how many candidates were tried
};

// A flow between k sources of mass 1/k and V sinks of mass 1/V at the least cost. Flows are whole numbers of
// units: V / g leave each source and k / g reach each sink, g = gcd(k, V). Costs are finite, of any sign.
// Objects are not safe for calls from two threads at a time. Where a call throws Cancelled (or bad_alloc),
// the object is not to be used any more.
template <class T>
class Transport {
 public:
  using Value = T;

  virtual ~Transport() = default;

  virtual int64_t sources() const = 0;
  virtual int64_t sinks() const = 0;

  // The transport cost: the sum of costs times masses.
  virtual double value() const = 0;
  // By how much value() may exceed the optimum: its distance to the dual value, >= 0.
  virtual double gap() const = 0;
  // The largest C_sv - u_s - f_v of a pair (s, v) between which mass flows: complementary slackness, >= 0. At
  // most 1e-12 of the largest magnitude of a cost, or the call that led here has thrown.
  virtual double slackness() const = 0;
  // u [k] and f [V], which satisfy u_s + f_v <= C_sv; f_v = min_s (C_sv - u_s).
  virtual const std::vector<double>& source_duals() const = 0;
  virtual const std::vector<double>& sink_duals() const = 0;

  // The pairs between which mass flows, sink by sink, and the units.
  virtual int64_t flow_count() const = 0;
  virtual void flows(int64_t* source, int64_t* sink, int64_t* units) const = 0;

  // Puts a source with costs `row` [V] in the place of source `place` if the transport cost is below
  // `ceiling` then, and returns that cost; otherwise changes nothing and returns infinity. Throws
  // std::invalid_argument for a place that does not exist and for costs that are not finite.
  virtual double exchange(int64_t place, const TensorView<const T, 1>& row, double ceiling) = 0;

  // The transport costs after exchanges for the rows of `costs` [r, V], one exchange at a time: tries
  // `candidates`, sorted by bounds, until `most` were tried, a cost of `enough` or less was found, or a bound
  // is not below the lowest cost found so far, at first `ceiling`. Changes nothing.
  virtual BestExchange best_exchange(const TensorView<const T, 2>& costs,
                                     const std::vector<ExchangeBound>& candidates, double ceiling,
                                     double enough, int64_t most) = 0;

  // For each row of `costs` [r, V], an item that could enter: lowest [r], a number that is not above the
  // transport cost after its exchange for any source. Returns the `most` exchanges with the lowest bounds
  // below `goal`, sorted by bounds, rows and places. by_ways: bounds that also know the ways on which units
  // get from the item to the source that leaves; they are never lower.
  virtual std::vector<ExchangeBound> bounds(const TensorView<const T, 2>& costs, double goal, int64_t most,
                                            bool by_ways, double* lowest) = 0;
};

// Solves the problem of the costs [k, V], which are copied. u: null or [k], dual variables to begin with; any
// finite ones are valid, nearly optimal ones are fast. Throws std::invalid_argument for costs and dual
// variables that are not finite.
template <class T>
std::unique_ptr<Transport<T>> transport(const TensorView<const T, 2>& costs, const double* u, int threads,
                                        std::function<bool()> poll);

}  // namespace fc
