// The module _cuda.
#include "bindings/cuda_module.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "flashcoreset's CUDA kernels.";
  m.attr("ARCHITECTURES") = fc::cuda_architectures();
  fc::define_cuda_module(m);
}
