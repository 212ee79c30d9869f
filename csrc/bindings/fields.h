// Where problems enter: a Python object whose attributes are the arguments of a call.
//
// Numbers are to be read before arrays: reading an attribute may run code of the caller's, which could resize
// an array whose memory the binding has taken.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "bindings/arguments.h"
#include "bindings/boundary.h"

namespace fc {

// How the tensors of a library become DLPack capsules: for torch's, its C function takes a fifth of the time
// of __dlpack__.
struct Exporter {
  PyObject* type = nullptr;
  PyObject* function = nullptr;

  static Exporter& instance() {
    static Exporter exporter;
    return exporter;
  }

  void set(py::object tensor_type, py::object to_capsule) {
    if (!PyType_Check(tensor_type.ptr())) detail::refuse_type("type", "a class", tensor_type);
    if (!PyCallable_Check(to_capsule.ptr())) detail::refuse_type("function", "a function", to_capsule);
    Py_XSETREF(type, tensor_type.release().ptr());
    Py_XSETREF(function, to_capsule.release().ptr());
  }
};

// Python's string of a literal, made once: a problem has up to twenty attributes, and making and hashing
// their names would take as long as reading them.
inline PyObject* interned(const char* literal) {
  static auto& strings = *new std::unordered_map<const char*, PyObject*>;
  PyObject*& string = strings[literal];
  if (!string) string = PyUnicode_InternFromString(literal);
  if (!string) throw py::error_already_set();
  return string;
}

class Fields {
 public:
  // `where` is kCpu or kCuda: what the kernels can read.
  explicit Fields(py::handle object, dlpack::DeviceType where = dlpack::kCpu)
      : object_(py::reinterpret_borrow<py::object>(object)), where_(where) {}

  // The fields of an object that is itself a field.
  Fields nested(const char* name) const { return Fields((*this)[name], where_); }

  // `name` has to be a string literal. Raises TypeError if the object has no such attribute, or what reading
  // it raises.
  py::object operator[](const char* name) const {
    PyObject* const value = PyObject_GetAttr(object_.ptr(), interned(name));
    if (value) return py::reinterpret_steal<py::object>(value);
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
    throw py::type_error(std::string("expected an object with the attribute ") + name + ", got " +
                         Py_TYPE(object_.ptr())->tp_name);
  }

  bool has(const char* name) const { return !(*this)[name].is_none(); }

  Integer integer(const char* name) const { return Integer::of((*this)[name]); }
  Real real(const char* name) const { return Real::of((*this)[name]); }
  Flag flag(const char* name) const { return Flag::of((*this)[name]); }

  std::string text(const char* name) const {
    const py::object value = (*this)[name];
    if (!PyUnicode_Check(value.ptr())) detail::refuse_type(name, "a string", value);
    Py_ssize_t size = 0;
    const char* const bytes = PyUnicode_AsUTF8AndSize(value.ptr(), &size);
    if (bytes) return {bytes, static_cast<size_t>(size)};
    if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) throw py::error_already_set();
    PyErr_Clear();  // a half of a surrogate pair, which no encoding has
    detail::refuse_value(name, "a string that can be encoded", py::repr(value).cast<std::string>());
  }

  // `name` has to be a string literal: the argument keeps it for its messages.
  ArrayArgument array(const char* name) const { return exported((*this)[name], name); }

  // Nothing if the attribute is None.
  std::optional<ArrayArgument> optional_array(const char* name) const {
    const py::object value = (*this)[name];
    if (value.is_none()) return std::nullopt;
    return exported(value, name);
  }

 private:
  ArrayArgument exported(py::handle value, const char* name) const {
    const Exporter& exporter = Exporter::instance();
    if (reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) != exporter.type) return {value, name, where_};
    PyObject* const capsule = PyObject_CallOneArg(exporter.function, value.ptr());
    if (capsule) return {py::reinterpret_steal<py::object>(capsule), name, where_};
    py::error_already_set error;  // takes the pending exception, so that its text can be read
    if (!error.matches(PyExc_RuntimeError) && !error.matches(PyExc_BufferError)) throw error;
    throw py::type_error(std::string(name) + ": expected a dense tensor in memory, got one that has none (" +
                         py::str(error.value()).cast<std::string>() + ")");
  }

  py::object object_;
  dlpack::DeviceType where_;
};

// Names the type whose tensors `function` turns into capsules, for all problems from now on.
inline void define_exporter(py::module_& m) {
  m.def(
      "set_exporter",
      [](py::object type, py::object function) {
        Exporter::instance().set(std::move(type), std::move(function));
      },
      py::arg("type"), py::arg("function"),
      "Takes tensors of exactly this type by function(tensor), which returns a DLPack capsule.");
}

}  // namespace fc
