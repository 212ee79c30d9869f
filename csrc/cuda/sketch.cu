// Products of long rows with random matrices that are generated on the way.
//
//   out_bc = sum over columns i of x of x_bi P_(offset + i)c
//
// rademacher, gaussian   A block has a tile of 64 (16 if rows are few) rows of x by 128 outputs. It makes P's
//                        entries for some columns of x at a time in shared memory and multiplies there with
//                        fused multiply-adds: B D dim of them, and D dim ceil(B / 64) entries made. One
//                        random block is 128 signs, a small part of the work of 64 rows; a normal number
//                        takes about 25 operations, with those of its random words, and one of
//                        gaussian-boxmuller 60 in double, as much as its products or more. x is read once
//                        per 128 outputs.
// sjlt                   A warp has a row of x and its sums (up to 64 KiB of shared memory; if there are more
//                        outputs than that, x is read again for each further part of them). Entries are made
//                        for the warps of a block together, B D nnz additions. Lanes take columns side by
//                        side; lanes that meet in an output take turns, in the order of the columns.
// srht                   A block has up to 8 rows of x. For each N columns: signs; a Hadamard transform,
//                        log2 N additions per number, of which each thread makes 2 to 4 steps in registers
//                        between two exchanges through shared memory; a gather into sums in double. With
//                        more than 4,096 outputs the transform is repeated for each 4,096.
//
// The columns of x are cut into pieces whose bounds depend on D, dim and the offset alone. Sums within 256
// columns (sjlt: until an output has 32 numbers on average; srht: N) are taken in the type of x, over them in
// double, in one order; a second kernel adds the pieces up in order. There are no atomics: a row's result
// depends neither on the other rows nor on the grid.
//
// Bytes: x once per pass named above, and 16 per output of each piece (for sjlt and srht a piece has at least
// 4 dim columns, if there are as many).
//
// Rejected: signs as bits in the inner loop (a shift, an exclusive or and an addition, while a product with
// +-1 in shared memory is one operation); TF32 and tensor cores, which do not compute float32 in float32;
// sjlt in 64-bit fixed point by atomics (whose 43 bits below the largest sum miss float64's 10^-12), and by
// one thread per row (32 rows of sums do not fit).
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "core/philox.h"
#include "cuda/device_buffer.h"
#include "cuda/launch.h"
#include "cuda/normal.cuh"
#include "cuda/pace.h"
#include "cuda/sketch.h"

namespace fc::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSide = 16;                           // threads along either side of a tile of products
constexpr int kColumns = 128;                       // outputs of a tile and of a block of random bits
constexpr int kChunk = 256;                         // columns of x whose bits or entries are made together
constexpr int kLeastLog = 10, kMostLog = 12;        // N of srht
constexpr int kSums = 4096;                         // srht: outputs, of all rows of a block
constexpr int kSparseBytes = 64 << 10;              // sjlt: sums of a warp
constexpr int kBlockBytes = 96 << 10;               // and of a block, on every GPU from sm_80 on
constexpr int kMostTogether = 8;                    // rows of sjlt and srht in a block
constexpr int64_t kRowOfPieces = int64_t{1} << 18;  // sums of all pieces of a row of x
constexpr int64_t kPieceSums = int64_t{1} << 23;    // and of the rows worked on together: 64 MiB

// Columns of x and rows of P that are staged at a time.
template <class T>
constexpr int kStage = 128 / sizeof(T);

template <class T>
struct alignas(16) Quad {
  T at[4];
};

// Part of the work: rows of x, outputs, and a range of each piece of the columns. Columns count from `base`,
// a row of the projection at which the cuts begin; x has [shift, end) of them.
template <class T>
struct Work {
  const T* x;  // [rows, end - shift]
  int64_t x_stride, x_step;
  int64_t rows;
  Projection projection;
  int64_t dim;
  int64_t base, shift, end;
  int64_t piece, pieces;  // columns of a piece
  int64_t from, to;       // of each piece, to be done now
  int64_t output, width;  // outputs [output, output + width)
  double* sums;           // [pieces, rows, width]

