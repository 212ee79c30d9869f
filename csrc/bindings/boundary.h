// Where arrays enter: a Python object that speaks DLPack becomes a checked, typed, strided view, without a
// copy.
//
// Nothing a producer says is believed unchecked: device, type, rank, sizes, alignment and the read-only flag
// are checked before a kernel sees a pointer. What DLPack cannot say is left to its producers: byte order
// (NumPy refuses to export swapped arrays) and whether the memory is really there.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#include "core/checked.h"
#include "core/dlpack.h"
#include "core/half.h"
#include "core/tensor_view.h"

namespace fc {

namespace py = pybind11;

enum class DType { kFloat32, kFloat64, kInt64, kFloat16, kBFloat16 };

template <class T>
inline constexpr DType kDTypeOf = std::is_same_v<T, float>      ? DType::kFloat32
                                  : std::is_same_v<T, double>   ? DType::kFloat64
                                  : std::is_same_v<T, Half>     ? DType::kFloat16
                                  : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                                : DType::kInt64;

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt64:
      break;
  }
  return "int64";
}

// One array argument: owns the exported tensor, and with it the memory, for as long as it lives. May be
// destroyed on any thread.
class ArrayArgument {
 public:
  // `array` has __dlpack__, or is a DLPack capsule that nobody consumed yet. `name` is the argument's, for
  // messages; it must outlive this object (a string literal does). `where` is kCpu or kCuda: what the kernel
  // can read. Raises TypeError or ValueError, or what __dlpack__ raises.
  ArrayArgument(py::handle array, const char* name, dlpack::DeviceType where = dlpack::kCpu)
      : name_(name), where_(where) {
    if (PyCapsule_CheckExact(array.ptr())) {
      take(array.ptr());
    } else {
      take(export_array(array).ptr());
    }
    check();
  }

  ArrayArgument(ArrayArgument&& other) noexcept
      : name_(other.name_),
        where_(other.where_),
        plain_(std::exchange(other.plain_, nullptr)),
        versioned_(std::exchange(other.versioned_, nullptr)),
        data_(other.data_),
        dtype_(other.dtype_) {}
  ArrayArgument& operator=(ArrayArgument&& other) noexcept {
    std::swap(name_, other.name_);
    std::swap(where_, other.where_);
    std::swap(plain_, other.plain_);
    std::swap(versioned_, other.versioned_);
    std::swap(data_, other.data_);
    std::swap(dtype_, other.dtype_);
    return *this;
  }

  ~ArrayArgument() {
    if (!plain_ && !versioned_) return;
    py::gil_scoped_acquire gil;
    py::error_scope pending;  // a deleter may run Python code while an exception is on its way
    if (plain_ && plain_->deleter) plain_->deleter(plain_);
    if (versioned_ && versioned_->deleter) versioned_->deleter(versioned_);
  }

  const char* name() const { return name_; }
  DType dtype() const { return dtype_; }
  int device_id() const { return tensor().device.id; }
  int rank() const { return tensor().ndim; }
  int64_t size(int axis) const {
    if (axis >= rank())
      throw py::value_error(prefix() + "expected at least " + std::to_string(axis + 1) +
                            (axis == 0 ? " dimension" : " dimensions") + ", got " + std::to_string(rank()));
    return tensor().shape[axis];
  }
  bool is_read_only() const { return versioned_ && (versioned_->flags & dlpack::kReadOnly) != 0; }

  // A view to read from.
  template <class T, int Rank>
  TensorView<const T, Rank> input() const& {
    return view<T, Rank>();
  }
  // The memory that the view shows may go away with the argument.
  template <class T, int Rank>
  TensorView<const T, Rank> input() const&& = delete;
  template <class T, int Rank>
  TensorView<T, Rank> output() const&& = delete;

  // A view to write to. The memory must be writable, and no two places of the view may share an element:
  // threads write it.
  template <class T, int Rank>
  TensorView<T, Rank> output() const& {
    const TensorView<T, Rank> result = view<T, Rank>();
    if (is_read_only())
      throw py::value_error(prefix() + "expected a writable array, got a read-only one; pass a copy");
    if (overlaps(result))
      throw py::value_error(
          prefix() + "expected an array whose elements do not overlap or interleave in memory, got strides " +
          listed(tensor().strides) + " for shape " + listed(tensor().shape) + "; pass a contiguous array");
    return result;
  }

