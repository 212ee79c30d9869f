// Kernels with one mistake each, for the tests that show it is found; some have a twin without it.
#pragma once

#include "cuda/runtime.h"

// Threads wait at different barriers.
__global__ void divergent_barrier(int* out);
// The last thread returns before the barrier.
__global__ void exit_before_barrier(int* out);
// Each thread reads what its neighbour writes. Without the barrier in between, who comes first decides.
template <bool barrier>
__global__ void neighbour(int* out);
// The same within a warp.
template <bool barrier>
__global__ void warp_neighbour(int* out);
// All blocks write to one place; with atomicMax the order does not matter.
template <bool atomic>
__global__ void blocks_write(int* out);
// Counts threads; the update is two accesses if it is not atomic.
template <bool atomic>
__global__ void lost_update(int* out);
// The last block to arrive adds the values that the others wrote; the fence makes them visible to it.
template <bool fence>
__global__ void last_block(int* out);
// A relay: each lane changes the value that the lane before it left, after an operation of these two lanes
// alone; or of the second alone.
template <bool met>
__global__ void lanes_in_turn(int* out);
// No race: each thread has bytes of its own in words that they share.
__global__ void neighbouring_bytes(int* out);
// One thread writes a word, and another reads one of its bytes.
__global__ void byte_of_word(int* out);
// One thread writes a value that the others update atomically.
__global__ void atomic_and_plain(int* out);
// Reads shared memory that nobody wrote.
__global__ void uninitialised_static(int* out);
__global__ void uninitialised_dynamic(int* out);
// A shuffle of all lanes to which only half of them come, while the others wait for the block.
__global__ void shuffle_without_half(int* out);
// Reads a lane that has returned.
__global__ void shuffle_from_exited(int* out);
// The mask lacks the caller.
__global__ void shuffle_outside_mask(int* out);
__global__ void syncwarp_without_half(int* out);
__global__ void grid_sync_once(int* out);
// The last block leaves before the grid's barrier.
__global__ void block_skips_grid_sync(int* out);
__global__ void too_much_shared(int* out);
// Accesses element `at` of an array of 8.
__global__ void read_global(const int* in, int* out, int at);
__global__ void write_global(int* out, int at);
__global__ void read_static(int* out, int at);
__global__ void write_static(int* out, int at);
__global__ void read_dynamic(int* out, int at);
__global__ void write_dynamic(int* out, int at);
// The sum of 1 to depth, 4 KiB of stack per term: needs more than there is when depth is large.
__global__ void recurse(int* out, int depth);