  __device__ int64_t begin_of(int64_t piece_number) const { return piece_number * piece + from; }
  __device__ int64_t end_of(int64_t piece_number) const {
    return min(piece_number * piece + min(to, piece), end);
  }
  // 0 for entries that do not exist.
  __device__ T value(int64_t row, int64_t column) const {
    if (row >= rows || column < shift || column >= end) return T(0);
    return x[row * x_stride + (column - shift) * x_step];
  }
  __device__ double* sums_of(int64_t piece_number, int64_t row) const {
    return sums + (piece_number * rows + row) * width;
  }
  __device__ uint64_t row_of_matrix(int64_t column) const {
    return static_cast<uint64_t>(base) + static_cast<uint64_t>(column);
  }
};

__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

__device__ __forceinline__ PhiloxBlock words_of(const Projection& p, uint64_t row, uint32_t block) {
  return philox4x32(
      {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), block, static_cast<uint32_t>(p.kind)},
      {static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32)});
}

__device__ __forceinline__ PhiloxBlock gaussian_words(const Projection& p, uint64_t row, uint32_t block) {
  return philox4x32<7>(
      {static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), block, static_cast<uint32_t>(p.kind)},
      {static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32)});
}

// words[k], from registers.
__device__ uint32_t word_at(const PhiloxBlock& words, int k) {
  return k < 2 ? (k == 0 ? words[0] : words[1]) : (k == 2 ? words[2] : words[3]);
}

// ---- rademacher and gaussian

// One block per tile of 16 kR rows of x by 128 outputs and piece.
template <class T, SketchKind kKind, int kR>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1) dense_sums(Work<T> w) {
  constexpr int kRows = kSide * kR, kK = kStage<T>;
  FC_SHARED(Quad<T>, matrix, [kK][kColumns / 4]);
  FC_SHARED(Quad<T>, points, [kK][kRows / 4 + 1]);
  FC_SHARED(uint32_t, bits, [kChunk][kColumns / 32]);
  const int t = static_cast<int>(threadIdx.x), tx = t % kSide, ty = t / kSide;
  const int64_t tiles = (w.width + kColumns - 1) / kColumns;
  const int64_t tile = blockIdx.x % tiles, piece = blockIdx.x / tiles % w.pieces;
  const int64_t first_row = blockIdx.x / tiles / w.pieces * kRows;
  const uint32_t first_block = static_cast<uint32_t>(w.output / kColumns + tile);
  const int64_t end = w.end_of(piece);
  for (int64_t first = w.begin_of(piece); first < end; first += kChunk) {
    if constexpr (kKind == SketchKind::kRademacher) {
      const PhiloxBlock words = words_of(w.projection, w.row_of_matrix(first + t), first_block);
      for (int k = 0; k < 4; ++k) bits[t][k] = words[k];
    }
    T total[kR][8] = {};
    for (int stage = 0; stage < kChunk && first + stage < end; stage += kK) {
      __syncthreads();  // the bits are there, and the stage before has been used
      for (int v = t; v < kRows * kK; v += kThreads) {
        const int k = v % kK, r = v / kK;
        points[k][r / 4].at[r % 4] = w.value(first_row + r, first + stage + k);
      }
      if constexpr (kKind == SketchKind::kGaussian) {
        for (int v = t; v < kK * kColumns / 8; v += kThreads) {
          const int k = v / (kColumns / 8), block = v % (kColumns / 8), l = block % 4;
          float eight[8];
          eight_normals(gaussian_words(w.projection, w.row_of_matrix(first + stage + k),
                                       first_block * (kColumns / 8) + block),
                        eight);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            // Columns 8 j + 2 l and the next of the block's group of 32.
            Quad<T>& quad = matrix[k][block / 4 * 8 + 2 * j + l / 2];
            quad.at[l % 2 * 2] = static_cast<T>(eight[2 * j]);
            quad.at[l % 2 * 2 + 1] = static_cast<T>(eight[2 * j + 1]);
          }
        }
      } else if constexpr (kKind == SketchKind::kGaussianBoxMuller) {
        for (int v = t; v < kK * kColumns / 4; v += kThreads) {
          const int k = v / (kColumns / 4), quad = v % (kColumns / 4);
          float four[4];
          normals(
              words_of(w.projection, w.row_of_matrix(first + stage + k), first_block * (kColumns / 4) + quad),
              four);
#pragma unroll
          for (int j = 0; j < 4; ++j) matrix[k][quad].at[j] = static_cast<T>(four[j]);
        }
      } else {
        for (int v = t; v < kK * kColumns; v += kThreads) {
          const int k = v / kColumns, c = v % kColumns;
          matrix[k][c / 4].at[c % 4] = bits[stage + k][c / 32] >> (c % 32) & 1 ? T(-1) : T(1);
        }
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kK; ++k) {
        const Quad<T> left = matrix[k][tx], right = matrix[k][kSide + tx];
        T values[kR];
        if constexpr (kR == 4) {
          const Quad<T> four = points[k][ty];
#pragma unroll
          for (int r = 0; r < kR; ++r) values[r] = four.at[r];
        } else {
          values[0] = points[k][ty / 4].at[ty % 4];
        }
#pragma unroll
        for (int r = 0; r < kR; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            total[r][c] = fused(values[r], left.at[c], total[r][c]);
            total[r][4 + c] = fused(values[r], right.at[c], total[r][4 + c]);
          }
        }
      }
    }
    const bool is_first = first == piece * w.piece;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
      const int64_t row = first_row + ty * kR + r;
      if (row >= w.rows) continue;
      double* const sums = w.sums_of(piece, row);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int64_t column = tile * kColumns + c / 4 * (kColumns / 2) + tx * 4 + c % 4;
        if (column >= w.width) continue;
        const double sum = static_cast<double>(total[r][c]);
        sums[column] = is_first ? sum : sums[column] + sum;
      }
    }
  }
}

