// Products of a warp in attention: tiles of scores and of sums, in the layout of mma's results
// whatever multiplies, so that all that is done with scores between two products is written once.
//
// A warp has sixteen rows; a lane has of every eight columns the elements (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1): four lanes share a row. 16-bit elements are multiplied by mma;
// float32 by TF32 mma where it is allowed, else by fused multiply-adds on the same elements, whose
// operands are broadcast to the lanes that need them: 8 FMA for a load of 16 bytes. Rows in
// shared memory are an odd number of 16-byte chunks apart, so that no bank is met twice.
#pragma once

#include <algorithm>

#include "cuda/divide.h"
#include "cuda/dtypes.h"
#include "cuda/hardware.h"
#include "cuda/kinds.cuh"
#include "cuda/topk_attention.h"

namespace pyvit::cuda::attention {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kRows = 16;   // of a warp
constexpr int kPiece = 32;  // columns of scores that a warp makes at once
constexpr int kPieceTiles = kPiece / 8;
constexpr int kScratchPitch = kPiece + 4;
constexpr int kFusedTerms = 32;  // are summed by themselves first: long sums round less
constexpr float kLog2e = 1.4426950408889634f;

template <class Kind>
__device__ float exponential(float x) {
  if constexpr (sizeof(typename Kind::Element) == 2) return exp2_fast(x * kLog2e);
  return expf(x);
}

// ---- rows in shared memory

template <class E>
constexpr int kChunk = 16 / static_cast<int>(sizeof(E));

// Columns are filled up with zeros to whole steps of a product.
__host__ __device__ inline int padded(int columns) { return (columns + 15) / 16 * 16; }
inline int pitch_of(int columns, int element_bytes) {
  return padded(columns) + 16 / element_bytes;
}

// Rows of a matrix in global memory as one call sees them.
struct Source {
  const void* data;
  int64_t stride[3];  // batch, head, row
  bool vectors;       // whether every row begins at a multiple of 16 bytes
};

// `count` rows from `first` of `rows` there are; zeros past the ends. `chunks` of a row. Other
// threads' rows are there after copy_async_wait and a barrier.
template <class E>
__device__ void load_rows(E* to, int pitch, const E* from, int64_t stride, bool vectors, int first,
                          int rows, int count, int columns, const Divisor& chunks) {
  const int all = count * static_cast<int>(chunks.by);
  for (int i = threadIdx.x; i < all; i += blockDim.x) {
    const Quotient at(i, chunks);
    const int row = first + at.quotient, column = at.rest * kChunk<E>;
    const int valid = row < rows ? min(max(columns - column, 0), kChunk<E>) : 0;
    E* chunk = to + at.quotient * pitch + column;
    const E* begin = valid > 0 ? from + row * stride + column : from;
    if (vectors) {
      copy_async16(chunk, begin, valid * static_cast<int>(sizeof(E)));
    } else {
      for (int j = 0; j < kChunk<E>; ++j) chunk[j] = j < valid ? begin[j] : narrow<E>(0.0f);
    }
  }
}

// use(tile, stage) for every tile, once load(tile, stage) has brought it; next(tile) is the tile
// after one, to pass over those that are not wanted. Two stages: one is used while the other
// arrives.
template <class Next, class Load, class Use>
__device__ void stream(int tiles, int stages, const Next& next, const Load& load, const Use& use) {
  int tile = next(-1), stage = 0;
  if (tile < tiles) load(tile, 0);
  copy_async_commit();
#pragma unroll 1
  while (tile < tiles) {
    const int after = next(tile);
    if (stages == 2) {
      if (after < tiles) load(after, 1 - stage);
      copy_async_commit();
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    use(tile, stage);
    __syncthreads();
    if (stages == 2) {
      stage = 1 - stage;
    } else {
      if (after < tiles) load(after, 0);
      copy_async_commit();
    }
    tile = after;
  }
  copy_async_wait<0>();
}

// ---- products

template <int kTiles>
__device__ void clear(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i][e] = 0.0f;
  }
}

