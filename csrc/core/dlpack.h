// Declarations of the DLPack binary interface (https://dmlc.github.io/dlpack/latest/c_api.html): the C
// structures that array libraries pass to each other inside a Python capsule. Names follow this project's
// style; sizes, order and values are the published ones and are asserted below.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fc::dlpack {

inline constexpr uint32_t kMajorVersion =
    1;  // of the versioned structure; a minor version never changes the layout

enum DeviceType : int32_t {
  kCpu = 1,
  kCuda = 2,
  kCudaHost = 3,  // page-locked host memory: the processor reads it like any other
  kRocm = 10,
  kRocmHost = 11,
  kCudaManaged = 13,
};

enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kOpaqueHandle = 3,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
};

enum Flags : uint64_t {
  kReadOnly = 1u << 0,
  kCopied = 1u << 1,
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;  // a DeviceType, kept as a number: a newer producer may send one that is not listed
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: compact, last dimension fastest
  uint64_t byte_offset;
};

// Capsule "dltensor". Whoever takes it renames the capsule to "used_dltensor" and calls the deleter once.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// Capsule "dltensor_versioned". With an unknown major version only the first three members may be touched.
struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

static_assert(sizeof(Device) == 8 && sizeof(DataType) == 4 && sizeof(Version) == 8);
static_assert(sizeof(void*) != 8 || (offsetof(Tensor, device) == 8 && offsetof(Tensor, ndim) == 16 &&
                                     offsetof(Tensor, dtype) == 20 && offsetof(Tensor, shape) == 24 &&
                                     offsetof(Tensor, strides) == 32 && offsetof(Tensor, byte_offset) == 40 &&
                                     sizeof(Tensor) == 48));
static_assert(sizeof(void*) != 8 ||
              (sizeof(ManagedTensor) == 64 && offsetof(ManagedTensorVersioned, flags) == 24 &&
               offsetof(ManagedTensorVersioned, tensor) == 32 && sizeof(ManagedTensorVersioned) == 80));

}  // namespace fc::dlpack