// ---- sjlt

__device__ int64_t entry_begin(int64_t entry, int64_t dim, int64_t nnz) { return entry * dim / nnz; }

// The entry of a row whose block of columns has this one.
__device__ int64_t entry_of(int64_t column, int64_t dim, int64_t nnz) {
  return ((column + 1) * nnz - 1) / dim;
}

// The column of an entry whose block of columns is [begin, end).
__device__ int64_t entry_column(uint32_t word, int64_t begin, int64_t end) {
  return begin + static_cast<int64_t>(word * static_cast<uint64_t>(end - begin) >> 32);
}

// A block for as many rows of x as it has warps, a piece, and `slab` outputs. An entry is packed into a word:
// its output within the slab (14 bits), its turn among the lanes that have the same (5), the last turn of the
// 32 (5), whether it is in the slab, and its sign.
template <class T>
__global__ void __launch_bounds__(32 * kMostTogether) sparse_sums(Work<T> w, int slab, int64_t until_flush) {
  FC_DYNAMIC_SHARED(T, all_sums);  // [warps, slab]
  FC_SHARED(uint32_t, entries, [2][kChunk]);
  constexpr uint32_t kInside = 1u << 30, kNegative = 1u << 31;
  const int threads = static_cast<int>(blockDim.x), t = static_cast<int>(threadIdx.x), lane = t % 32;
  const int64_t slabs = (w.width + slab - 1) / slab, dim = w.dim, nnz = w.projection.nnz;
  const int64_t begin_output = blockIdx.x % slabs * slab, piece = blockIdx.x / slabs % w.pieces;
  const int64_t row = blockIdx.x / slabs / w.pieces * (threads / 32) + t / 32;
  const int outputs = static_cast<int>(min(static_cast<int64_t>(slab), w.width - begin_output));
  const int64_t lowest = w.output + begin_output;
  const int64_t first_entry = entry_of(lowest, dim, nnz),
                last_entry = entry_of(lowest + outputs - 1, dim, nnz);
  T* const own = all_sums + t / 32 * slab;
  // Other lanes come to these numbers, and to those of a flush below, after the barriers of a chunk's
  // entries.
  for (int c = lane; c < outputs; c += 32) own[c] = T(0);
  int64_t known = -1, bound[3] = {};
  const int64_t end = w.end_of(piece), last = min((piece + 1) * w.piece, w.end);
  for (int64_t first = w.begin_of(piece); first < end; first += kChunk) {
    T value[kChunk / 32];
#pragma unroll
    for (int g = 0; g < kChunk / 32; ++g) value[g] = w.value(row, first + g * 32 + lane);
    for (int64_t pair = first_entry / 2; pair <= last_entry / 2; ++pair) {
      if (pair != known) {
        for (int k = 0; k < 3; ++k) bound[k] = entry_begin(2 * pair + k, dim, nnz);
        known = pair;
      }
      __syncthreads();
      for (int i = t; i < kChunk; i += threads) {
        const PhiloxBlock words =
            words_of(w.projection, w.row_of_matrix(first + i), static_cast<uint32_t>(pair));
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          // The second entry of the last pair may be one too many: its place is beyond all outputs.
          const int64_t at = entry_column(words[2 * k], bound[k], bound[k + 1]) - lowest;
          const bool inside = at >= 0 && at < outputs;
          const uint32_t place = inside ? static_cast<uint32_t>(at) : kInside | static_cast<uint32_t>(lane);
          const unsigned same = __match_any_sync(~0u, place);
          const unsigned turn = static_cast<unsigned>(__popc(same & ((1u << lane) - 1)));
          const unsigned last_turn = __reduce_max_sync(~0u, turn);
          entries[k][i] = (inside ? place | kInside : 0) | turn << 14 | last_turn << 19 |
                          (words[2 * k + 1] & 1 ? kNegative : 0);
        }
      }
      __syncthreads();
      if (row >= w.rows) continue;
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int g = 0; g < kChunk / 32; ++g) {
          const uint32_t entry = entries[k][g * 32 + lane];
          const T term = entry & kNegative ? -value[g] : value[g];
          const unsigned turn = entry >> 14 & 31, last_turn = entry >> 19 & 31;
          for (unsigned now = 0; now <= last_turn; ++now) {
            if ((entry & kInside) != 0 && turn == now) own[entry & 0x3FFF] += term;
            __syncwarp();
          }
        }
      }
    }
    const int64_t done = first + kChunk - piece * w.piece;
    if (row < w.rows && (first + kChunk >= last || done % until_flush == 0)) {
      double* const sums = w.sums_of(piece, row) + begin_output;
      for (int c = lane; c < outputs; c += 32) {
        const double sum = static_cast<double>(own[c]);
        sums[c] = done <= until_flush ? sum : sums[c] + sum;
        own[c] = T(0);
      }
    }
  }
}

