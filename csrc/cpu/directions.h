// The random directions of zeroth-order gradients; nothing of them is stored.
//
// python/flashcoreset/directions/reference.py defines every number.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

// out[i] = element begin + i of direction p.
void direction_part(uint64_t seed, uint32_t p, int64_t begin, int64_t count, float* out);

// out[i] = element j[i] of direction p.
void direction_elements(uint64_t seed, uint32_t p, const int64_t* j, int64_t count, float* out);

// out [q, n] = elements begin to begin + n of the directions first to first + q.
template <class T>
void directions(uint64_t seed, int64_t begin, uint32_t first, TensorView<T, 2> out, ThreadTeam& team);

}  // namespace fc
