#include "emulator/faults.h"

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x % 2 == 0)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void exit_before_barrier(int* out) {
  if (threadIdx.x + 1 == blockDim.x) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <bool barrier>
__global__ void neighbour(int* out) {
  FC_SHARED(int, values, [128]);
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
}
template __global__ void neighbour<false>(int*);
template __global__ void neighbour<true>(int*);

template <bool barrier>
__global__ void warp_neighbour(int* out) {
  FC_SHARED(int, values, [32]);
  values[threadIdx.x] = 0;
  __syncwarp();
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (barrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 1];
}
template __global__ void warp_neighbour<false>(int*);
template __global__ void warp_neighbour<true>(int*);

template <bool atomic>
__global__ void blocks_write(int* out) {
  const int block = static_cast<int>(blockIdx.x);
  if (atomic)
    atomicMax(out, block);
  else
    *out = block;
}
template __global__ void blocks_write<false>(int*);
template __global__ void blocks_write<true>(int*);

template <bool atomic>
__global__ void lost_update(int* out) {
  if (atomic)
    atomicAdd(out, 1);
  else
    *out += 1;
}
template __global__ void lost_update<false>(int*);
template __global__ void lost_update<true>(int*);

template <bool fence>
__global__ void last_block(int* out) {
  FC_SHARED(bool, last, );
  int* const arrived = out + 100;
  if (threadIdx.x == 1) out[blockIdx.x] = static_cast<int>(blockIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    if (fence) __threadfence();
    last = atomicAdd(arrived, 1) + 1 == static_cast<int>(gridDim.x);
  }
  __syncthreads();
  if (last && threadIdx.x == 2)
    for (unsigned b = 0; b < gridDim.x; ++b) out[101] += out[b];
}
template __global__ void last_block<false>(int*);
template __global__ void last_block<true>(int*);

template <bool met>
__global__ void lanes_in_turn(int* out) {
  FC_SHARED(int, value, );
  const unsigned lane = threadIdx.x;
  if (lane == 0) value = 1;
  for (unsigned turn = 1; turn < 32; ++turn) {
    const unsigned pair = met ? 3u << (turn - 1) : 1u << turn;
    if ((pair >> lane & 1) != 0) __syncwarp(pair);
    if (lane == turn) value += static_cast<int>(lane);
  }
  if (lane == 31) out[0] = value;
}
template __global__ void lanes_in_turn<false>(int*);
template __global__ void lanes_in_turn<true>(int*);

__global__ void neighbouring_bytes(int* out) {
  FC_SHARED(unsigned char, bytes, [128]);
  bytes[threadIdx.x] = static_cast<unsigned char>(threadIdx.x);
  reinterpret_cast<unsigned short*>(out)[threadIdx.x] = bytes[threadIdx.x];
}

__global__ void byte_of_word(int* out) {
  FC_SHARED(int, word, );
  if (threadIdx.x == 0) word = 1;
  if (threadIdx.x == 1) out[0] = reinterpret_cast<const unsigned char*>(&word)[2];
}

__global__ void atomic_and_plain(int* out) {
  if (threadIdx.x > 0)
    atomicAdd(out, 1);
  else
    *out = 0;
}

__global__ void uninitialised_static(int* out) {
  FC_SHARED(int, value, );
  out[threadIdx.x] = value;
}

__global__ void uninitialised_dynamic(int* out) {
  FC_DYNAMIC_SHARED(int, values);
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void shuffle_without_half(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
  __syncthreads();
}

__global__ void shuffle_from_exited(int* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_down_sync(~0u, 1, 1);
}

__global__ void shuffle_outside_mask(int* out) {
  if (threadIdx.x < 17) out[threadIdx.x] = __shfl_sync(0xFFFFu, 1, 0);
}

__global__ void syncwarp_without_half(int* out) {
  if (threadIdx.x < 16) __syncwarp();
  out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
}

__global__ void grid_sync_once(int* out) {
  fc::cuda::grid_sync();
  out[threadIdx.x] = 1;
}

__global__ void block_skips_grid_sync(int* out) {
  if (blockIdx.x + 1 == gridDim.x) return;
  fc::cuda::grid_sync();
  out[threadIdx.x] = 1;
}

__global__ void too_much_shared(int* out) {
  FC_SHARED(int, first, [8 * 1024]);
  FC_SHARED(int, second, [8 * 1024]);
  first[0] = second[0] = 1;
  out[0] = first[0] + second[0];
}

__global__ void read_global(const int* in, int* out, int at) { *out = in[at]; }
__global__ void write_global(int* out, int at) { out[at] = 1; }

__global__ void read_static(int* out, int at) {
  FC_SHARED(int, values, [8]);
  const int* first = values;
  *out = first[at];
}

__global__ void write_static(int* out, int at) {
  FC_SHARED(int, values, [8]);
  int* first = values;
  first[at] = 1;
  *out = first[0];
}

__global__ void read_dynamic(int* out, int at) {
  FC_DYNAMIC_SHARED(int, values);
  *out = values[at];
}

__global__ void write_dynamic(int* out, int at) {
  FC_DYNAMIC_SHARED(int, values);
  values[at] = 1;
  *out = values[0];
}

__device__ int sum_down_from(int depth) {
  volatile int frame[1024];
  frame[0] = depth;
  return depth == 0 ? 0 : sum_down_from(depth - 1) + frame[0];
}

__global__ void recurse(int* out, int depth) { *out = sum_down_from(depth); }