// ---- srht

// Which of N columns of the Hadamard matrix an output is.
__device__ int chosen_column(uint32_t word, int64_t column, int64_t dim, int64_t size) {
  const int64_t from = dim <= size ? column * size / dim : 0;
  const int64_t to = dim <= size ? (column + 1) * size / dim : size;
  return static_cast<int>(from + static_cast<int64_t>(word * static_cast<uint64_t>(to - from) >> 32));
}

// The place of a number in shared memory: threads that read at powers of two find it in different banks.
__device__ constexpr int padded(int i) { return i + i / 32; }

// v[i] = the sum over l of v[l] (-1)^popcount(i & l), for all bits or some.
template <int kBits, class T>
__device__ void butterflies(T* v) {
#pragma unroll
  for (int h = 1; h < 1 << kBits; h *= 2) {
#pragma unroll
    for (int i = 0; i < 1 << kBits; ++i) {
      if ((i & h) != 0) continue;
      const T a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
}

// The transform over the kLow lowest bits of the numbers' places, kStep bits at a time.
template <int kLow, int kStep, int kLog, class T>
__device__ void low_bits(T* values) {
  constexpr int kBits = kLow < kStep ? kLow : kStep, kShift = kLow - kBits;
  T v[1 << kBits];
  for (int group = static_cast<int>(threadIdx.x); group < 1 << (kLog - kBits); group += kThreads) {
    const int begin = group >> kShift << kLow | (group & ((1 << kShift) - 1));
#pragma unroll
    for (int j = 0; j < 1 << kBits; ++j) v[j] = values[padded(begin | j << kShift)];
    butterflies<kBits>(v);
#pragma unroll
    for (int j = 0; j < 1 << kBits; ++j) values[padded(begin | j << kShift)] = v[j];
  }
  __syncthreads();
  if constexpr (kShift > 0) low_bits<kShift, kStep, kLog>(values);
}

// Shared memory of a block: its sums, a row's numbers, and the outputs' columns.
template <class T, int kLog>
constexpr size_t hadamard_bytes(int slab, int together) {
  return static_cast<size_t>(slab) * together * sizeof(double) + padded(1 << kLog) * sizeof(T) +
         static_cast<size_t>(slab) * sizeof(uint16_t);
}

// A block for `together` rows of x, a piece, and `slab` outputs, a multiple of 4.
template <class T, int kLog>
__global__ void __launch_bounds__(kThreads) hadamard_sums(Work<T> w, int slab, int together) {
  constexpr int kSize = 1 << kLog, kOwnBits = kLog - 8, kOwn = 1 << kOwnBits;
  FC_DYNAMIC_SHARED(double, sums);  // [together, slab]
  T* const values = reinterpret_cast<T*>(sums + together * slab);
  uint16_t* const chosen = reinterpret_cast<uint16_t*>(values + padded(kSize));  // [slab]
  FC_SHARED(uint32_t, signs, [kSize / 32]);
  const int t = static_cast<int>(threadIdx.x);
  const int64_t slabs = (w.width + slab - 1) / slab;
  const int64_t begin_output = blockIdx.x % slabs * slab, piece = blockIdx.x / slabs % w.pieces;
  const int64_t first_row = blockIdx.x / slabs / w.pieces * together;
  const int outputs = static_cast<int>(min(static_cast<int64_t>(slab), w.width - begin_output));
  const int rows = static_cast<int>(min(static_cast<int64_t>(together), w.rows - first_row));
  const int64_t begin = w.begin_of(piece), end = w.end_of(piece);
  if (begin >= end) return;
  for (int r = 0; r < rows; ++r) {
    const double* const before = w.sums_of(piece, first_row + r) + begin_output;
    for (int c = t; c < outputs; c += kThreads) sums[r * slab + c] = w.from == 0 ? 0 : before[c];
  }
  for (int64_t first = begin; first < end; first += kSize) {
    const uint64_t number = w.row_of_matrix(first) / kSize;
    for (int quad = t; 4 * quad < outputs; quad += kThreads) {
      const int64_t column = w.output + begin_output + 4 * quad;
      const PhiloxBlock words = words_of(w.projection, number, static_cast<uint32_t>(1 + column / 4));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        chosen[4 * quad + j] = static_cast<uint16_t>(chosen_column(words[j], column + j, w.dim, kSize));
      }
    }
    if (t < kSize / 128) {
      const PhiloxBlock words = words_of(w.projection, number * (kSize / 128) + t, 0);
      for (int j = 0; j < 4; ++j) signs[4 * t + j] = words[j];
    }
    __syncthreads();
    for (int r = 0; r < rows; ++r) {
      T own[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const int i = t + kThreads * j;
        const T value = w.value(first_row + r, first + i);
        own[j] = signs[i / 32] >> (i % 32) & 1 ? -value : value;
      }
      butterflies<kOwnBits>(own);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) values[padded(t + kThreads * j)] = own[j];
      __syncthreads();
      low_bits<8, kOwnBits, kLog>(values);
      for (int c = t; c < outputs; c += kThreads) {
        sums[r * slab + c] += static_cast<double>(values[padded(chosen[c])]);
      }
      __syncthreads();
    }
  }
  for (int r = 0; r < rows; ++r) {
    double* const after = w.sums_of(piece, first_row + r) + begin_output;
    for (int c = t; c < outputs; c += kThreads) after[c] = sums[r * slab + c];
  }
}