// sums[m, n] += Σ_k a[m, k] · b[n, k] of sixteen rows of a and 8 · kTiles of b, `depth` terms (a
// multiple of 16).
template <class Kind, int kTiles>
__device__ void multiply_rows(float (&sums)[kTiles][4], const typename Kind::Element* a,
                              int a_pitch, const typename Kind::Element* b, int b_pitch,
                              int depth) {
  const int lane = threadIdx.x % 32;
  if constexpr (kIsFused<Kind>) {
    const int g = lane / 4, t = lane % 4;
    a += g * a_pitch;
    b += 2 * t * b_pitch;
#pragma unroll 1
    for (int start = 0; start < depth; start += kFusedTerms) {
      float part[kTiles][4];
      clear(part);
      const int end = min(start + kFusedTerms, depth);
#pragma unroll 1
      for (int k = start; k < end; k += 4) {
        const float4 up = *reinterpret_cast<const float4*>(a + k);
        const float4 down = *reinterpret_cast<const float4*>(a + 8 * a_pitch + k);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float4 by = *reinterpret_cast<const float4*>(b + (8 * i + e) * b_pitch + k);
            float &first = part[i][e], &second = part[i][2 + e];
            first = fmaf(up.w, by.w, fmaf(up.z, by.z, fmaf(up.y, by.y, fmaf(up.x, by.x, first))));
            second = fmaf(down.w, by.w,
                          fmaf(down.z, by.z, fmaf(down.y, by.y, fmaf(down.x, by.x, second))));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[i][e] += part[i][e];
      }
    }
  } else {
    static_assert(kTiles % 2 == 0, "fragments of b are loaded in pairs");
    constexpr int kLine = kChunk<typename Kind::Element>;
    a += lane % 16 * a_pitch + lane / 16 * kLine;
    b += (lane % 8 + lane / 16 * 8) * b_pitch + lane / 8 % 2 * kLine;
#pragma unroll 1
    for (int k = 0; k < depth; k += 2 * kLine) {
      uint32_t left[4];
      load_matrix(left, a + k);
      round_fragment<Kind>(left);
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        uint32_t right[4];
        load_matrix(right, b + 8 * i * b_pitch + k);
        round_fragment<Kind>(right);
        multiply_step<Kind>(sums[i], left, {right[0], right[1]});
        multiply_step<Kind>(sums[i + 1], left, {right[2], right[3]});
      }
    }
  }
}

// sums[m, n] += Σ_k w[m, k] · b[k, n] of sixteen terms of 16 bits, and the first `tiles` (even) of
// kTiles tiles of columns.
template <class E, int kTiles>
__device__ void multiply_columns(float (&sums)[kTiles][4], const uint32_t (&w)[4], const E* b,
                                 int pitch, int tiles) {
  const int lane = threadIdx.x % 32;
  b += (lane / 8 % 2 * 8 + lane % 8) * pitch + lane / 16 * 8;
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) {
    if (i >= tiles) break;
    uint32_t right[4];
    load_matrix_transposed(right, b + 8 * i);
    multiply_add<E>(sums[i], w, {right[0], right[1]});
    multiply_add<E>(sums[i + 1], w, {right[2], right[3]});
  }
}

