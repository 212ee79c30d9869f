// What the kernels of greedy facility location read and write, and how they go through pairs. Included by
// facility_location.cu alone.
#pragma once

#include "cuda/launch.h"
#include "cuda/pack.cuh"
#include "cuda/tile.cuh"

namespace fc::cuda {
namespace {

constexpr long long kNoBound = INT64_MAX;
constexpr int kNever = -1;
constexpr int kNobody = INT32_MAX;

// The first bad entry of each argument, all ones for none.
struct BadAt {
  unsigned long long candidate, client;  // row * columns + column of a value that is not finite
  unsigned long long preselected;        // position of an index out of range or given twice
};

// Largest values found before the first pick, as bits of doubles: none is negative, so their order is that of
// the bits.
enum Largest : int {
  kOfCandidates,  // distance of a candidate to the first client
  kOfClients,     // distance of a client to the first client
  kOfNear,        // distance of one of the first clients to the first candidate
  kOfMatrix,      // similarity
  kLargestCount
};

// The values that the blocks pass to each other and leave for the host.
struct Control {
  double scale, unit;  // what gains are multiplied by; 1 / scale, which is exact
  long long error_at;  // row * columns + column, or position
  int verdict;         // Verdict::Kind
  int in_clients;
  int swept;      // whether every candidate has been evaluated at `swept_best`
  int listed;     // length of `list`
  int changed;    // length of `changed_clients`
  int last_pick;  // -1: none was made
  int closed;     // candidates that close() took out
  double objective;
  double offset;         // the number that distances are subtracted from
  int refused;           // whether step_among() got a candidate that is not open,
  long long refused_as;  // and which
  unsigned long long largest[kLargestCount];
};

struct Best {
  long long bound;
  int candidate;
};

__device__ __forceinline__ bool better(const Best& a, const Best& b) {
  return a.bound != b.bound ? a.bound > b.bound : a.candidate < b.candidate;
}

struct Partial {
  Best fresh, stale;
};

// Everything a kernel reads and writes, on the device.
template <class T>
struct State {
  RowSet<T> candidates, clients;  // points
  const T* matrix = nullptr;      // or similarities [n, m], rows `matrix_stride` apart
  int64_t matrix_stride = 0;
  int n = 0, m = 0;
  bool root = false, negate = false, self_clients = false;

  Control* control = nullptr;
  Partial* partial = nullptr;       // [blocks]
  const double* costs = nullptr;    // [n] or null
  long long* bound = nullptr;       // [n] an upper bound of the pick_key
  long long* exact = nullptr;       // [n] with costs: the gain that belongs to it
  int* stamp = nullptr;             // [n] after how many picks it was exact
  long long* sum = nullptr;         // [n] the sums of the running round; 0 between rounds
  int* pending = nullptr;           // [n] whether the running round evaluates the candidate
  int* open = nullptr;              // [n] neither picked, preselected nor closed
  int* list = nullptr;              // [n]
  long long* swept_gain = nullptr;  // [n] the gain at `swept_best`
  T* best = nullptr;                // [m] similarity to the nearest of S; at least 0, or -offset
  T* swept_best = nullptr;          // [m]
  T* before = nullptr;              // [m] similarity to the nearest of the preselected
  T* weight = nullptr;              // [m] times the scale
  int* owner = nullptr;             // [m] the pick that serves the client, or -1
  int* changed_clients = nullptr;   // [m] those with best != swept_best
  int* picked = nullptr;            // [n]
  long long* gain = nullptr;        // [n] of each pick
  int* serves_itself = nullptr;     // [n] whether each pick is its own client's server
};

template <class T>
__device__ __forceinline__ long long term(T s, T best, T weight) {
  const T above = s - best;
  return above > T(0) ? static_cast<long long>(above * weight) : 0;
}

// fn(r, c, row, column, value) for this thread's pairs of the tile: rows of `rows`, columns of `columns`.
template <class T, Form form, int kRows, bool kChained, bool kMatrix, class Fn>
__device__ void for_tile(const State<T>& state, const RowSet<T>& rows, int first_row,
                         const RowSet<T>& columns, int first_col, Fn&& fn) {
  constexpr int kR = kRows / kSide, kC = kCols<T> / kSide;
  T value[kR][kC];
  if constexpr (!kMatrix) {
    tile_values<T, form, kRows, kChained>(rows, first_row, columns, first_col, value);
  }
#pragma unroll
  for (int r = 0; r < kR; ++r) {
    const int row = first_row + tile_row<kRows>(r);
    if (row >= rows.count) continue;
    const int j = rows.index(row);
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int col = first_col + tile_column<T>(c);
      if (col >= columns.count) continue;
      const int i = columns.index(col);
      if constexpr (kMatrix) {
        fn(r, j, i, state.matrix[j * state.matrix_stride + i]);
      } else {
        fn(r, j, i, finish_value(value[r][c], state.root, state.negate));
      }
    }
  }
}

}  // namespace
}  // namespace fc::cuda
