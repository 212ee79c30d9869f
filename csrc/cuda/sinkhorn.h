// Batched entropic optimal transport on the GPU. python/flashcoreset/sinkhorn/reference.py has the
// definition, sinkhorn.cu how the work is divided.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/metric.h"
#include "core/sinkhorn_schedule.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// Problems of up to n x m, all arrays compact and on the device. Entries beyond a problem's lengths are not
// read.
template <class T>
struct SinkhornBatch {
  const T* x = nullptr;  // [batch, n, d] points, or the costs [batch, n, m], +infinite for forbidden pairs
  const T* y = nullptr;  // [batch, m, d]; null: x are the costs
  bool shared = false;   // x are the costs [1, n, m] of all problems
  int64_t batch = 0, n = 0, m = 0, d = 0;
  Metric metric = Metric::kSqeuclidean;  // of points; the cost of cosine is 1 - cos
  const double* a = nullptr;             // [batch, n] weights
  const double* b = nullptr;             // [batch, m]
  const int64_t* x_lengths = nullptr;    // [batch], in 1 .. n; null for n
  const int64_t* y_lengths = nullptr;    // [batch], in 1 .. m
};

struct SinkhornOptions : SinkhornSettings {
  const double* f = nullptr;  // [batch, n] to start from; null for 0
  const double* g = nullptr;  // [batch, m]
  int64_t shared_bytes = -1;  // how much shared memory a block may take; -1 for all there is
  cudaStream_t stream = nullptr;
};

// The results of [batch] problems; beyond a problem's lengths f and g are left as they are.
struct SinkhornResult {
  double* f = nullptr;  // [batch, n]
  double* g = nullptr;  // [batch, m]
  double *value = nullptr, *transport_cost = nullptr, *error = nullptr;
  double* tol = nullptr;  // the error at which each problem is solved
  int64_t* iterations = nullptr;
};

// The fault in the data: none, or the first problem that has one and, if the fault has them, its row and
// column.
struct SinkhornVerdict {
  enum Kind : int {
    kFine,
    kNotFinite,      // in x or (second) y
    kBadWeight,      // in a or b: negative, NaN or infinite
    kNoWeight,       // the sum of a or b is 0, or too large for a number
    kUnequalWeight,  // the sums of balanced problems differ by more than one part in 10^4
    kOverflow,       // the costs leave the range of the type
    kSmallReg        // their exponents leave that range
  };
  Kind kind = kFine;
  bool second = false;
  int64_t problem = 0, row = 0, column = 0;
};

// Solves all problems; waits once, at the end. If any problem has a fault, nothing is written.
template <class T>
SinkhornVerdict sinkhorn(const SinkhornBatch<T>& problems, const SinkhornOptions& options,
                         const SinkhornResult& result);

// out [batch, n, k] = P v of the plans with potentials f, g, for v [batch, m, k]; with `transpose` out
// [batch, m, k] = P^T v for v [batch, n, k]. Rows beyond a problem's size become 0. Does not wait.
template <class T>
void sinkhorn_apply(const SinkhornBatch<T>& problems, double reg, const double* f, const double* g,
                    const double* v, int64_t k, bool transpose, double* out, cudaStream_t stream);

// out [batch, n, m] = P, 0 beyond a problem's size. Does not wait.
template <class T>
void sinkhorn_plan(const SinkhornBatch<T>& problems, double reg, const double* f, const double* g,
                   double* out, cudaStream_t stream);

}  // namespace fc::cuda
