// The product of row_kernel.h for few destination channels: the lanes that these would leave idle
// take `Fold` terms of the sum side by side, and are added up at the end.
//
//   lane o · Fold + j of B's row r   weight of channel o for the run's element r · Fold + j
//   the same lane of A               the window's element r · Fold + j, for every o
//
// A run whose length is no multiple of Fold ends in a row of zeros, and what lies beyond it in the
// window is masked: it may be infinite, or another's memory.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "row_kernel.h"

namespace pyvit {

template <class T>
struct FoldTile {
#if defined(__AVX512F__)
  static constexpr int pixels = 16;
#else
  static constexpr int pixels = 12;
#endif
};

// Elements p[0 : Fold] again and again.
template <class T, int Fold, int... Lane>
inline Vec<T> load_repeated(const T* p, std::integer_sequence<int, Lane...>) {
  static_assert(sizeof...(Lane) == kLanes<T>);
#if defined(__AVX512F__)
  if constexpr (Fold == kLanes<T>) return load(p);
  if constexpr (Fold * sizeof(T) == 8) {
    double pair;
    std::memcpy(&pair, p, sizeof pair);
    return (Vec<T>)_mm512_set1_pd(pair);
  }
  if constexpr (Fold * sizeof(T) == 16)
    return (Vec<T>)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
  if constexpr (Fold * sizeof(T) == 32)
    return (Vec<T>)_mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double*>(p)));
#elif defined(__AVX2__)
  if constexpr (Fold == kLanes<T>) return load(p);
  if constexpr (Fold * sizeof(T) == 8) {
    double pair;
    std::memcpy(&pair, p, sizeof pair);
    return (Vec<T>)_mm256_set1_pd(pair);
  }
  if constexpr (Fold * sizeof(T) == 16)
    return (Vec<T>)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  return Vec<T>{p[Lane % Fold]...};
}

// Lanes of each group of `Width`: the sums of the first half with the second, those of x in the
// lower half of the vector and those of y in the upper one.
template <class T, int Width, int... Lane>
inline Vec<T> fold_halves(Vec<T> x, Vec<T> y, std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>, half = Width / 2;
  const Vec<T> low = shuffle_lanes<T, (Lane / (L / 2) * L + Lane % (L / 2) / half * Width +
                                       Lane % half)...>(x, y);
  const Vec<T> high = shuffle_lanes<T, (Lane / (L / 2) * L + Lane % (L / 2) / half * Width +
                                        Lane % half + half)...>(x, y);
  return low + high;
}

// Of Count vectors with a pixel each, Count / Width remain, which hold [pixel][channel].
template <class T, int Width, int Count>
inline void fold_lanes(Vec<T>* v) {
  if constexpr (Width > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < Count / 2; ++i)
      v[i] = fold_halves<T, Width>(v[2 * i], v[2 * i + 1],
                                   std::make_integer_sequence<int, kLanes<T>>{});
    fold_lanes<T, Width / 2, Count / 2>(v);
  }
}

// c = base + sums for `rows` pixels of `width` channels. Base rows that all are one (base_pitch 0)
// are repeated through a vector.
template <class T>
void store_folded(const typename RowTile<T>::Arguments& g, const T* sums, int64_t rows,
                  int64_t width) {
  constexpr int64_t L = kLanes<T>;
  const bool same = g.base_pitch == 0;
  if (g.c_pitch == width) {
    const int64_t count = rows * width;
    int64_t i = 0;
    for (; i + L <= count; i += L)
      store(g.c + i, load(g.base + (same ? 0 : i)) + load(sums + i));
    for (; i < count; ++i) g.c[i] = g.base[same ? i % width : i] + sums[i];
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < width; ++o)
      g.c[r * g.c_pitch + o] = g.base[r * g.base_pitch + o] + sums[r * width + o];
}

template <class T>
using MaskLane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// [k]: all bits of the first k lanes of each Fold.
template <class T, int Fold>
constexpr auto fold_masks() {
  std::array<std::array<MaskLane<T>, kLanes<T>>, Fold> masks{};
  for (int k = 0; k < Fold; ++k)
    for (int i = 0; i < kLanes<T>; ++i) masks[k][i] = i % Fold < k ? -1 : 0;
  return masks;
}
template <class T, int Fold>
inline constexpr auto kFoldMasks = fold_masks<T, Fold>();

