// The matrix product of a block's tile, out of shared memory, for every kernel that has one:
//
//     sums[m, n] += Σ_k a[m, k] · b[n, k]
//
// The caller brings slabs of both operands into shared memory, in chunks of 16 bytes that any
// thread may copy or make (that is what differs between kernels); pipeline() overlaps that with
// the products of slabs that have arrived. 16-bit elements are multiplied by mma with sums in
// float32; float32 by TF32 mma or by fused multiply-adds, which round once each. The terms of a sum
// are added in the order of k (of fused products slab by slab) whatever the tile, so that a result
// does not depend on its neighbours.
#pragma once

#include "cuda/kinds.cuh"

namespace pyvit::cuda {

// ---- a slab of an operand

// kRows rows (of the result, or its columns) by kTerms terms of their sums. Deep: a line is a row
// and its terms lie side by side; else a line is a term and the rows lie side by side: as the
// operand lies in memory, so that copies need no transposition. Lines are an odd number of chunks
// apart (wide float32, which ldmatrix cannot turn: 8 words modulo 32), so that neither ldmatrix nor
// the loads of fused products meet a bank twice.
template <class E, int kRows_, int kTerms_, bool kDeep_>
struct Slab {
  static constexpr int kRows = kRows_, kTerms = kTerms_;
  static constexpr bool kDeep = kDeep_;
  static constexpr int kChunk = 16 / sizeof(E);  // elements
  static constexpr int kLines = kDeep ? kRows : kTerms, kAcross = kDeep ? kTerms : kRows;
  static constexpr int kChunks = kAcross / kChunk;  // of a line
  static constexpr int kPitch =
      16 * (!kDeep && sizeof(E) == 4 ? kChunks + 2 : kChunks + (kChunks + 1) % 2);
  static constexpr int kBytes = kLines * kPitch;
  static_assert(kAcross % kChunk == 0 && kRows % 8 == 0, "whole chunks");

  char* memory;  // aligned to 16 bytes

  __device__ char* chunk(int line, int chunk) const { return memory + line * kPitch + chunk * 16; }
  __device__ const float* floats(int row, int term) const {
    return reinterpret_cast<const float*>(
        memory + (kDeep ? row * kPitch + term * 4 : term * kPitch + row * 4));
  }
};

// ---- fragments of mma

constexpr int kStepBytes = 32;  // of terms in one mma: 16 elements of 16 bits, or 8 of 32

// Rows first … first + 15 of a, of the step's terms.
template <class Kind, class S>
__device__ void load_a(uint32_t (&r)[4], const S& slab, int first, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (S::kDeep) {
    load_matrix(r, slab.chunk(first + lane % 16, 2 * step + lane / 16));
  } else if constexpr (!kIsTf32<Kind>) {
    load_matrix_transposed(
        r, slab.chunk(16 * step + lane % 8 + lane / 16 * 8, first / 8 + lane / 8 % 2));
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      r[j] = __float_as_uint(*slab.floats(first + g + j % 2 * 8, 8 * step + t + j / 2 * 4));
    }
  }
  round_fragment<Kind>(r);
}

