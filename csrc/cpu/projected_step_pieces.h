// How the kernels of projected_step walk over images of any layout, and their vector loads.
#pragma once

#include <algorithm>

#include "projected_step.h"

namespace pyvit {

// Longest stretch that one call of a piece function gets.
inline constexpr int64_t kPiece = 1024;

// A stretch of one image, along its innermost dimension.
template <class S>
struct Piece {
  S* at[kStepOperands];
  int64_t stride[kStepOperands];
  int64_t count;

  // The operand's values side by side: in place, or gathered in `buffer` (kPiece long).
  const S* values(int operand, S* buffer) const {
    if (stride[operand] == 1) return at[operand];
    for (int64_t i = 0; i < count; ++i) buffer[i] = at[operand][i * stride[operand]];
    return buffer;
  }
  // Where to write the operand's values side by side; put() then brings them home.
  S* place(int operand, S* buffer) const { return stride[operand] == 1 ? at[operand] : buffer; }
  void put(int operand, const S* values) const {
    if (values == at[operand]) return;
    for (int64_t i = 0; i < count; ++i) at[operand][i * stride[operand]] = values[i];
  }
};

// f(piece) for the elements [begin, end) of an image, in the order of merge_dimensions.
template <class S, class F>
void for_each_piece(const ProjectedStep& p, int64_t image, int64_t begin, int64_t end, const F& f) {
  const int operands = p.has_momentum ? kStepOperands : kMomentum;
  const int64_t inner = p.sizes.back();
  Piece<S> piece{};
  for (int o = 0; o < operands; ++o) piece.stride[o] = p.strides[o].back();
  while (begin < end) {
    int64_t row = begin / inner;
    const int64_t column = begin % inner;
    int64_t offset[kStepOperands];
    for (int o = 0; o < operands; ++o)
      offset[o] = image * p.batch_stride[o] + column * piece.stride[o];
    for (size_t d = p.sizes.size() - 1; d-- > 0; row /= p.sizes[d])
      for (int o = 0; o < operands; ++o) offset[o] += row % p.sizes[d] * p.strides[o][d];
    piece.count = std::min({kPiece, end - begin, inner - column});
    for (int o = 0; o < operands; ++o) piece.at[o] = static_cast<S*>(p.data[o]) + offset[o];
    f(piece);
    begin += piece.count;
  }
}

// ---- a vector of storage values, widened to the type that is computed in --------------------

template <class S>
struct Wide {  // float, double
  static Vec<S> load(const S* p) { return pyvit::load(p); }
  static void store(S* p, Vec<S> v) { pyvit::store(p, v); }
  static Vec<S> round(Vec<S> v) { return v; }
};

template <>
struct Wide<bfloat16> {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Uint __attribute__((vector_size(kVectorBytes)));

