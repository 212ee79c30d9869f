// Bytes turned into shapes, choices and numbers. Reading past the end gives zeros, so every input is a valid
// program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/tensor_view.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  int64_t below(int64_t n) { return ((byte() << 8) | byte()) % n; }
  bool coin() { return byte() & 1; }

  // Mostly small whole numbers (ties), some of any bit pattern: denormal, huge, infinite, NaN.
  template <class T>
  T number(bool any) {
    const uint8_t kind = byte();
    if (!any || kind >= 4) return static_cast<T>(static_cast<int8_t>(kind)) / 16;
    uint8_t raw[sizeof(T)];
    for (uint8_t& b : raw) b = byte();
    T value;
    std::memcpy(&value, raw, sizeof(T));
    return value;
  }

  template <class T>
  std::vector<T> numbers(int64_t count, bool any) {
    std::vector<T> values(count);
    for (T& value : values) value = number<T>(any);
    return values;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// Calls `run` with a zero of the type that the input asks for, and with the rest of the input.
template <class Run>
int with_float_or_double(const uint8_t* data, size_t size, Run run) {
  Input in(data, size);
  if (in.coin()) {
    run(float{}, in);
  } else {
    run(double{}, in);
  }
  return 0;
}

// An [n, d] array of exactly the bytes it needs, rows first or columns first, forwards or backwards.
template <class T>
struct Array {
  std::vector<T> values;
  fc::TensorView<const T, 2> view;

  Array(Input& in, int64_t n, int64_t d, bool any, bool contiguous_rows) : values(in.numbers<T>(n * d, any)) {
    const bool transposed = !contiguous_rows && in.coin(), backwards = in.coin();
    // As in the bindings' views: without elements, strides are 0.
    const int64_t step = n * d == 0 ? 0 : 1;
    const int64_t row = step * (transposed ? 1 : d), column = step * (transposed ? n : 1);
    view = {
        values.data() + (backwards && n > 0 ? (n - 1) * row : 0), {n, d}, {backwards ? -row : row, column}};
  }
};

}  // namespace fuzz
