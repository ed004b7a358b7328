// C[M,N] = A[M,K] · B[K,N], blocked for the caches (after BLIS), with packing and epilogue left to
// the caller: convolution, patch embedding and attention differ only in where A and B come from
// and where C goes, so they all run on this one loop.
//
//   pack_a(T* dst, m0, mb, k0, kb)  writes A[m0+i, k0+k] to dst[i * Panel<T>::lda + k]
//   pack_b(T* dst, k0, kb, n0, nb)  writes B[k0+k, n0+j] to
//                                   dst[(j / NR) * kb * NR + k * NR + j % NR], zeros past nb
//   epilogue(const T* c, ldc, m0, mb, n0, nb)   takes the finished block
//
// Every element of C is summed in the same order whatever block or tile it falls in: along k
// inside a slice of kc(K), then slice after slice. So a result depends neither on the number of
// threads nor on what else is in the batch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "parallel.h"
#include "simd.h"

namespace pyvit {

template <class T>
struct Panel {
  static constexpr int lanes = kLanes<T>;
  static constexpr int NR = 2 * lanes;
#if defined(__AVX512F__)
  static constexpr int MR = 14;  // 28 accumulators, 2 of B, 1 broadcast: 31 of 32 registers
  static constexpr int64_t MB = 37 * MR;
#else
  static constexpr int MR = 6;  // 12 + 2 + 1 of 16
  static constexpr int64_t MB = 86 * MR;
#endif
  static constexpr int64_t NB = 256;  // one task finishes MB rows × NB columns of C
  static constexpr int64_t KC = 256;
  // A's rows lie a little more than KC apart, so that they do not share a cache set.
  static constexpr int64_t lda = KC + 64 / sizeof(T);
  static constexpr int64_t MC = 4 * MR;  // rows of A packed at a time

