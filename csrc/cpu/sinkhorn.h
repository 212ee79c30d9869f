// Batched entropic optimal transport. python/flashcoreset/sinkhorn/reference.py has the definition,
// sinkhorn.cpp the algorithm and its cost.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/metric.h"
#include "core/sinkhorn_schedule.h"
#include "core/tensor_view.h"

namespace fc {

// B problems of at most n x m each. The views stay the caller's and have to outlive the objects made of them.
template <class T>
struct SinkhornBatch {
  TensorView<const T, 3> x;    // [B, n, d] points, or [B, n, m] costs, +infinite for forbidden pairs
  TensorView<const T, 3> y{};  // [B, m, d], if x are points
  bool is_cost = false;        // whether x are costs
  bool shared = false;         // all problems have one matrix of costs, which the view shows many times
  bool cosine = false;         // 1 - cos; else `metric`, a distance
  Metric metric = Metric::kSqeuclidean;
  TensorView<const double, 2> a, b;    // [B, n], [B, m] weights, of equal sums if both are balanced
  const int64_t* x_lengths = nullptr;  // [B] sizes of the problems; null: n, m
  const int64_t* y_lengths = nullptr;

  int64_t count() const { return x.shape[0]; }
  // Whether all problems have all of the same costs.
  bool is_shared() const { return shared && count() > 1 && x_lengths == nullptr && y_lengths == nullptr; }
  int64_t rows(int64_t p) const { return x_lengths != nullptr ? x_lengths[p] : a.shape[1]; }
  int64_t columns(int64_t p) const { return y_lengths != nullptr ? y_lengths[p] : b.shape[1]; }
};

struct SinkhornOptions : SinkhornSettings {
  TensorView<const double, 2> f{}, g{};  // [B, n], [B, m] to start from; without data: 0
  int64_t memory_budget = 0;             // bytes for the kernel matrix of one problem

  bool warm() const { return f.data != nullptr; }

  int threads = 1;
  std::function<bool()> poll;
};

// Where the results go.
struct SinkhornResult {
  TensorView<double, 2> f, g;  // [B, n], [B, m]; entries beyond a problem's size are left alone
  // [B]; tol: the error at which each problem is solved.
  double *value = nullptr, *transport_cost = nullptr, *error = nullptr, *tol = nullptr;
  int64_t* iterations = nullptr;  // [B]
};

class Sinkhorn {
 public:
  virtual ~Sinkhorn() = default;
  // The most iterations that all problems together may take.
  virtual int64_t total() const = 0;
  // Goes on for about so many iterations; returns how many of `total` are done or no longer needed. The
  // result does not depend on how the run is cut.
  virtual int64_t step(int64_t iterations) = 0;
};

// Throws std::invalid_argument for NaN and infinity in the data; the run's steps throw it for costs that
// overflow.
template <class T>
std::unique_ptr<Sinkhorn> make_sinkhorn(const SinkhornBatch<T>& batch, const SinkhornResult& result,
                                        const SinkhornOptions& options);

// out [B, n, k] = P v for v [B, m, k], or with `transpose` out [B, m, k] = P^T v for v [B, n, k], of the
// plans P_ij = a_i b_j exp((f_i + g_j - C_ij) / reg). Rows beyond a problem's size are left alone. v and out:
// rows contiguous.
template <class T>
void sinkhorn_apply(const SinkhornBatch<T>& batch, TensorView<const double, 2> f,
                    TensorView<const double, 2> g, double reg, TensorView<const T, 3> v, bool transpose,
                    TensorView<T, 3> out, int threads, std::function<bool()> poll);

// out [B, n, m] = the plans; entries beyond a problem's size are left alone. out: rows contiguous.
template <class T>
void sinkhorn_plan(const SinkhornBatch<T>& batch, TensorView<const double, 2> f,
                   TensorView<const double, 2> g, double reg, TensorView<T, 3> out, int threads,
                   std::function<bool()> poll);

}  // namespace fc