// ---- all kinds

// out [rows, width] = scale times the sum of the pieces.
template <class T>
__global__ void __launch_bounds__(kThreads) add_pieces(const double* sums, int64_t pieces, int64_t rows,
                                                       int64_t width, double scale, T* out, int64_t stride) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= rows * width) return;
  double sum = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) sum += sums[piece * rows * width + at];
  out[at / width * stride + at % width] = static_cast<T>(sum * scale);
}

// out [rows, dim]: four columns at a time.
template <class T>
__global__ void __launch_bounds__(kThreads)
    matrix_entries(Projection p, int log_size, int64_t rows, int64_t dim, T scale, T* out, int64_t stride) {
  const int64_t quads = (dim + 3) / 4, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < rows * quads;
       at += step) {
    const int64_t i = at / quads, c = at % quads * 4;
    const uint64_t row = static_cast<uint64_t>(p.offset) + static_cast<uint64_t>(i);
    T entry[4];
    if (p.kind == SketchKind::kRademacher) {
      const PhiloxBlock words = words_of(p, row, static_cast<uint32_t>(c / 128));
      for (int k = 0; k < 4; ++k)
        entry[k] = word_at(words, static_cast<int>(c % 128 / 32)) >> (c % 32 + k) & 1 ? T(-1) : T(1);
    } else if (p.kind == SketchKind::kGaussian) {
      const int place = static_cast<int>(c % 32), j = place / 8;
#pragma unroll
      for (int l = 0; l < 2; ++l) {
        float eight[8];
        eight_normals(gaussian_words(p, row, static_cast<uint32_t>(c / 32 * 4 + place % 8 / 2 + l)), eight);
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // eight[2 * j], from registers
          if (k != j) continue;
          entry[2 * l] = static_cast<T>(eight[2 * k]);
          entry[2 * l + 1] = static_cast<T>(eight[2 * k + 1]);
        }
      }
    } else if (p.kind == SketchKind::kGaussianBoxMuller) {
      float four[4];
      normals(words_of(p, row, static_cast<uint32_t>(c / 4)), four);
      for (int k = 0; k < 4; ++k) entry[k] = static_cast<T>(four[k]);
    } else if (p.kind == SketchKind::kSjlt) {
      for (int k = 0; k < 4 && c + k < dim; ++k) {
        const int64_t number = entry_of(c + k, dim, p.nnz);
        const PhiloxBlock words = words_of(p, row, static_cast<uint32_t>(number / 2));
        const int word = static_cast<int>(number % 2 * 2);
        const bool here = entry_column(word_at(words, word), entry_begin(number, dim, p.nnz),
                                       entry_begin(number + 1, dim, p.nnz)) == c + k;
        entry[k] = !here ? T(0) : word_at(words, word + 1) & 1 ? T(-1) : T(1);
      }
    } else {
      const uint64_t size = uint64_t{1} << log_size;
      const PhiloxBlock own = words_of(p, row / 128, 0);
      const PhiloxBlock words = words_of(p, row / size, static_cast<uint32_t>(1 + c / 4));
      const uint32_t negative = word_at(own, static_cast<int>(row % 128 / 32)) >> (row % 32) & 1;
      for (int k = 0; k < 4 && c + k < dim; ++k) {
        const int column = chosen_column(words[k], c + k, dim, static_cast<int64_t>(size));
        const int shared = __popc(static_cast<unsigned>(column) & static_cast<unsigned>(row % size));
        entry[k] = (static_cast<uint32_t>(shared) ^ negative) & 1 ? T(-1) : T(1);
      }
    }
    for (int k = 0; k < 4 && c + k < dim; ++k) out[i * stride + c + k] = entry[k] * scale;
  }
}