template <class T, int Fold, int... Row>
inline void fold_kernel(const typename RowTile<T>::Arguments& g,
                        std::integer_sequence<int, Row...>) {
  constexpr int L = kLanes<T>, rows = sizeof...(Row), bases = (rows + 2) / 3;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  constexpr int vectors = (rows + Fold - 1) / Fold;  // of the result
  using Mask = typename VectorOf<MaskLane<T>>::type;
  const int64_t pitch = g.pitch * static_cast<int64_t>(sizeof(T));
  Vec<T> sum[vectors * Fold] = {};
  for (int64_t r = 0; r < g.run_count; ++r) {
    const char* p[bases];
    p[0] = reinterpret_cast<const char*>(g.a + g.runs[r].offset);
#pragma GCC unroll 6
    for (int i = 1; i < bases; ++i) p[i] = p[i - 1] + 3 * pitch;
    const T* b = g.b + g.runs[r].k * L;
    auto window = [&](int row) {
      return load_repeated<T, Fold>(
          reinterpret_cast<const T*>(p[row / 3] + row % 3 * pitch), lanes);
    };
    int64_t k = g.runs[r].length;
    for (; k >= Fold; k -= Fold, b += L) {
      const Vec<T> bk = load(b);
      ((sum[Row] = fma(window(Row), bk, sum[Row])), ...);
#pragma GCC unroll 6
      for (int i = 0; i < bases; ++i) {
        p[i] += Fold * sizeof(T);
        asm("" : "+r"(p[i]));  // or the compiler makes it one pointer a row, which spills
      }
    }
    if (k > 0) {
      Mask mask;
      std::memcpy(&mask, kFoldMasks<T, Fold>[k].data(), sizeof mask);
      const Vec<T> bk = load(b);
      ((sum[Row] = fma((Vec<T>)((Mask)window(Row) & mask), bk, sum[Row])), ...);
    }
  }
  fold_lanes<T, Fold, vectors * Fold>(sum);
  T sums[vectors * L];
  for (int i = 0; i < vectors; ++i) store(sums + i * L, sum[i]);
  store_folded<T>(g, sums, rows, L / Fold);
}

// The rows [k][width] of a run's weights as rows of B: to[r][o][j] = from[r · Fold + j][o].
template <class T, int Fold, int... Lane>
inline void fold_weights(T* to, const T* from, int64_t length,
                         std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>, width = L / Fold;
  for (; length >= Fold; length -= Fold, from += L, to += L) {
    const Vec<T> rows = load(from);
    store(to, shuffle_lanes<T, (Lane % Fold * width + Lane / Fold)...>(rows, rows));
  }
  if (length == 0) return;
  for (int i = 0; i < L; ++i) to[i] = i % Fold < length ? from[i % Fold * width + i / Fold] : T(0);
}

template <class T>
struct FoldKernels {
  std::array<typename RowTile<T>::Kernel, FoldTile<T>::pixels> rows;
  void (*weights)(T* to, const T* from, int64_t length);
};

template <class T, int Fold, int Rows>
void fold_kernel_of(const typename RowTile<T>::Arguments& g) {
  fold_kernel<T, Fold>(g, std::make_integer_sequence<int, Rows>{});
}
template <class T, int Fold>
void fold_weights_of(T* to, const T* from, int64_t length) {
  fold_weights<T, Fold>(to, from, length, std::make_integer_sequence<int, kLanes<T>>{});
}
template <class T, int Fold, int... Rows>
constexpr FoldKernels<T> fold_kernels_of(std::integer_sequence<int, Rows...>) {
  return {{fold_kernel_of<T, Fold, Rows + 1>...}, fold_weights_of<T, Fold>};
}

// Fold is 2, 4, … up to the lanes of a vector.
template <class T>
inline const FoldKernels<T>& fold_kernels(int64_t fold) {
  constexpr auto rows = std::make_integer_sequence<int, FoldTile<T>::pixels>{};
  static constexpr FoldKernels<T> two = fold_kernels_of<T, 2>(rows);
  if constexpr (kLanes<T> >= 4) {
    static constexpr FoldKernels<T> four = fold_kernels_of<T, 4>(rows);
    if (fold == 4) return four;
  }
  if constexpr (kLanes<T> >= 8) {
    static constexpr FoldKernels<T> eight = fold_kernels_of<T, 8>(rows);
    if (fold == 8) return eight;
  }
  if constexpr (kLanes<T> >= 16) {
    static constexpr FoldKernels<T> sixteen = fold_kernels_of<T, 16>(rows);
    if (fold == 16) return sixteen;
  }
  return two;
}

}  // namespace pyvit
