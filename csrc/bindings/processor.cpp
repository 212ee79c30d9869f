// The module that is asked which of the others this processor can run. It is compiled for every processor of
// the architecture, and against Python alone, so that it takes no time to build.
#define PY_SSIZE_T_CLEAN
#include "core/processor.h"

#include <Python.h>

namespace {

PyObject* supported_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  for (const char* const* name = fc::supported_isas(); names != nullptr && *name != nullptr; ++name) {
    PyObject* text = PyUnicode_FromString(*name);
    if (text == nullptr || PyList_Append(names, text) != 0) Py_CLEAR(names);
    Py_XDECREF(text);
  }
  return names;
}

PyMethodDef methods[] = {
    {"supported_isas", supported_isas, METH_NOARGS, "Builds that this processor can run, best first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_processor",
                      "What the processor can run.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__processor() { return PyModuleDef_Init(&module); }