  // Bytes of Scratch that a block of mb × nb needs.
  static constexpr int64_t scratch_bytes(int64_t mb, int64_t nb) {
    const int64_t columns = (nb + NR - 1) / NR * NR;
    return Scratch::bytes_for<T>(mb * columns) + Scratch::bytes_for<T>(MC * lda) +
           Scratch::bytes_for<T>(KC * columns);
  }
};
static_assert(Panel<double>::scratch_bytes(Panel<double>::MB, Panel<double>::NB) <= kScratchLimit);

// c[i, 0:NR] (+)= Σ_k a[i, k] · b[k, 0:NR] for `Rows` rows.
template <class T, int Rows>
void micro_kernel(const T* a, const T* b, int64_t kb, T* c, int64_t ldc, bool accumulate) {
  using P = Panel<T>;
  Vec<T> sum[Rows][2] = {};
  for (int64_t k = 0; k < kb; ++k, b += P::NR) {
    const Vec<T> b0 = load(b), b1 = load(b + P::lanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec<T> ai = broadcast(a[i * P::lda + k]);
      sum[i][0] = fma(ai, b0, sum[i][0]);
      sum[i][1] = fma(ai, b1, sum[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i) {
    T* row = c + i * ldc;
    store(row, accumulate ? load(row) + sum[i][0] : sum[i][0]);
    store(row + P::lanes, accumulate ? load(row + P::lanes) + sum[i][1] : sum[i][1]);
  }
}

template <class T>
using MicroKernel = void (*)(const T*, const T*, int64_t, T*, int64_t, bool);

template <class T, int... Rows>
constexpr auto micro_kernel_table(std::integer_sequence<int, Rows...>) {
  return std::array<MicroKernel<T>, sizeof...(Rows)>{micro_kernel<T, Rows + 1>...};
}
template <class T>
inline constexpr auto kMicroKernels =
    micro_kernel_table<T>(std::make_integer_sequence<int, Panel<T>::MR>{});

// c[0:mb, 0:nb] (+)= packed A · packed B.
template <class T>
void multiply_panels(const T* a, int64_t mb, const T* b, int64_t nb, int64_t kb, T* c, int64_t ldc,
                     bool accumulate) {
  using P = Panel<T>;
  for (int64_t j = 0; j < nb; j += P::NR) {
    const T* strip = b + j * kb;
    for (int64_t i = 0; i < mb; i += P::MR) {
      const int64_t rows = std::min<int64_t>(P::MR, mb - i);
      kMicroKernels<T>[rows - 1](a + i * P::lda, strip, kb, c + i * ldc + j, ldc, accumulate);
    }
  }
}

// Length of the slices that K is summed in: equal ones, at most KC.
template <class T>
int64_t slice_length(int64_t K) {
  const int64_t slices = std::max<int64_t>(1, ceil_div(K, Panel<T>::KC));
  return std::max<int64_t>(1, ceil_div(K, slices));
}

// Finishes C[m0 : m0+mb, n0 : n0+nb], summed over [k_begin, k_end), in `scratch`, which has
// scratch_bytes(mb, nb) left and is the caller's again afterwards.
template <class T, class PackA, class PackB, class Epilogue>
void gemm_block(Scratch scratch, int64_t m0, int64_t mb, int64_t n0, int64_t nb, int64_t k_begin,
                int64_t k_end, const PackA& pack_a, const PackB& pack_b,
                const Epilogue& epilogue) {
  using P = Panel<T>;
  const int64_t ldc = round_up(nb, P::NR);
  T* c = scratch.take<T>(mb * ldc);
  T* a = scratch.take<T>(P::MC * P::lda);
  T* b = scratch.take<T>(P::KC * ldc);
  if (k_begin == k_end) std::fill(c, c + mb * ldc, T(0));
  const int64_t slice = slice_length<T>(k_end - k_begin);
  for (int64_t k0 = k_begin; k0 < k_end; k0 += slice) {
    const int64_t kb = std::min(slice, k_end - k0);
    pack_b(b, k0, kb, n0, nb);
    for (int64_t i = 0; i < mb; i += P::MC) {
      const int64_t rows = std::min(P::MC, mb - i);
      pack_a(a, m0 + i, rows, k0, kb);
      multiply_panels(a, rows, b, nb, kb, c + i * ldc, ldc, k0 != k_begin);
    }
  }
  epilogue(static_cast<const T*>(c), ldc, m0, mb, n0, nb);
}

template <class T, class PackA, class PackB, class Epilogue>
void gemm_block(int64_t m0, int64_t mb, int64_t n0, int64_t nb, int64_t k_begin, int64_t k_end,
                const PackA& pack_a, const PackB& pack_b, const Epilogue& epilogue) {
  gemm_block<T>(Scratch(Panel<T>::scratch_bytes(mb, nb)), m0, mb, n0, nb, k_begin, k_end, pack_a,
                pack_b, epilogue);
}

// How C is cut into blocks, one a task: as large as the scratch allows, smaller where that would
// leave threads idle.
template <class T>
struct BlockGrid {
  int64_t M, N, mb, nb, rows, columns;

  BlockGrid(int64_t M_, int64_t N_, int64_t copies = 1) : M(M_), N(N_) {
    using P = Panel<T>;
    const int64_t wanted = 4 * thread_count();
    mb = equal_part(M, P::MB, P::MR);
    nb = equal_part(N, P::NB, P::NR);
    auto tasks = [&] { return ceil_div(M, mb) * ceil_div(N, nb) * copies; };
    while (tasks() < wanted && nb > 2 * P::NR) nb = round_up(nb / 2, P::NR);
    while (tasks() < wanted && mb > 2 * P::MR) mb = round_up(mb / 2, P::MR);
    rows = ceil_div(M, mb);
    columns = ceil_div(N, nb);
  }
  // Cuts `extent` into the fewest parts of at most `most`: the length of one, in whole tiles.
  static int64_t equal_part(int64_t extent, int64_t most, int64_t tile) {
    const int64_t parts = std::max<int64_t>(1, ceil_div(extent, most));
    return round_up(std::max<int64_t>(1, ceil_div(extent, parts)), tile);
  }
  int64_t tasks() const { return rows * columns; }
  // Neighbouring tasks share columns: B is often the larger operand, and stays in cache.
  int64_t m0(int64_t task) const { return task % rows * mb; }
  int64_t n0(int64_t task) const { return task / rows * nb; }
  int64_t height(int64_t task) const { return std::min(mb, M - m0(task)); }
  int64_t width(int64_t task) const { return std::min(nb, N - n0(task)); }
};

}  // namespace pyvit
