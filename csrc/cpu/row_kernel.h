// C[pixel, channel] = base + Σ_k A[pixel, k] · B[k, channel] for a few pixels of one image row,
// with A read where the image lies: the rows of A are windows on one band of memory, a constant
// distance apart, and k walks through runs of it (the rows of the kernel). Nothing is unfolded.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace pyvit {

// Elements [offset, offset + length) from the first element of a window, which meet the rows of B
// from k on.
struct BandRun {
  int64_t offset, length, k;
};

// The longest sum that is kept in registers: longer ones round more, shorter ones cost 1 % and more.
constexpr int64_t kChainLength = 256;

template <class T>
struct RowTile {
  static constexpr int lanes = kLanes<T>;
#if defined(__AVX512F__)
  static constexpr int pixels = 14, vectors = 2;  // 28 sums, 2 of B, 1 broadcast: 31 registers
#else
  static constexpr int pixels = 4, vectors = 3;  // 12 + 3 + 1 of 16; narrow images fill 4 pixels
#endif
  static constexpr int strip = vectors * lanes;  // channels of a whole strip of B
  // With fewer vectors more pixels keep as many sums under way.
#if defined(__AVX512F__)
  static constexpr int pixels_of(int64_t) { return pixels; }
#else
  static constexpr int pixels_of(int64_t count) { return pixels * vectors / count; }
#endif

  struct Arguments {
    const T* a;      // first window
    int64_t pitch;   // elements from one window to the next
    const BandRun* runs;
    int64_t run_count;
    const T* b;      // [k][channels of the strip]
    const T* base;   // what the sums are added to: row i at base + i · base_pitch
    int64_t base_pitch;
    T* c;
    int64_t c_pitch;
  };
  using Kernel = void (*)(const Arguments&);
};

// A panel of B, `rows` long and `width` wide: strips one behind the other, the last with no more
// vectors than it needs.
template <class T>
struct Strips {
  static constexpr int64_t strip = RowTile<T>::strip;
  T* to;
  int64_t rows, width;
  int64_t vector = kLanes<T>;  // the last strip's width is a multiple of it

  int64_t lanes(int64_t d) const {
    const int64_t left = width - d / strip * strip;
    return left >= strip ? strip : (left + vector - 1) / vector * vector;
  }
  T* at(int64_t k, int64_t d) const {
    return to + d / strip * strip * rows + k * lanes(d) + d % strip;
  }
};

// x86 addresses reach base + {0, 1, 2} · pitch; every third row has a pointer of its own.
template <class T, int Vectors, int... Row>
inline void row_kernel(const typename RowTile<T>::Arguments& g,
                       std::integer_sequence<int, Row...>) {
  constexpr int L = kLanes<T>, rows = sizeof...(Row), bases = (rows + 2) / 3;
  const int64_t pitch = g.pitch * static_cast<int64_t>(sizeof(T));
  Vec<T> sum[rows][Vectors] = {};
  for (int64_t r = 0; r < g.run_count; ++r) {
    const char* p[bases];
    p[0] = reinterpret_cast<const char*>(g.a + g.runs[r].offset);
#pragma GCC unroll 5
    for (int i = 1; i < bases; ++i) p[i] = p[i - 1] + 3 * pitch;
    const T* b = g.b + g.runs[r].k * Vectors * L;
    for (int64_t k = g.runs[r].length; k > 0; --k, b += Vectors * L) {
      Vec<T> bv[Vectors];
      for (int v = 0; v < Vectors; ++v) bv[v] = load(b + v * L);
      auto multiply = [&](int row) {
        const Vec<T> ai =
            broadcast(*reinterpret_cast<const T*>(p[row / 3] + row % 3 * pitch));
        for (int v = 0; v < Vectors; ++v) sum[row][v] = fma(ai, bv[v], sum[row][v]);
      };
      (multiply(Row), ...);
#pragma GCC unroll 5
      for (int i = 0; i < bases; ++i) {
        p[i] += sizeof(T);
        asm("" : "+r"(p[i]));  // or the compiler makes it one pointer a row, which spills
      }
    }
  }
  const T* base = g.base;
  T* c = g.c;
  const int64_t base_pitch = g.base_pitch, c_pitch = g.c_pitch;  // stores might alias g
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i, base += base_pitch, c += c_pitch)
    for (int v = 0; v < Vectors; ++v) store(c + v * L, load(base + v * L) + sum[i][v]);
}

template <class T, int Vectors, int Rows>
void row_kernel_of(const typename RowTile<T>::Arguments& g) {
  row_kernel<T, Vectors>(g, std::make_integer_sequence<int, Rows>{});
}

template <class T, int Vectors, int... Rows>
constexpr auto row_kernel_table(std::integer_sequence<int, Rows...>) {
  return std::array<typename RowTile<T>::Kernel, sizeof...(Rows)>{
      row_kernel_of<T, Vectors, Rows + 1>...};
}
template <class T, int Vectors>
inline constexpr auto kRowKernels =
    row_kernel_table<T, Vectors>(
        std::make_integer_sequence<int, RowTile<T>::pixels_of(Vectors)>{});

template <class T, int... Vectors>
constexpr auto row_kernels_by_vectors(std::integer_sequence<int, Vectors...>) {
  return std::array<const typename RowTile<T>::Kernel*, sizeof...(Vectors)>{
      kRowKernels<T, Vectors + 1>.data()...};
}
template <class T>
inline constexpr auto kRowKernelTable =
    row_kernels_by_vectors<T>(std::make_integer_sequence<int, RowTile<T>::vectors>{});

// `rows` windows × a strip of so many vectors; at most pixels_of(vectors) rows.
template <class T>
inline void run_row_kernel(int64_t rows, int64_t vectors,
                           const typename RowTile<T>::Arguments& g) {
  kRowKernelTable<T>[vectors - 1][rows - 1](g);
}

}  // namespace pyvit