// Rows first … first + 15 of b: registers 0 and 1 are of the first eight, 2 and 3 of the others.
template <class Kind, class S>
__device__ void load_b(uint32_t (&r)[4], const S& slab, int first, int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (S::kDeep) {
    load_matrix(r, slab.chunk(first + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
  } else if constexpr (!kIsTf32<Kind>) {
    load_matrix_transposed(
        r, slab.chunk(16 * step + lane % 8 + lane / 8 % 2 * 8, first / 8 + lane / 16));
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      r[j] = __float_as_uint(*slab.floats(first + g + j / 2 * 8, 8 * step + t + j % 2 * 4));
    }
  }
  round_fragment<Kind>(r);
}

// ---- the sums of a block

// kWarpsM · kWarpsN warps, each with a rectangle of kM x kN results. `kDeepA` and `kDeepB` are the
// operands' orientations: threads of fused products own their rows accordingly.
template <class Kind, int kM_, int kN_, int kWarpsM, int kWarpsN, bool kDeepA = true,
          bool kDeepB = true>
struct Product {
  static constexpr int kM = kM_, kN = kN_, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = kM / kWarpsM, kColumns = kN / kWarpsN;  // of a warp
  static constexpr bool kFused = kIsFused<Kind>;
  // Fused: a warp's lanes, and what each has in either direction.
  static constexpr int kLanesM = 8, kLanesN = 4;
  static constexpr int kMine = kRows / kLanesM, kMineAcross = kColumns / kLanesN;
  static_assert(kRows % (kFused ? 32 : 16) == 0 && kColumns % 16 == 0, "whole fragments");
  using Element = typename Kind::Element;

  // mma: [rows / 16][columns / 8][4]. Fused: [own rows][own columns].
  float sums[kRows * kColumns / 32];

  __device__ void clear() {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
  }

  // Adds the products of a slab, in steps of kStepBytes of its terms.
  template <int kTerms>
  __device__ void add(const Slab<Element, kM, kTerms, kDeepA>& a,
                      const Slab<Element, kN, kTerms, kDeepB>& b) {
    const int warp = threadIdx.x / 32;
    const int first_row = warp / kWarpsN * kRows, first_column = warp % kWarpsN * kColumns;
    if constexpr (kFused) {
      add_fused(a, b, first_row, first_column);
    } else {
      constexpr int kSteps = kTerms * static_cast<int>(sizeof(Element)) / kStepBytes;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) add_step(a, b, first_row, first_column, step);
    }
  }

  // f(row, column, sum) for each of the thread's results, all threads in step: the order of calls
  // is the same for every thread, and results 2i, 2i + 1 of mma are neighbours in a row.
  template <class F>
  __device__ void for_each(const F& f) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_row = warp / kWarpsN * kRows, first_column = warp % kWarpsN * kColumns;
    if constexpr (kFused) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
#pragma unroll
        for (int j = 0; j < kMineAcross; ++j) {
          f(first_row + own<kDeepA, kLanesM>(lane / kLanesN, i),
            first_column + own<kDeepB, kLanesN>(lane % kLanesN, j), sums[i * kMineAcross + j]);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(sums) / sizeof(float)); ++i) {
        const int block = i / 4;
        f(first_row + block / (kColumns / 8) * 16 + i % 4 / 2 * 8 + lane / 4,
          first_column + block % (kColumns / 8) * 8 + lane % 4 * 2 + i % 2, sums[i]);
      }
    }
  }

 private:
  // The i-th row of a lane: of a deep operand neighbouring lanes read neighbouring lines, of a wide
  // one each lane reads chunks.
  template <bool kDeep, int kLanes>
  __device__ static int own(int lane, int i) {
    return kDeep ? lane + kLanes * i : 4 * (lane + kLanes * (i / 4)) + i % 4;
  }

  template <class A, class B>
  __device__ void add_step(const A& a, const B& b, int first_row, int first_column, int step) {
    uint32_t left[kRows / 16][4], right[kColumns / 16][4];
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) load_a<Kind>(left[i], a, first_row + 16 * i, step);
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) load_b<Kind>(right[j], b, first_column + 16 * j, step);
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        float (&d)[4] = reinterpret_cast<float (&)[4]>(sums[4 * (i * (kColumns / 8) + j)]);
        const uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        multiply_step<Kind>(d, left[i], pair);
      }
    }
  }

  // values[k][r]: terms 4·step + k of rows `quad` · 4 + r of those that the lane has.
  template <int kLanes, class S>
  __device__ static void load_quad(float (&values)[4][4], const S& slab, int first, int lane,
                                   int quad, int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (S::kDeep) {
        const float4 four = *reinterpret_cast<const float4*>(
            slab.floats(first + own<true, kLanes>(lane, 4 * quad + i), 4 * step));
        values[0][i] = four.x, values[1][i] = four.y, values[2][i] = four.z, values[3][i] = four.w;
      } else {
        const float4 four = *reinterpret_cast<const float4*>(
            slab.floats(first + own<false, kLanes>(lane, 4 * quad), 4 * step + i));
        values[i][0] = four.x, values[i][1] = four.y, values[i][2] = four.z, values[i][3] = four.w;
      }
    }
  }

  // The slab's terms first by themselves: a long sum's error grows with the number of slabs then.
  template <class A, class B>
  __device__ void add_fused(const A& a, const B& b, int first_row, int first_column) {
    const int lane = threadIdx.x % 32;
    float of_slab[kMine * kMineAcross] = {};
#pragma unroll 1
    for (int step = 0; step < A::kTerms / 4; ++step) {
      float right[kMineAcross / 4][4][4];
#pragma unroll
      for (int j = 0; j < kMineAcross / 4; ++j) {
        load_quad<kLanesN>(right[j], b, first_column, lane % kLanesN, j, step);
      }
#pragma unroll
      for (int i = 0; i < kMine / 4; ++i) {
        float left[4][4];
        load_quad<kLanesM>(left, a, first_row, lane / kLanesN, i, step);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int row = 0; row < 4; ++row) {
#pragma unroll
            for (int j = 0; j < kMineAcross; ++j) {
              float& sum = of_slab[(4 * i + row) * kMineAcross + j];
              sum = fmaf(left[k][row], right[j / 4][k][j % 4], sum);
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMine * kMineAcross; ++i) sums[i] += of_slab[i];
  }
};

// ---- bringing slabs while others are multiplied

// start(slab, stage) begins to bring a slab into a stage of shared memory: asynchronous copies, or
// loads into registers, which finish(stage) then writes there. multiply(stage) runs once all of a
// slab is there. Ends with every thread past its last use of shared memory. One barrier a slab: a
// stage is written again only after the barrier that follows its last use.
template <int kStages, class Start, class Finish, class Multiply>
__device__ void pipeline(int slabs, const Start& start, const Finish& finish,
                         const Multiply& multiply) {
  static_assert(kStages >= 2, "one stage is multiplied while another is filled");
#pragma unroll 1
  for (int slab = 0; slab < kStages - 1; ++slab) {
    if (slab < slabs) {
      start(slab, slab);
      finish(slab);
    }
    copy_async_commit();
  }
  int stage = 0, next_stage = kStages - 1;
#pragma unroll 1
  for (int slab = 0; slab < slabs; ++slab) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    const int next = slab + kStages - 1;
    if (next < slabs) start(next, next_stage);
    copy_async_commit();
    multiply(stage);
    if (next < slabs) finish(next_stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next_stage = next_stage + 1 == kStages ? 0 : next_stage + 1;
  }
  copy_async_wait<0>();
  __syncthreads();
}

}  // namespace pyvit::cuda