// The same for w in the layout of results, 8 · kDeep terms. `scratch`: 16 rows of the warp's own,
// for float32, whose operands do not have the layout of results.
template <class Kind, int kDeep, int kTiles>
__device__ void multiply_columns(float (&sums)[kTiles][4], const float (&w)[kDeep][4],
                                 float* scratch, const typename Kind::Element* b, int pitch,
                                 int tiles) {
  using E = typename Kind::Element;
  static_assert(kDeep % 2 == 0 && kDeep <= kPieceTiles && kTiles % 2 == 0, "whole steps");
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < kDeep; k += 2) {
      const uint32_t left[4] = {pack<E>(w[k][0], w[k][1]), pack<E>(w[k][2], w[k][3]),
                                pack<E>(w[k + 1][0], w[k + 1][1]),
                                pack<E>(w[k + 1][2], w[k + 1][3])};
      multiply_columns(sums, left, b + 8 * k * pitch, pitch, tiles);
    }
  } else {
    __syncwarp();
#pragma unroll
    for (int k = 0; k < kDeep; ++k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        *reinterpret_cast<float2*>(scratch + (g + 8 * r) * kScratchPitch + 8 * k + 2 * t) = {
            w[k][2 * r], w[k][2 * r + 1]};
      }
    }
    __syncwarp();
    if constexpr (kIsTf32<Kind>) {
#pragma unroll
      for (int k = 0; k < kDeep; ++k) {
        uint32_t left[4];
        load_matrix(left, scratch + lane % 16 * kScratchPitch + 8 * k + lane / 16 * 4);
        round_fragment<Kind>(left);
        const float* line = b + (8 * k + t) * pitch + g;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (i >= tiles) break;
          uint32_t right[2] = {__float_as_uint(line[8 * i]),
                               __float_as_uint(line[4 * pitch + 8 * i])};
          round_fragment<Kind>(right);
          multiply_step<Kind>(sums[i], left, right);
        }
      }
    } else {
      // A piece is summed by itself first: long sums round less.
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        if (i >= tiles) break;
        float part[2][4] = {};
#pragma unroll 1
        for (int k = 0; k < 8 * kDeep; k += 4) {
          float up[4], down[4];
          *reinterpret_cast<float4*>(up) =
              *reinterpret_cast<const float4*>(scratch + g * kScratchPitch + k);
          *reinterpret_cast<float4*>(down) =
              *reinterpret_cast<const float4*>(scratch + (g + 8) * kScratchPitch + k);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* line = b + (k + j) * pitch + 8 * i + 2 * t;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float2 by = *reinterpret_cast<const float2*>(line + 8 * half);
              part[half][0] = fmaf(up[j], by.x, part[half][0]);
              part[half][1] = fmaf(up[j], by.y, part[half][1]);
              part[half][2] = fmaf(down[j], by.x, part[half][2]);
              part[half][3] = fmaf(down[j], by.y, part[half][3]);
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[i + half][e] += part[half][e];
        }
      }
    }
  }
}

// Two neighbouring columns of a row; `even` says that rows have an even number of them.
template <class E>
__device__ void store_pair(E* row, int column, int columns, bool even, float first, float second) {
  if (even && column < columns) {
    if constexpr (sizeof(E) == 2) {
      *reinterpret_cast<uint32_t*>(row + column) = pack<E>(first, second);
    } else {
      *reinterpret_cast<float2*>(row + column) = {first, second};
    }
    return;
  }
  if (column < columns) row[column] = narrow<E>(first);
  if (column + 1 < columns) row[column + 1] = narrow<E>(second);
}

// Of the four lanes that share a row: all get the same bits.
template <class V, class Op>
__device__ V across_quad(V x, const Op& op) {
  x = op(x, __shfl_xor_sync(kAll, x, 1));
  return op(x, __shfl_xor_sync(kAll, x, 2));
}

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};
struct Largest {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Least {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};
struct Union {
  __device__ unsigned operator()(unsigned a, unsigned b) const { return a | b; }
};

// ---- launches

// What a block may take of shared memory. The way of a call is chosen by it: not beyond 160 KB, so
// that it is the same on sm_80 and sm_90; sm_86 and sm_89 have 99 KB.
inline int most_bytes_of_block() {
  return static_cast<int>(std::min<size_t>(most_shared_memory(), 160 * 1024));
}

inline Source source_of(const HeadRows& rows, int element_bytes) {
  bool vectors = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  for (const int64_t stride : rows.stride) vectors &= stride * element_bytes % 16 == 0;
  return {rows.data, {rows.stride[0], rows.stride[1], rows.stride[2]}, vectors};
}

// f(Kind{}) with what multiplies the elements of a dtype.
template <class F>
void dispatch_kind(DType dtype, bool tf32, const F& f) {
  if (dtype == DType::f32) return tf32 ? f(Tf32{}) : f(Fused{});
  dispatch(dtype, [&](auto element) {
    if constexpr (sizeof(element) == 2) f(Halves<decltype(element)>{});
  });
}

}  // namespace pyvit::cuda::attention
