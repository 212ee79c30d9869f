// half and bfloat16: storage, and conversion from float, rounded to nearest, ties to even. As in CUDA a NaN
// becomes the one NaN 0x7fff.
#pragma once

#include <cstdint>
#include <cstring>

namespace fc::emulator {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t half_of_float(float x) {
  const uint32_t bits = float_bits(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520, halfway from the largest half to the next
  // Subnormal: the last bit of a float in [1/2, 1) is 2^-24, a half's smallest step, so the sum rounds to it.
  if (magnitude < 0x38800000u)
    return static_cast<uint16_t>(sign | (float_bits(float_of_bits(magnitude) + 0.5f) - float_bits(0.5f)));
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return float_of_bits(sign | float_bits(static_cast<float>(fraction) * 0x1p-24f));
  return float_of_bits(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float_of_bfloat16(uint16_t bits) { return float_of_bits(static_cast<uint32_t>(bits) << 16); }

}  // namespace fc::emulator

class __half {
 public:
  __half() = default;
  __half(float x) : bits_(fc::emulator::half_of_float(x)) {}
  operator float() const { return fc::emulator::float_of_half(bits_); }

 private:
  uint16_t bits_;
};

class __nv_bfloat16 {
 public:
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits_(fc::emulator::bfloat16_of_float(x)) {}
  operator float() const { return fc::emulator::float_of_bfloat16(bits_); }

 private:
  uint16_t bits_;
};

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
