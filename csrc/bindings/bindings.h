// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <string>

#include "bindings/arguments.h"
#include "core/metric.h"
#include "core/projection.h"
#include "core/threads.h"

namespace fc {

namespace py = pybind11;

// Raises ValueError for a name that is none of the five metrics.
Metric metric_from_name(const std::string& name);

// Raises ValueError unless the matrix [rows, dim] exists.
Projection projection_from(const std::string& kind, Integer seed, Integer offset, Integer nnz, int64_t rows,
                           int64_t dim);

// For ThreadTeam: whether a signal handler (Ctrl-C) raised. Takes the GIL for the question; the exception
// stays pending.
std::function<bool()> signal_poll();

// Runs fn without the GIL. A cancelled run leaves the interpreter's exception pending and raises it.
template <class Fn>
auto without_gil(Fn&& fn) {
  try {
    py::gil_scoped_release release;
    return fn();
  } catch (const Cancelled&) {
    throw py::error_already_set();
  }
}

void bind_pairwise(py::module_& m);
void bind_partial_gains(py::module_& m);
void bind_facility_location(py::module_& m);
void bind_nearest_order(py::module_& m);
void bind_sinkhorn(py::module_& m);
void bind_sketch(py::module_& m);
void bind_scores(py::module_& m);
void bind_matching(py::module_& m);
void bind_caratheodory(py::module_& m);
void bind_pursuit(py::module_& m);
void bind_transport(py::module_& m);

}  // namespace fc
