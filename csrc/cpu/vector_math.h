// Vector arithmetic that the language's operators do not reach: widening loads, exp, extrema,
// transposition and bit masks of comparisons, for the vectors of simd.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dtypes.h"
#include "simd.h"

namespace pyvit {

// The signed integer as wide as T: what a comparison of Vec<T> yields, lane by lane.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Int = typename IntOf<T>::type;
template <class T>
using Mask = Vec<Int<T>>;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// {0, 1, 2, …}
template <class T, Int<T>... Lane>
constexpr Mask<T> lane_numbers(std::integer_sequence<Int<T>, Lane...>) {
  return Mask<T>{Lane...};
}
template <class T>
constexpr Mask<T> lane_numbers() {
  return lane_numbers<T>(std::make_integer_sequence<Int<T>, kLanes<T>>{});
}

// ---- loads that widen ---------------------------------------------------------------------

inline Vec<float> load_wide(const float* p) { return load(p); }
inline Vec<double> load_wide(const double* p) { return load(p); }
inline Vec<float> load_wide(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (Vec<float>)_mm512_slli_epi32(bits, 16);
#elif defined(__AVX2__)
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return (Vec<float>)_mm256_slli_epi32(bits, 16);
#else
  float lane[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = widen(p[i]);
  return load(lane);
#endif
}
inline Vec<float> load_wide(const float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  float lane[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = widen(p[i]);
  return load(lane);
#endif
}

// The first `count` elements, zeros in the other lanes; reads no further.
template <class S>
inline Vec<Compute<S>> load_partial(const S* p, int64_t count) {
  S lane[kLanes<Compute<S>>] = {};
  std::memcpy(lane, p, static_cast<size_t>(count) * sizeof(S));
  return load_wide(lane);
}

// ---- extrema ------------------------------------------------------------------------------

// A NaN in x leaves the bound as it is: these are what the instructions do, but compilers do not
// recognise `x > bound ? x : bound` in vectors.
inline Vec<float> lane_max(Vec<float> bound, Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)x, (__m512)bound);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)x, (__m256)bound);
#else
  return x > bound ? x : bound;
#endif
}
inline Vec<float> lane_min(Vec<float> bound, Vec<float> x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)x, (__m512)bound);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)x, (__m256)bound);
#else
  return x < bound ? x : bound;
#endif
}
inline Vec<double> lane_max(Vec<double> bound, Vec<double> x) { return x > bound ? x : bound; }
inline Vec<double> lane_min(Vec<double> bound, Vec<double> x) { return x < bound ? x : bound; }

template <class T>
inline T reduce_max(Vec<T> v) {
  return reduce_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return lane_max(a, b); });
}
template <class T>
inline T reduce_min(Vec<T> v) {
  return reduce_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return lane_min(a, b); });
}

// ---- exp ----------------------------------------------------------------------------------

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float lowest = -104.0f, highest = 89.0f;  // exp is 0 below, infinite above
  static constexpr float round = 12582912.0f;                // 1.5 · 2^23
  static constexpr float log2e = 1.44269504088896341f;
  // ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr int degree = 7, mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double lowest = -746.0, highest = 710.0;
  static constexpr double round = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr double log2e = 1.44269504088896340736;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
};

template <class T>
constexpr T reciprocal_factorial(int n) {
  double product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return static_cast<T>(1 / product);
}

