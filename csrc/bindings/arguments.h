// Where numbers and flags enter: each is checked once, here, under its argument's name, before anything is
// done with it. Arrays enter by boundary.h.
//
// A binding takes an Integer, a Real or a Flag and asks it for its value with the GIL held. A value of
// another type raises TypeError, a value out of range ValueError, whatever its size.
//
// Code of the caller's (__index__, __float__, __bool__) runs before the binding does: it could resize an
// array whose memory the binding has taken.
#pragma once

#include <pybind11/pybind11.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "core/checked.h"

namespace fc {

namespace py = pybind11;

namespace detail {

[[noreturn]] inline void refuse_type(const char* name, const char* expected, py::handle given) {
  throw py::type_error(std::string(name) + ": expected " + expected + ", got " +
                       Py_TYPE(given.ptr())->tp_name);
}

[[noreturn]] inline void refuse_value(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

}  // namespace detail

struct Integer {
  py::object given;  // an int, or a value that is none

  static Integer of(py::handle argument) {
    PyObject* const object = argument.ptr();
    if (PyLong_CheckExact(object) || PyBool_Check(object) || !PyIndex_Check(object))
      return {py::reinterpret_borrow<py::object>(argument)};
    auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object));
    if (index) return {std::move(index)};
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw py::error_already_set();
    PyErr_Clear();  // such as of an array of several numbers
    return {py::reinterpret_borrow<py::object>(argument)};
  }

  // Long before this number, one more thread is more work to start than it could take off the others.
  static constexpr int64_t kMostThreads = 4096;

  // An int or a value with __index__, but no bool, in [least, most].
  int64_t in(const char* name, int64_t least, int64_t most = INT64_MAX) const {
    if (!PyLong_Check(given.ptr()) || PyBool_Check(given.ptr()))
      detail::refuse_type(name, "an integer", given);
    return within(name, given.ptr(), least, most);
  }

  // A count of things that memory is made for, or that loops run over.
  int64_t count(const char* name, int64_t least = 0) const { return in(name, least, kMostElements); }

  int threads() const { return static_cast<int>(in("threads", 1, kMostThreads)); }
  uint64_t seed() const { return static_cast<uint64_t>(in("seed", INT64_MIN)); }
  // Bytes. A number above what there is counts as all of it.
  int64_t memory_budget() const { return in("memory_budget", 0); }
  // The handle of a CUDA stream, which nobody but the driver can check.
  uintptr_t stream() const { return static_cast<uintptr_t>(in("stream", 0)); }

 private:
  static int64_t within(const char* name, PyObject* integer, int64_t least, int64_t most) {
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(integer, &overflow);
    if (overflow == 0 && value >= least && value <= most) return value;
    const std::string expected =
        most == INT64_MAX && least > INT64_MIN
            ? "an integer >= " + std::to_string(least)
            : "an integer in [" + std::to_string(least) + ", " + std::to_string(most) + "]";
    detail::refuse_value(name, expected,
                         overflow == 0  ? std::to_string(value)
                         : overflow > 0 ? "one above 2^63"
                                        : "one below -2^63");
  }
};

struct Real {
  py::object given;  // a float or an int, or a value that is neither

  static Real of(py::handle argument) {
    PyObject* const object = argument.ptr();
    if (PyFloat_CheckExact(object) || PyLong_Check(object))
      return {py::reinterpret_borrow<py::object>(argument)};
    const double value = PyFloat_AsDouble(object);
    if (value != -1 || !PyErr_Occurred()) return {py::float_(value)};
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError))
      throw py::error_already_set();
    PyErr_Clear();
    return {py::reinterpret_borrow<py::object>(argument)};
  }

  // Infinity too; no NaN.
  double number(const char* name) const { return in(name, -HUGE_VAL, HUGE_VAL, "a number"); }
  double finite(const char* name) const { return in(name, -DBL_MAX, DBL_MAX, "a finite number"); }
  // Never -0: quotients and roots of -0 have the other sign.
  double not_negative(const char* name) const { return in(name, 0, DBL_MAX, "a finite number >= 0") + 0.0; }
  double positive(const char* name) const { return in(name, DBL_TRUE_MIN, DBL_MAX, "a finite number > 0"); }
  double positive_or_infinite(const char* name) const {
    return in(name, DBL_TRUE_MIN, HUGE_VAL, "a number > 0");
  }

 private:
  // A float or a value with __float__ or __index__, but no bool.
  double in(const char* name, double least, double most, const char* expected) const {
    PyObject* const object = given.ptr();
    if (PyBool_Check(object) || !(PyFloat_Check(object) || PyLong_Check(object)))
      detail::refuse_type(name, "a number", given);
    const double value = PyFloat_Check(object) ? PyFloat_AS_DOUBLE(object) : PyLong_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      detail::refuse_value(name, expected, "an integer beyond float64");
    }
    if (value >= least && value <= most) return value;
    char text[32];
    std::snprintf(text, sizeof(text), "%.17g", value);
    detail::refuse_value(name, expected, text);
  }
};

struct Flag {
  py::object given;  // True or False, or a value that is neither

  // NumPy's bools are taken too.
  static Flag of(py::handle argument) {
    if (!PyBool_Check(argument.ptr())) {
      const std::string type = Py_TYPE(argument.ptr())->tp_name;
      if (type == "numpy.bool" || type == "numpy.bool_") return {py::bool_(py::cast<bool>(argument))};
    }
    return {py::reinterpret_borrow<py::object>(argument)};
  }

  bool on(const char* name) const {
    if (!PyBool_Check(given.ptr())) detail::refuse_type(name, "True or False", given);
    return given.ptr() == Py_True;
  }
};

}  // namespace fc

namespace pybind11::detail {

// The casters take any object, since a type that pybind11 refuses is refused without the argument's name.
template <>
struct type_caster<fc::Integer> {
  PYBIND11_TYPE_CASTER(fc::Integer, const_name("Integer"));
  bool load(handle given, bool) {
    value = fc::Integer::of(given);
    return true;
  }
};

template <>
struct type_caster<fc::Real> {
  PYBIND11_TYPE_CASTER(fc::Real, const_name("Real"));
  bool load(handle given, bool) {
    value = fc::Real::of(given);
    return true;
  }
};

template <>
struct type_caster<fc::Flag> {
  PYBIND11_TYPE_CASTER(fc::Flag, const_name("Flag"));
  bool load(handle given, bool) {
    value = fc::Flag::of(given);
    return true;
  }
};

}  // namespace pybind11::detail
