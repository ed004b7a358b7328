// One vector type per instruction set, and the few operations that compilers do not find alone.
//
// `Vec<T>` is a GCC/Clang vector of the widest register this file is compiled for, so +, -, *,
// <, ?: work on it as on a scalar. The build compiles every kernel once per instruction set
// (see setup.py); nothing here branches at run time.
//
// The build passes -ffp-contract=off: a product and a sum are fused exactly where fma() is
// written. Results then do not depend on what a compiler chose to contract.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyvit {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

inline Vec<float> broadcast(float x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_set1_ps(x);
#else
  return x - Vec<float>{};  // minus, since 0 + -0.0 would lose the sign
#endif
}

inline Vec<double> broadcast(double x) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_set1_pd(x);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_set1_pd(x);
#else
  return x - Vec<double>{};
#endif
}

// a * b + c, rounded once where the instruction set can.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Lane i takes lane i + Shift, in a circle.
template <int Shift, class T, int... Lane>
inline Vec<T> rotate_lanes(Vec<T> v, std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((Lane + Shift) % L)...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(v, Vec<Index>{((Lane + Shift) % L)...});
#endif
}

// Lane i takes lane From[i] of a followed by b.
template <class T, int... From>
inline Vec<T> shuffle_lanes(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, From...);
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Index>{From...});
#endif
}

// combine() of all lanes, always in the same order: halves with each other.
template <class T, int Half = kLanes<T> / 2, class Combine>
inline T reduce_lanes(Vec<T> v, const Combine& combine) {
  if constexpr (Half == 0) {
    return v[0];
  } else {
    const auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
    return reduce_lanes<T, Half / 2>(combine(v, rotate_lanes<Half, T>(v, lanes)), combine);
  }
}

template <class T>
inline T reduce_add(Vec<T> v) {
  return reduce_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// Masks over the lanes of Vec<float>. A masked load does not touch memory where the mask is off.
#if defined(__AVX512F__)
#define PYVIT_HAS_LANE_MASKS 1
using LaneMask = __mmask16;
// The mask of the first n lanes; n may lie outside [0, 16].
inline LaneMask first_lanes(int64_t n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1);
}
inline LaneMask lanes_between(int64_t begin, int64_t end) {
  return first_lanes(end) & ~first_lanes(begin);
}
// Lanes of p where the mask is on, of `other` (or zeros) elsewhere.
inline Vec<float> load_masked(Vec<float> other, LaneMask mask, const float* p) {
  return (Vec<float>)_mm512_mask_loadu_ps((__m512)other, mask, p);
}
inline Vec<float> load_masked(LaneMask mask, const float* p) {
  return (Vec<float>)_mm512_maskz_loadu_ps(mask, p);
}
inline void store_masked(float* p, LaneMask mask, Vec<float> v) {
  _mm512_mask_storeu_ps(p, mask, (__m512)v);
}
inline Vec<float> select(LaneMask mask, Vec<float> on, Vec<float> off) {
  return (Vec<float>)_mm512_mask_mov_ps((__m512)off, mask, (__m512)on);
}
// Lanes 0, 2, 4, … of a, then of b.
inline Vec<float> even_lanes(Vec<float> a, Vec<float> b) {
  const __m512i even =
      _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return (Vec<float>)_mm512_permutex2var_ps((__m512)a, even, (__m512)b);
}
// Lane l takes lane place[l] + add of v.
inline Vec<float> permute(Vec<float> v, const int32_t* place, int64_t add) {
  const __m512i from = _mm512_add_epi32(_mm512_loadu_si512(place),
                                        _mm512_set1_epi32(static_cast<int>(add)));
  return (Vec<float>)_mm512_permutexvar_ps(from, (__m512)v);
}
// The same of a followed by b.
inline Vec<float> permute(Vec<float> a, Vec<float> b, const int32_t* place, int64_t add) {
  const __m512i from = _mm512_add_epi32(_mm512_loadu_si512(place),
                                        _mm512_set1_epi32(static_cast<int>(add)));
  return (Vec<float>)_mm512_permutex2var_ps((__m512)a, from, (__m512)b);
}
#elif defined(__AVX2__)
#define PYVIT_HAS_LANE_MASKS 1
using LaneMask = __m256i;
inline LaneMask lanes_between(int64_t begin, int64_t end) {
  const auto clamp = [](int64_t n) { return static_cast<int>(n < 0 ? 0 : n > 8 ? 8 : n); };
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(clamp(begin)), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(clamp(end)), lane));
}
inline Vec<float> select(LaneMask mask, Vec<float> on, Vec<float> off) {
  return (Vec<float>)_mm256_blendv_ps((__m256)off, (__m256)on, _mm256_castsi256_ps(mask));
}
inline Vec<float> load_masked(LaneMask mask, const float* p) {
  return (Vec<float>)_mm256_maskload_ps(p, mask);
}
inline Vec<float> load_masked(Vec<float> other, LaneMask mask, const float* p) {
  return select(mask, load_masked(mask, p), other);
}
inline void store_masked(float* p, LaneMask mask, Vec<float> v) {
  _mm256_maskstore_ps(p, mask, (__m256)v);
}
inline Vec<float> even_lanes(Vec<float> a, Vec<float> b) {
  const __m256 mixed = _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  return (Vec<float>)_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8);
}
inline Vec<float> permute(Vec<float> v, const int32_t* place, int64_t add) {
  const __m256i from = _mm256_add_epi32(_mm256_loadu_si256((const __m256i*)place),
                                        _mm256_set1_epi32(static_cast<int>(add)));
  return (Vec<float>)_mm256_permutevar8x32_ps((__m256)v, from);
}
inline Vec<float> permute(Vec<float> a, Vec<float> b, const int32_t* place, int64_t add) {
  const __m256i from = _mm256_add_epi32(_mm256_loadu_si256((const __m256i*)place),
                                        _mm256_set1_epi32(static_cast<int>(add)));
  const __m256 of_b = _mm256_castsi256_ps(_mm256_slli_epi32(from, 28));  // bit 3 as the sign
  return (Vec<float>)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)a, from),
                                      _mm256_permutevar8x32_ps((__m256)b, from), of_b);
}
#endif

// Copies n elements; n is small and often shorter than a vector (a run of an image row).
inline void copy_run(float* dst, const float* src, int64_t n) {
#if defined(__AVX512F__)
  for (; n >= 16; n -= 16, dst += 16, src += 16) _mm512_storeu_ps(dst, _mm512_loadu_ps(src));
  if (n > 0) {
    const __mmask16 mask = first_lanes(n);
    _mm512_mask_storeu_ps(dst, mask, _mm512_maskz_loadu_ps(mask, src));
  }
#elif defined(__AVX2__)
  for (; n >= 8; n -= 8, dst += 8, src += 8) _mm256_storeu_ps(dst, _mm256_loadu_ps(src));
  if (n >= 4) {
    _mm_storeu_ps(dst, _mm_loadu_ps(src));
    n -= 4, dst += 4, src += 4;
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
#else
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i];
#endif
}

// dst[i] += src[i]; n is small, as in copy_run.
template <class T>
inline void add_run(T* dst, const T* src, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 mask = first_lanes(n - i);
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, dst + i),
                                       _mm512_maskz_loadu_ps(mask, src + i));
      _mm512_mask_storeu_ps(dst + i, mask, sum);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) dst[i] += src[i];
}

}  // namespace pyvit