// e^x in every lane, about one unit in the last place; exp(-inf) = 0, exp(NaN) = NaN, results
// below the normal numbers rounded once.
//
// x = n·ln 2 + r with |r| <= ln 2 / 2; Taylor's remainder at this degree is under 6e-9 (float32)
// and 5e-18 (float64) of the result. 2^n is applied in two factors, so that it never overflows.
template <class V, class T = std::remove_reference_t<decltype(V{}[0])>>
inline V exp_lanes(V x) {
  using C = ExpConstants<T>;
  const V lowest = broadcast(C::lowest), highest = broadcast(C::highest);
  x = lane_max(x, lowest);  // NaN stays: the bound is what is compared with it
  x = lane_min(x, highest);
  const V shifted = fma(x, broadcast(C::log2e), broadcast(C::round));
  const V n = shifted - broadcast(C::round);
  V r = fma(n, broadcast(-C::ln2_high), x);
  r = fma(n, broadcast(-C::ln2_low), r);
  V sum = broadcast(reciprocal_factorial<T>(C::degree));
#pragma GCC unroll 16
  for (int i = C::degree - 1; i >= 2; --i) sum = fma(sum, r, broadcast(reciprocal_factorial<T>(i)));
  sum = fma(r * r, sum, r) + broadcast(T(1));
  const Mask<T> exponent = bit_cast<Mask<T>>(shifted) - bit_cast<Int<T>>(C::round);
  const Mask<T> half = exponent >> 1;
  const V first = bit_cast<V>((half + Int<T>(C::bias)) << C::mantissa);
  const V second = bit_cast<V>((exponent - half + Int<T>(C::bias)) << C::mantissa);
  return sum * first * second;
}

// ---- transposition ------------------------------------------------------------------------

// {a[o], b[o], a[o+1], b[o+1], …} with o = 0, or half the lanes where Upper.
template <bool Upper, class T, Int<T>... Lane>
inline Vec<T> interleave(Vec<T> a, Vec<T> b, std::integer_sequence<Int<T>, Lane...>) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((Lane % 2) * L + Lane / 2 + Upper * L / 2)...);
#else
  return __builtin_shuffle(a, b, Mask<T>{((Lane % 2) * L + Lane / 2 + Upper * L / 2)...});
#endif
}
template <bool Upper, class T>
inline Vec<T> interleave(Vec<T> a, Vec<T> b) {
  return interleave<Upper, T>(a, b, std::make_integer_sequence<Int<T>, kLanes<T>>{});
}

// rows[i][j] = rows[j][i] for one vector's worth of vectors.
template <class T>
inline void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
#pragma GCC unroll 8
  for (int step = 1; step < L; step *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<false, T>(rows[i], rows[i + L / 2]);
      next[2 * i + 1] = interleave<true, T>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// Lane i of the result is combine() of the lanes of rows[i]: halves with each other, as
// reduce_lanes does it. By recursion, so that it is unrolled whatever the compiler thinks.
template <class T, int Count = kLanes<T>, class Combine>
inline Vec<T> reduce_each(Vec<T>* rows, const Combine& combine) {
  if constexpr (Count == 1) {
    return rows[0];
  } else {
    Vec<T> half[Count / 2];
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i)
      half[i] = combine(interleave<false, T>(rows[i], rows[i + Count / 2]),
                        interleave<true, T>(rows[i], rows[i + Count / 2]));
    return reduce_each<T, Count / 2>(half, combine);
  }
}

template <class T>
inline Vec<T> sum_of_each(Vec<T> (&rows)[kLanes<T>]) {
  return reduce_each<T>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// ---- comparisons as bits ------------------------------------------------------------------

// Bit i is lane i of a comparison's result.
inline uint32_t mask_bits(Vec<int32_t> mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<int32_t>; ++i) bits |= (mask[i] & 1u) << i;
  return bits;
#endif
}
inline uint32_t mask_bits(Vec<int64_t> mask) {
#if defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<int64_t>; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// mask_bits(x >= y), by way of no vector where the instruction set has masks.
template <class T>
inline uint32_t at_least_bits(Vec<T> x, Vec<T> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
#endif
  return mask_bits(x >= y);
}

// The comparison's result that mask_bits gives `bits` for.
template <class T, Int<T>... Lane>
inline Mask<T> bits_mask(uint32_t bits, std::integer_sequence<Int<T>, Lane...>) {
  const Mask<T> flag{(Int<T>(1) << Lane)...};
  return (flag & static_cast<Int<T>>(bits)) != 0;
}
template <class T>
inline Mask<T> bits_mask(uint32_t bits) {
  return bits_mask<T>(bits, std::make_integer_sequence<Int<T>, kLanes<T>>{});
}

}  // namespace pyvit
