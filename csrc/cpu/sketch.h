// Products with random matrices that are never stored.
#pragma once

#include "core/projection.h"
#include "core/tensor_view.h"
#include "core/threads.h"

namespace fc {

// out [B, dim] = x [B, D] times the projection's matrix.
template <class T>
void sketch(TensorView<const T, 2> x, const Projection& projection, TensorView<T, 2> out, ThreadTeam& team);

// out [B, dim] += the sketches of B long rows that are zero but for some of their parts: g [B, T, width] are
// the parts, indices [B, T] their numbers; parts with the same number add up. Indices are >= 0.
template <class T>
void sketch_rows(TensorView<const int64_t, 2> indices, TensorView<const T, 3> g, const Projection& projection,
                 TensorView<T, 2> out, ThreadTeam& team);

// Rows in CSR form: row b has values[crow[b]] to values[crow[b + 1] - 1] in the columns col[...]. crow rises
// from 0 to the number of entries, and columns are >= 0.
template <class T>
struct CsrRows {
  TensorView<const int64_t, 1> crow, col;
  TensorView<const T, 1> values;
};

// out [B, dim] = the rows times the projection's matrix, of which a row is made for each entry.
template <class T>
void sketch_csr(const CsrRows<T>& x, const Projection& projection, TensorView<T, 2> out, ThreadTeam& team);

// out [rows, dim] = the matrix itself.
template <class T>
void projection_matrix(const Projection& projection, TensorView<T, 2> out, ThreadTeam& team);

}  // namespace fc