  // Raises ValueError unless the shape is the given one.
  void require_shape(std::initializer_list<int64_t> expected) const {
    bool same = static_cast<size_t>(rank()) == expected.size();
    int axis = 0;
    for (const int64_t length : expected) same = same && tensor().shape[axis++] == length;
    if (!same)
      throw py::value_error(prefix() + "expected shape " +
                            listed(expected.begin(), static_cast<int>(expected.size())) + ", got " +
                            listed(tensor().shape));
  }

  // Raises TypeError unless the elements are of the given type.
  void require_dtype(DType expected) const {
    if (dtype_ != expected)
      throw py::type_error(prefix() + "expected dtype " + name_of(expected) + ", got " + name_of(dtype_));
  }

 private:
  const dlpack::Tensor& tensor() const { return versioned_ ? versioned_->tensor : plain_->tensor; }
  std::string prefix() const { return std::string(name_) + ": "; }

  static std::string listed(const int64_t* values, int count) {
    std::string text = "(";
    for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + (count == 1 ? ",)" : ")");
  }
  std::string listed(const int64_t* values) const { return listed(values, tensor().ndim); }

  // array.__dlpack__(max_version=(1, 0)), or without the keyword if the producer is older than it. The
  // versioned form is asked for first because only it can carry the read-only flag.
  py::object export_array(py::handle array) const {
    static PyObject* const method = PyUnicode_InternFromString("__dlpack__");
    static PyObject* const version = Py_BuildValue("(ii)", 1, 0);
    static PyObject* const keywords = Py_BuildValue("(s)", "max_version");
    if (!method || !version || !keywords) throw py::error_already_set();
    PyObject* const call[] = {array.ptr(), version};
    PyObject* capsule = PyObject_VectorcallMethod(method, call, 1, keywords);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Clear();
      capsule = PyObject_VectorcallMethod(method, call, 1, nullptr);
    }
    if (!capsule) {
      py::error_already_set error;  // takes the pending exception, so that the attribute can be read
      if (error.matches(PyExc_AttributeError) && !py::hasattr(array, "__dlpack__"))
        throw py::type_error(
            prefix() +
            "expected an array (a NumPy array, a torch tensor or any object with __dlpack__), got " +
            Py_TYPE(array.ptr())->tp_name);
      throw error;
    }
    return py::reinterpret_steal<py::object>(capsule);
  }

  // Consumes the capsule: from here on the deleter is ours to call.
  void take(PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
      auto* managed =
          static_cast<dlpack::ManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
      if (PyCapsule_SetName(capsule, "used_dltensor_versioned") != 0) throw py::error_already_set();
      versioned_ = managed;
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
      auto* managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
      if (PyCapsule_SetName(capsule, "used_dltensor") != 0) throw py::error_already_set();
      plain_ = managed;
    } else if (PyCapsule_CheckExact(capsule)) {
      const char* kind = PyCapsule_GetName(capsule);
      PyErr_Clear();
      throw py::value_error(prefix() + "expected a DLPack capsule that was not consumed yet, got one named " +
                            (kind ? "\"" + std::string(kind) + "\"" : std::string("None")));
    } else {
      throw py::type_error(prefix() + "expected __dlpack__ to return a capsule, got " +
                           Py_TYPE(capsule)->tp_name);
    }
  }

  void check() {
    // The destructor does not run when a constructor throws, so the tensor is given back here.
    try {
      check_version();
      check_device();
      check_dtype();
      check_layout();
    } catch (...) {
      ArrayArgument give_back(std::move(*this));
      throw;
    }
  }

  void check_version() const {
    if (versioned_ && versioned_->version.major != dlpack::kMajorVersion)
      throw py::value_error(prefix() + "expected DLPack version 1, got " +
                            std::to_string(versioned_->version.major) + "." +
                            std::to_string(versioned_->version.minor));
  }

  void check_device() const {
    const dlpack::Device device = tensor().device;
    const bool on_cuda = device.type == dlpack::kCuda || device.type == dlpack::kCudaManaged;
    if (where_ == dlpack::kCuda && on_cuda) return;
    if (where_ == dlpack::kCpu && (device.type == dlpack::kCpu || device.type == dlpack::kCudaHost ||
                                   device.type == dlpack::kRocmHost)) {
      return;
    }
    std::string kind = "device type " + std::to_string(device.type);
    if (on_cuda) kind = "cuda";
    if (device.type == dlpack::kRocm) kind = "rocm";
    if (device.type == dlpack::kCpu) kind = "cpu";
    const std::string wanted = where_ == dlpack::kCpu ? "CPU" : "CUDA";
    throw py::value_error(prefix() + "expected an array in " + wanted + " memory, got " + kind + ":" +
                          std::to_string(device.id) + "; move it to the " +
                          (where_ == dlpack::kCpu ? "CPU" : "GPU") + " first");
  }

  void check_dtype() {
    const dlpack::DataType type = tensor().dtype;
    if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 32) {
      dtype_ = DType::kFloat32;
    } else if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 64) {
      dtype_ = DType::kFloat64;
    } else if (type.lanes == 1 && type.code == dlpack::kInt && type.bits == 64) {
      dtype_ = DType::kInt64;
    } else if (type.lanes == 1 && type.code == dlpack::kFloat && type.bits == 16) {
      dtype_ = DType::kFloat16;
    } else if (type.lanes == 1 && type.code == dlpack::kBfloat && type.bits == 16) {
      dtype_ = DType::kBFloat16;
    } else {
      static constexpr const char* kKinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
      std::string text = type.code <= dlpack::kBool ? kKinds[type.code]
                                                    : "type code " + std::to_string(type.code) + ", bits ";
      if (type.code != dlpack::kBool) text += std::to_string(type.bits);
      if (type.lanes != 1) text += " x " + std::to_string(type.lanes) + " lanes";
      throw py::type_error(prefix() + "expected dtype float16, bfloat16, float32, float64 or int64, got " +
                           text);
    }
  }

  int64_t item_size() const {
    if (dtype_ == DType::kFloat16 || dtype_ == DType::kBFloat16) return 2;
    return dtype_ == DType::kFloat32 ? 4 : 8;
  }

  // Every offset a kernel can form from the shape and the strides, in bytes, has to fit in 64 bits.
  void check_layout() {
    const dlpack::Tensor& t = tensor();
    if (t.ndim < 0 || (t.ndim > 0 && !t.shape))
      throw py::value_error(prefix() + "the DLPack tensor has " + std::to_string(t.ndim) +
                            " dimensions and no shape");
    bool fits = true, empty = false;
    int64_t elements = 1;
    for (int axis = 0; axis < t.ndim; ++axis) {
      if (t.shape[axis] < 0)
        throw py::value_error(prefix() + "expected sizes >= 0, got shape " + listed(t.shape));
      empty = empty || t.shape[axis] == 0;
    }
    if (!empty) {
      int64_t span = item_size(), bytes = 0;
      for (int axis = 0; axis < t.ndim; ++axis) {
        fits = fits && !__builtin_mul_overflow(elements, t.shape[axis], &elements);
        if (!t.strides || t.shape[axis] == 1) continue;
        const int64_t stride = t.strides[axis];
        int64_t reach = 0;
        fits = fits && stride != INT64_MIN &&
               !__builtin_mul_overflow(t.shape[axis] - 1, stride < 0 ? -stride : stride, &reach) &&
               !__builtin_mul_overflow(reach, item_size(), &reach) &&
               !__builtin_add_overflow(span, reach, &span);
      }
      fits = fits && !__builtin_mul_overflow(elements, item_size(), &bytes);
    }
    // Broadcast or empty arrays may claim any size, and none of them takes memory.
    for (int axis = 0; axis < t.ndim; ++axis) elements = std::max(elements, t.shape[axis]);
    if (!fits || t.byte_offset > static_cast<uint64_t>(INT64_MAX))
      throw py::value_error(prefix() + "expected an array whose byte offsets fit in 64 bits, got shape " +
                            listed(t.shape));
    if (elements > kMostElements)
      throw py::value_error(prefix() + "expected an array of at most 2^48 elements, got shape " +
                            listed(t.shape));
    if (empty) {
      data_ = nullptr;
      return;
    }
    if (!t.data)
      throw py::value_error(prefix() + "the data pointer of an array of shape " + listed(t.shape) +
                            " is null");
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.data) + static_cast<uintptr_t>(t.byte_offset);
    if (address % static_cast<uintptr_t>(item_size()) != 0)
      throw py::value_error(prefix() + "expected data aligned to " + std::to_string(item_size()) +
                            " bytes, got an unaligned array; pass a copy");
    data_ = reinterpret_cast<void*>(address);
  }

  // The stride of a dimension of size 0 or 1 is never used and producers put anything there: the view gets
  // the compact one.
  template <class T, int Rank>
  TensorView<T, Rank> view() const {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, int64_t> ||
                  std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>);
    require_dtype(kDTypeOf<T>);
    const dlpack::Tensor& t = tensor();
    if (t.ndim != Rank)
      throw py::value_error(prefix() + "expected " + std::to_string(Rank) +
                            (Rank == 1 ? " dimension" : " dimensions") + ", got " + std::to_string(t.ndim) +
                            " (shape " + listed(t.shape) + ")");
    TensorView<T, Rank> result{static_cast<T*>(data_), {}, {}};
    int64_t step = 1;
    for (int axis = Rank - 1; axis >= 0; --axis) {
      result.shape[axis] = t.shape[axis];
      result.stride[axis] = t.strides && t.shape[axis] > 1 && data_ ? t.strides[axis] : step;
      step = data_ ? step * t.shape[axis] : 0;
    }
    return result;
  }

  // Sorted by stride, each dimension has to step over all that the smaller ones span. The test is sufficient,
  // not necessary: arrays that interleave without sharing an element exist, but nobody writes to one.
  template <class T, int Rank>
  static bool overlaps(const TensorView<T, Rank>& view) {
    if (!view.data) return false;
    bool used[Rank] = {};
    int64_t span = 1;
    for (int turn = 0; turn < Rank; ++turn) {
      int smallest = -1;
      for (int axis = 0; axis < Rank; ++axis)
        if (!used[axis] && (smallest < 0 || magnitude(view.stride[axis]) < magnitude(view.stride[smallest])))
          smallest = axis;
      used[smallest] = true;
      if (view.shape[smallest] == 1) continue;
      if (magnitude(view.stride[smallest]) < span) return true;
      span += (view.shape[smallest] - 1) * magnitude(view.stride[smallest]);
    }
    return false;
  }
  static int64_t magnitude(int64_t value) { return value < 0 ? -value : value; }

  const char* name_;
  dlpack::DeviceType where_;
  dlpack::ManagedTensor* plain_ = nullptr;
  dlpack::ManagedTensorVersioned* versioned_ = nullptr;
  void* data_ = nullptr;  // byte_offset applied; null: no elements
  DType dtype_ = DType::kFloat32;
};

// How bindings of both devices read and write arrays: on the CPU in any strides. DeviceArrays is the GPU's
// way.
struct HostArrays {
  template <class T, int Rank>
  TensorView<const T, Rank> input(const ArrayArgument& array) const {
    return array.input<T, Rank>();
  }
  template <class T, int Rank>
  TensorView<T, Rank> output(const ArrayArgument& array) const {
    return array.output<T, Rank>();
  }
};

// fn(float{}) or fn(double{}), whichever type the array holds; TypeError for other types.
template <class Fn>
auto dispatch_floating(const ArrayArgument& array, Fn&& fn) {
  if (array.dtype() == DType::kFloat32) return fn(float{});
  if (array.dtype() == DType::kFloat64) return fn(double{});
  throw py::type_error(std::string(array.name()) + ": expected dtype float32 or float64, got " +
                       name_of(array.dtype()));
}

// The same with fn(Half{}) and fn(BFloat16{}).
template <class Fn>
auto dispatch_real(const ArrayArgument& array, Fn&& fn) {
  if (array.dtype() == DType::kFloat16) return fn(Half{});
  if (array.dtype() == DType::kBFloat16) return fn(BFloat16{});
  return dispatch_floating(array, fn);
}

}  // namespace fc