int log_of_size(int64_t dim) {
  int log = kLeastLog;
  while (log < kMostLog && int64_t{1} << log < dim) ++log;
  return log;
}

template <class T>
T scale_of(const Projection& p, int64_t dim) {
  return static_cast<T>(1 / std::sqrt(static_cast<double>(p.kind == SketchKind::kSjlt ? p.nnz : dim)));
}

constexpr int64_t parts(int64_t count, int64_t part) { return (count + part - 1) / part; }

template <class T>
class Sketcher {
 public:
  Sketcher(TensorView<const T, 2> x, const Projection& p, TensorView<T, 2> out, cudaStream_t stream,
           std::function<bool()> poll, double first_launch)
      : x_(x),
        p_(p),
        out_(out),
        dim_(out.cols()),
        stream_(stream),
        first_launch_(first_launch),
        pace_(stream, std::move(poll)) {
    const bool dense = p.kind != SketchKind::kSjlt && p.kind != SketchKind::kSrht;
    log_size_ = log_of_size(dim_);
    const int64_t align = p.kind == SketchKind::kSrht ? int64_t{1} << log_size_ : kChunk;
    w_.projection = p;
    w_.dim = dim_;
    w_.x_stride = x.stride[0];
    w_.x_step = x.stride[1];
    w_.shift = p.kind == SketchKind::kSrht ? p.offset % align : 0;
    w_.base = p.offset - w_.shift;
    w_.end = w_.shift + x.cols();
    // As many as keep a GPU busy with few rows. If making sums costs little, there are few sums beside the
    // columns.
    const int64_t most = dense ? 512 / parts(dim_, kColumns) : kRowOfPieces / dim_;
    const int64_t least_columns = dense ? 2048 : std::max<int64_t>(4096, 4 * dim_);
    const int64_t pieces = std::clamp(x.cols() / least_columns, int64_t{1}, std::max(most, int64_t{1}));
    w_.piece = parts(parts(w_.end, pieces), align) * align;
    w_.pieces = x.cols() == 0 ? 0 : parts(w_.end, w_.piece);
    // sjlt: sums of 32 numbers, on average.
    unit_ = p.kind == SketchKind::kSjlt
                ? parts(std::max<int64_t>(2 * kChunk, 32 * dim_ / p.nnz), kChunk) * kChunk
                : align;
    slab_width_ = std::min(dim_, kRowOfPieces);
    slab_rows_ =
        std::clamp(kPieceSums / (std::max(w_.pieces, int64_t{1}) * slab_width_), int64_t{1}, x.rows());
  }

