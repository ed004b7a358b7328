// Storage types and their conversion to and from the type that is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#include "shapes.h"
#include "simd.h"

namespace pyvit {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What products of a storage type are computed and summed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// f(S{}) with the storage type that `dtype` names.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(double{});
    case DType::f32: return f(float{});
    case DType::bf16: return f(bfloat16{});
    case DType::f16: return f(float16{});
  }
}

inline uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// Sixteen bits that are only moved, as the data movers do with both half precisions.
inline uint16_t widen(uint16_t x) { return x; }
inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(uint8_t x) { return static_cast<float>(x); }
inline float widen(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1f, fraction = h.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: the fraction counts in steps of 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return bits_float(float_bits(magnitude) | sign);
  }
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (fraction << 13));
  return bits_float(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

template <class S>
inline S narrow(Compute<S> x);
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {  // round to nearest, ties to even
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
}
template <>
inline float16 narrow<float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the subnormal step
    const float shifted = bits_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_bits(shifted) - 0x3f000000u))};
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
#endif
}

// dst[i] = widen(src[i]), contiguous on both sides.
inline void widen_run(float* dst, const float* src, int64_t n) { copy_run(dst, src, n); }
inline void widen_run(uint16_t* dst, const uint16_t* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
}
inline void widen_run(double* dst, const double* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
}
inline void widen_run(float* dst, const bfloat16* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}
inline void widen_run(float* dst, const float16* src, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(src + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(src + i))));
#endif
  for (; i < n; ++i) dst[i] = widen(src[i]);
}
template <class T>
inline void widen_run(T* dst, const uint8_t* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = widen(src[i]);
}

// dst[i] = narrow(src[i]), contiguous on both sides.
inline void narrow_run(float* dst, const float* src, int64_t n) { copy_run(dst, src, n); }
template <class S>
inline void narrow_run(S* dst, const Compute<S>* src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = narrow<S>(src[i]);
}

}  // namespace pyvit