  static Vec<float> load(const bfloat16* p) {
    Half h;
    std::memcpy(&h, p, sizeof h);
    return (Vec<float>)(__builtin_convertvector(h, Uint) << 16);
  }
  // To nearest, ties to even; the low half of each lane is left as it falls. NaN stays NaN: every
  // one here comes from a bfloat16 or from the processor, so its low half is zero.
  static Uint rounded_bits(Vec<float> v) {
    const Uint u = (Uint)v;
    return u + 0x7fffu + ((u >> 16) & 1u);
  }
  static void store(bfloat16* p, Vec<float> v) {
    const Half h = __builtin_convertvector(rounded_bits(v) >> 16, Half);
    std::memcpy(p, &h, sizeof h);
  }
  static Vec<float> round(Vec<float> v) { return (Vec<float>)(rounded_bits(v) & 0xffff0000u); }
};

template <>
struct Wide<float16> {
#if defined(__AVX512F__)
  static Vec<float> load(const float16* p) {
    return widen_bits(_mm256_loadu_si256((const __m256i*)p));
  }
  // The forms with a full mask: gcc 12 warns about an undefined register in the plain ones.
  static Vec<float> widen_bits(__m256i h) { return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, h); }
  static __m256i narrow_bits(Vec<float> v) {
    return _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  }
  static void store(float16* p, Vec<float> v) {
    _mm256_storeu_si256((__m256i*)p, narrow_bits(v));
  }
  static Vec<float> round(Vec<float> v) { return widen_bits(narrow_bits(v)); }
#elif defined(__F16C__)
  static Vec<float> load(const float16* p) {
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
  static __m128i narrow_bits(Vec<float> v) {
    return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  }
  static void store(float16* p, Vec<float> v) { _mm_storeu_si128((__m128i*)p, narrow_bits(v)); }
  static Vec<float> round(Vec<float> v) { return (Vec<float>)_mm256_cvtph_ps(narrow_bits(v)); }
#else
  static Vec<float> load(const float16* p) {
    Vec<float> v{};
    for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
    return v;
  }
  static void store(float16* p, Vec<float> v) {
    for (int i = 0; i < kLanes<float>; ++i) p[i] = narrow<float16>(v[i]);
  }
  static Vec<float> round(Vec<float> v) {
    for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(narrow<float16>(v[i]));
    return v;
  }
#endif
};

// f(position, lanes that count, vector of a, of b, of c) over n elements; the last vectors are
// filled up with zeros.
template <class S, class F>
inline void for_each_vector(const S* a, const S* b, const S* c, int64_t n, const F& f) {
  constexpr int L = kLanes<Compute<S>>;
  using W = Wide<S>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(i, L, W::load(a + i), W::load(b + i), W::load(c + i));
  if (i < n) {
    S last[3][L] = {};
    std::memcpy(last[0], a + i, (n - i) * sizeof(S));
    std::memcpy(last[1], b + i, (n - i) * sizeof(S));
    std::memcpy(last[2], c + i, (n - i) * sizeof(S));
    f(i, static_cast<int>(n - i), W::load(last[0]), W::load(last[1]), W::load(last[2]));
  }
}

// out[i] = f(a[i], b[i], c[i]); f takes and gives vectors.
template <class S, class F>
inline void map_vectors(S* out, const S* a, const S* b, const S* c, int64_t n, const F& f) {
  using V = Vec<Compute<S>>;
  constexpr int L = kLanes<Compute<S>>;
  for_each_vector(a, b, c, n, [&](int64_t i, int count, V va, V vb, V vc) {
    if (count == L) {
      Wide<S>::store(out + i, f(va, vb, vc));
    } else {
      S last[L];
      Wide<S>::store(last, f(va, vb, vc));
      std::memcpy(out + i, last, count * sizeof(S));
    }
  });
}

// ---- sums in double, lane by lane, then lanes in a fixed order ------------------------------

// The lanes of v as double: as many vectors as that takes.
inline void widen_lanes(Vec<double> v, Vec<double>* out) { out[0] = v; }
inline void widen_lanes(Vec<float> v, Vec<double>* out) {
#if defined(__AVX512F__)
  out[0] = (Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  out[1] = (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  out[0] = (Vec<double>)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  out[1] = (Vec<double>)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#else
  typedef float HalfVector __attribute__((vector_size(kVectorBytes / 2)));
  HalfVector half[2];
  std::memcpy(half, &v, sizeof v);
  out[0] = __builtin_convertvector(half[0], Vec<double>);
  out[1] = __builtin_convertvector(half[1], Vec<double>);
#endif
}

template <class T>
class Sum {
 public:
  void add_abs(Vec<T> v) {
    v = v < Vec<T>{} ? -v : v;
    Vec<double> wide[kVectors];
    widen_lanes(v, wide);
    for (int i = 0; i < kVectors; ++i) lanes_[i] += wide[i];
  }
  void add_product(Vec<T> a, Vec<T> b) {
    Vec<double> wide_a[kVectors], wide_b[kVectors];
    widen_lanes(a, wide_a);
    widen_lanes(b, wide_b);
    for (int i = 0; i < kVectors; ++i) lanes_[i] = fma(wide_a[i], wide_b[i], lanes_[i]);
  }
  double total() const {
    double sum = 0;
    for (int i = 0; i < kVectors; ++i) sum += reduce_add<double>(lanes_[i]);
    return sum;
  }

 private:
  static constexpr int kVectors = sizeof(double) / sizeof(T);
  Vec<double> lanes_[kVectors] = {};
};

}  // namespace pyvit
