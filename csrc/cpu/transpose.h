// Transposing by blocks of registers: a packer that must turn rows into columns would otherwise
// spend more time on single elements than the product spends on arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dtypes.h"
#include "simd.h"

namespace pyvit {

// rows[j] lane i ↔ rows[i] lane j. First pairs, then fours of rows are interleaved, within 128-bit
// lanes; then lane L of row 4·g + q holds column 4·L + q of the rows 4·g to 4·g + 3, and whole
// lanes change places.
#if defined(__AVX512F__)
inline void transpose_registers(Vec<float> (&rows)[16]) {
  __m512 pairs[16], fours[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  for (int g = 0; g < 16; g += 4) {
    for (int q = 0; q < 2; ++q) {
      const __m512d low = _mm512_castps_pd(pairs[g + q]);
      const __m512d high = _mm512_castps_pd(pairs[g + q + 2]);
      fours[g + 2 * q] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      fours[g + 2 * q + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int q = 0; q < 4; ++q) {
    const __m512 ab_even = _mm512_shuffle_f32x4(fours[q], fours[4 + q], 0x88);
    const __m512 ab_odd = _mm512_shuffle_f32x4(fours[q], fours[4 + q], 0xdd);
    const __m512 cd_even = _mm512_shuffle_f32x4(fours[8 + q], fours[12 + q], 0x88);
    const __m512 cd_odd = _mm512_shuffle_f32x4(fours[8 + q], fours[12 + q], 0xdd);
    rows[q] = (Vec<float>)_mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    rows[4 + q] = (Vec<float>)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    rows[8 + q] = (Vec<float>)_mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    rows[12 + q] = (Vec<float>)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
}
#elif defined(__AVX2__)
inline void transpose_registers(Vec<float> (&rows)[8]) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int g = 0; g < 8; g += 4) {
    for (int q = 0; q < 2; ++q) {
      const __m256d low = _mm256_castps_pd(pairs[g + q]);
      const __m256d high = _mm256_castps_pd(pairs[g + q + 2]);
      fours[g + 2 * q] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      fours[g + 2 * q + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int q = 0; q < 4; ++q) {
    rows[q] = (Vec<float>)_mm256_permute2f128_ps(fours[q], fours[4 + q], 0x20);
    rows[4 + q] = (Vec<float>)_mm256_permute2f128_ps(fours[q], fours[4 + q], 0x31);
  }
}
#endif

// dst[j * ldd + i] = src[i * lds + j] for i, j < kLanes<T>.
template <class T>
inline void transpose_block(T* dst, int64_t ldd, const T* src, int64_t lds) {
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<T, float>) {
    Vec<float> rows[kLanes<float>];
    for (int i = 0; i < kLanes<float>; ++i) rows[i] = load(src + i * lds);
    transpose_registers(rows);
    for (int j = 0; j < kLanes<float>; ++j) store(dst + j * ldd, rows[j]);
    return;
  }
#endif
  for (int j = 0; j < kLanes<T>; ++j)
    for (int i = 0; i < kLanes<T>; ++i) dst[j * ldd + i] = src[i * lds + j];
}

// The same for rows × columns, both at most kLanes<T>, of any storage type.
template <class T, class S>
inline void transpose_part(T* dst, int64_t ldd, const S* src, int64_t lds, int64_t rows,
                           int64_t columns) {
  constexpr int64_t L = kLanes<T>;
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (std::is_same_v<S, float>) {
    const LaneMask wide = lanes_between(0, columns), high = lanes_between(0, rows);
    Vec<float> block[L];
    for (int i = 0; i < L; ++i)
      block[i] = i < rows ? load_masked(Vec<float>{}, wide, src + i * lds) : Vec<float>{};
    transpose_registers(block);
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j)
      if (j < columns) store_masked(dst + j * ldd, high, block[j]);
    return;
  }
#endif
  T from[L * L] = {}, to[L * L];
  for (int64_t r = 0; r < rows; ++r) widen_run(from + r * L, src + r * lds, columns);
  transpose_block(to, L, static_cast<const T*>(from), L);
  for (int64_t c = 0; c < columns; ++c) widen_run(dst + c * ldd, to + c * L, rows);
}

// dst[j * ldd + i] = widen(src[i * row_stride + j * column_stride]) for i < rows, j < columns.
template <class T, class S>
void transpose(T* dst, int64_t ldd, const S* src, int64_t row_stride, int64_t column_stride,
               int64_t rows, int64_t columns) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < rows; i += L) {
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t height = std::min(L, rows - i), width = std::min(L, columns - j);
      T* to = dst + j * ldd + i;
      const S* from = src + i * row_stride + j * column_stride;
      if (column_stride != 1 || height * width < L) {
        for (int64_t c = 0; c < width; ++c)
          for (int64_t r = 0; r < height; ++r)
            to[c * ldd + r] = widen(from[r * row_stride + c * column_stride]);
        continue;
      }
      if constexpr (std::is_same_v<T, S>) {
        if (height == L && width == L) {
          transpose_block(to, ldd, from, row_stride);
          continue;
        }
      }
      transpose_part(to, ldd, from, row_stride, height, width);
    }
  }
}

}  // namespace pyvit