  void run() {
    const DeviceBuffer<double> sums(w_.pieces * slab_rows_ * slab_width_, stream_);
    w_.sums = sums.data();
    const int64_t in_piece = w_.pieces == 0 ? 0 : parts(std::min(w_.piece, w_.end), unit_);
    int64_t done = 0, units = 0;
    for (int64_t row = 0; row < x_.rows(); row += slab_rows_) {
      w_.rows = std::min(slab_rows_, x_.rows() - row);
      w_.x = x_.row(row);
      for (w_.output = 0; w_.output < dim_; w_.output += slab_width_) {
        w_.width = std::min(slab_width_, dim_ - w_.output);
        if (done == 0) units = first_units();
        for (int64_t unit = 0; unit < in_piece;) {
          units = std::min(units, in_piece);
          w_.from = unit * unit_;
          w_.to = w_.from + units * unit_;
          start();
          unit += units;
          done += units;
          units = pace_.next_count(done, units);
        }
        launch(add_pieces<T>, over(parts(w_.rows * w_.width, kThreads)), w_.sums, w_.pieces, w_.rows,
               w_.width, static_cast<double>(scale_of<T>(p_, dim_)), out_.row(row) + w_.output,
               out_.stride[0]);
      }
    }
  }

 private:
  Launch over(int64_t blocks, int threads = kThreads, size_t shared = 0) const {
    return {grid_of(blocks), dim3(static_cast<unsigned>(threads)), shared, stream_};
  }

  // How many units of each piece the first launch does.
  int64_t first_units() const {
    double each = 1;  // operations for a column and an output, about
    if (p_.kind == SketchKind::kGaussian) each = 2;
    if (p_.kind == SketchKind::kGaussianBoxMuller) each = 4;
    if (p_.kind == SketchKind::kSjlt) {
      each = 8.0 * static_cast<double>(std::max<int64_t>(p_.nnz, w_.width / sparse_slab())) /
             static_cast<double>(w_.width);
    }
    if (p_.kind == SketchKind::kSrht)
      each = 32.0 * static_cast<double>(parts(w_.width, kSums)) / static_cast<double>(w_.width);
    each *= static_cast<double>(w_.rows) * static_cast<double>(w_.width);
    const double unit = each * static_cast<double>(unit_) * static_cast<double>(w_.pieces);
    return static_cast<int64_t>(std::clamp(first_launch_ / unit, 1.0, 1e15));
  }

  int sparse_slab() const {
    return static_cast<int>(std::min<int64_t>(w_.width, kSparseBytes / static_cast<int64_t>(sizeof(T))));
  }

  void start() const {
    switch (p_.kind) {
      case SketchKind::kRademacher:
        return start_dense<SketchKind::kRademacher>();
      case SketchKind::kGaussian:
        return start_dense<SketchKind::kGaussian>();
      case SketchKind::kGaussianBoxMuller:
        return start_dense<SketchKind::kGaussianBoxMuller>();
      case SketchKind::kSjlt:
        return start_sparse();
      case SketchKind::kSrht:
        break;
    }
    if (log_size_ == 10) return start_hadamard<10>();
    if (log_size_ == 11) return start_hadamard<11>();
    start_hadamard<12>();
  }

  // Sums are the same for every tile.
  template <SketchKind kKind>
  void start_dense() const {
    if (w_.rows <= kSide) return start_tiles<kKind, 1>();
    start_tiles<kKind, 4>();
  }

  template <SketchKind kKind, int kR>
  void start_tiles() const {
    launch(dense_sums<T, kKind, kR>, over(parts(w_.width, kColumns) * w_.pieces * parts(w_.rows, kSide * kR)),
           w_);
  }

  void start_sparse() const {
    const int slab = sparse_slab(), bytes = slab * static_cast<int>(sizeof(T));
    const int warps =
        static_cast<int>(std::min<int64_t>(std::clamp(kBlockBytes / bytes, 1, kMostTogether), w_.rows));
    launch(sparse_sums<T>,
           over(parts(w_.width, slab) * w_.pieces * parts(w_.rows, warps), 32 * warps,
                static_cast<size_t>(warps) * bytes),
           w_, slab, unit_);
  }

  template <int kLog>
  void start_hadamard() const {
    const int slab = static_cast<int>(std::min<int64_t>(parts(w_.width, 4) * 4, kSums));
    const int together =
        static_cast<int>(std::min<int64_t>(std::clamp(kSums / slab, 1, kMostTogether), w_.rows));
    launch(hadamard_sums<T, kLog>,
           over(parts(w_.width, slab) * w_.pieces * parts(w_.rows, together), kThreads,
                hadamard_bytes<T, kLog>(slab, together)),
           w_, slab, together);
  }

  const TensorView<const T, 2> x_;
  const Projection& p_;
  const TensorView<T, 2> out_;
  const int64_t dim_;
  const cudaStream_t stream_;
  const double first_launch_;
  Pace pace_;
  Work<T> w_{};
  int log_size_ = 0;
  int64_t unit_ = 0;  // columns between places in a piece where launches may be cut
  int64_t slab_rows_ = 0, slab_width_ = 0;
};

}  // namespace

template <class T>
void sketch(TensorView<const T, 2> x, const Projection& projection, TensorView<T, 2> out, cudaStream_t stream,
            std::function<bool()> poll, double first_launch) {
  if (out.size() == 0) return;
  Sketcher<T>(x, projection, out, stream, std::move(poll), first_launch).run();
}

template <class T>
void projection_matrix(const Projection& p, TensorView<T, 2> out, cudaStream_t stream) {
  const int64_t rows = out.rows(), dim = out.cols();
  if (out.size() == 0) return;
  const int64_t blocks = std::min(parts(rows * parts(dim, 4), kThreads), int64_t{1} << 20);
  launch(matrix_entries<T>, {grid_of(blocks), dim3(kThreads), 0, stream}, p, log_of_size(dim), rows, dim,
         scale_of<T>(p, dim), out.data, out.stride[0]);
}

#define FC_INSTANTIATE(T)                                                                            \
  template void sketch<T>(TensorView<const T, 2>, const Projection&, TensorView<T, 2>, cudaStream_t, \
                          std::function<bool()>, double);                                            \
  template void projection_matrix<T>(const Projection&, TensorView<T, 2>, cudaStream_t);
FC_INSTANTIATE(float)
FC_INSTANTIATE(double)
#undef FC_INSTANTIATE

}  // namespace fc::cuda
