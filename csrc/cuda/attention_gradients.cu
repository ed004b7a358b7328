// Gradients of attention: over chosen keys, over all, and of the k-sparse penalty's terms.
//
// With weights w = exp(scale · q k^T − top) / sum, zero where a key was dropped, dP = dO v^T, and a
// row's penalty terms as csrc/cpu/attention_backward.cpp has them,
//
//   dW = dP + w · (norm + tail where the key is in the tail)
//   dS = scale · w · (dW − Δ),   Δ = Σ w · dW
//   dq = dS k    dk = dS^T q    dv = w^T dO
//
// The forward pass over chosen keys saved a row's largest score and its sum of exponentials, and Δ
// is dO · out; for dense attention attention_terms.cu finds these. One kernel then gives dq by
// blocks of 64 queries, past which keys and values stream; one dk and dv by blocks of 64 keys, past
// which queries and dO stream: nothing is added to by two blocks. Scores are made again in each,
// transposed in the second, so that no result of a product is ever turned. Which keys were chosen
// is read from the saved bits, a word a row and 32 keys; a warp passes over pieces of 32 keys of
// which its sixteen queries chose none, a block over tiles of which none of its queries chose any.
//
// On an H200, (64, 12, 197, 64) in bfloat16: seven products of 2 · 197² · 64 a head, 27 GFLOP, at
// about 500 TFLOP/s of mma.sync 54 µs; it reads q, k, v, dO, out and writes three, 155 MB or 36 µs,
// so that products are the floor. (4, 12, 4096, 64): 0.72 TFLOP, 1.5 ms. A piece of 32 keys costs a
// warp 48 mma for dq (64 for dk and dv); 55 KB of shared memory and 128 registers a thread (160)
// let four blocks share a multiprocessor (three). float32 by FMA: 60 TFLOP/s, 0.45 ms and 12 ms.
// Nothing of this was timed yet.
#include "cuda/attention_gradients.cuh"

namespace pyvit::cuda {
namespace attention {
namespace {

// Tiles of others of which the block's own rows chose none are marked 0. Rows of NaN count as if
// they had chosen all: their NaN must reach dq.
template <bool kByKeys>
__device__ void mark_tiles(const GradientCall& c, const GradientTiling& l, int64_t head,
                           int first_own, uint8_t* flags) {
  for (int i = threadIdx.x; i < l.tiles; i += blockDim.x) flags[i] = 0;
  __syncthreads();
  const int of_row = (c.keys + 7) / 8, own = l.groups * kRows;
  const int first_query = kByKeys ? 0 : first_own;
  const int queries = kByKeys ? c.queries : min(own, c.queries - first_own);
  const int first_byte = kByKeys ? first_own / 8 : 0;
  const int bytes = kByKeys ? min(own / 8, of_row - first_byte) : of_row;
  for (int i = threadIdx.x; i < queries; i += blockDim.x) {
    const int64_t row = head * c.queries + first_query + i;
    const float sum = c.softmax[2 * row + 1];
    if (sum == sum) continue;
    for (int j = 0; j < (kByKeys ? 1 : l.tiles); ++j) flags[kByKeys ? i / l.step : j] = 1;
  }
  // Eight loads of a thread are on their way at once.
  const uint8_t* bits = c.bits + (head * c.queries + first_query) * of_row + first_byte;
  if (kByKeys) {
    const int j = threadIdx.x % 8, by = blockDim.x / 8;  // a block has eight bytes of a row at most
    const int end = j < bytes ? queries : 0;
    for (int start = threadIdx.x / 8; start < end; start += 8 * by) {
      uint8_t some[8];
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        const int i = start + u * by;
        some[u] = i < end ? bits[static_cast<int64_t>(i) * of_row + j] : 0;
      }
#pragma unroll
      for (int u = 0; u < 8; ++u) {
        if (some[u] != 0) flags[(start + u * by) / l.step] = 1;
      }
    }
  } else {
    for (int i = threadIdx.x / 32; i < queries; i += blockDim.x / 32) {
      const uint8_t* line = bits + static_cast<int64_t>(i) * of_row;
#pragma unroll 8
      for (int j = threadIdx.x % 32; j < bytes; j += 32) {
        if (line[j] != 0) flags[j * 8 / l.step] = 1;
      }
    }
  }
  __syncthreads();
}

struct Place {
  int head, block, chunk;
  int64_t batch, head_of_batch;

  __device__ Place(const GradientCall& c, const GradientTiling& l) {
    const Quotient columns(static_cast<int>(blockIdx.x), l.column_chunks);
    const Quotient at(columns.quotient, l.blocks);
    head = at.quotient;
    block = at.rest;
    chunk = columns.rest;
    batch = head / c.heads;
    head_of_batch = head % c.heads;
  }
  template <class E>
  __device__ const E* of(const Source& s) const {
    return static_cast<const E*>(s.data) + batch * s.stride[0] + head_of_batch * s.stride[1];
  }
};

// Rows of results from `first` on, of which the warp has those with g + 8 r < rows.
template <class E, int kTiles>
__device__ void store_rows(const HeadRows& to, const Place& place, int first, int rows, int column,
                           int columns, const float (&sums)[kTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  E* out = static_cast<E*>(to.data) + place.batch * to.stride[0] +
           place.head_of_batch * to.stride[1];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (g + 8 * r >= rows) continue;
    E* line = out + static_cast<int64_t>(first + g + 8 * r) * to.stride[2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      store_pair(line, column + 8 * i + 2 * t, columns, columns % 2 == 0, sums[i][2 * r],
                 sums[i][2 * r + 1]);
    }
  }
}

__device__ inline int tiles_from(int column, int columns, int most) {
  return min(max(padded(columns) - column, 0) / 8, most);
}

template <class Kind, int kTiles>
__global__ void __launch_bounds__(32 * kGradientWarps, kTiles == 8 && !kIsFused<Kind> ? 4 : 1)
    queries_kernel(GradientCall c, GradientTiling l) {
  using E = typename Kind::Element;
  const GradientTiles<Kind> tiles{l, dynamic_shared<char>()};
  const Place place(c, l);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int block_first = place.block * l.groups * kRows, first = block_first + warp * kRows;
  const int rows = min(max(c.queries - first, 0), kRows);
  const int column = place.chunk * 8 * kTiles, wide = tiles_from(column, c.dim, kTiles);
  if (wide == 0) return;
  const E *k = place.of<E>(c.k), *v = place.of<E>(c.v);
  tiles.load(tiles.own(), tiles.own_values(), block_first, l.groups * kRows, c.queries,
             place.of<E>(c.q), c.q, c.dim, place.of<E>(c.grad), c.grad, c.value_dim, true);
  const int64_t row = static_cast<int64_t>(place.head) * c.queries + first;
  RowTerms<Kind> terms[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    terms[r] = row_terms<Kind>(c, row + g + 8 * r, g + 8 * r < rows, true);
  }
  uint8_t* flags = tiles.flags();
  if (c.masked) mark_tiles<false>(c, l, place.head, block_first, flags);
  const bool has_bits = c.masked || c.penalty;
  const int of_row = (c.keys + 7) / 8;

  float sums[kTiles][4];
  clear(sums);
  stream(
      l.tiles, l.stages,
      [&](int tile) {
        do ++tile;
        while (c.masked && tile < l.tiles && flags[tile] == 0);
        return tile;
      },
      [&](int tile, int stage) {
        tiles.load(tiles.stage(stage), tiles.stage_values(stage), tile * l.step, l.step, c.keys, k,
                   c.k, c.dim, v, c.v, c.value_dim, true);
      },
      [&](int tile, int stage) {
#pragma unroll 1
        for (int piece = 0; piece < l.step; piece += kPiece) {
          const int key = tile * l.step + piece;
          if (key >= c.keys || rows == 0) break;
          unsigned own = 0;  // a byte of eight keys of either row
          if (has_bits && key / 8 + t < of_row) {
            const uint8_t* line = c.bits + (row + g) * of_row + key / 8 + t;
            if (g < rows) own = line[0];
            if (g + 8 < rows) own |= static_cast<unsigned>(line[8 * of_row]) << 8;
          }
          if (c.masked && !__any_sync(kAll, own != 0 || terms[0].nan || terms[1].nan)) continue;
          const E* of_keys = tiles.stage(stage) + piece * l.pitch;
          float scores[kPieceTiles][4], products[kPieceTiles][4];
          clear(scores);
          clear(products);
          multiply_rows<Kind>(scores, tiles.own() + warp * kRows * l.pitch, l.pitch, of_keys,
                              l.pitch, padded(c.dim));
          multiply_rows<Kind>(products, tiles.own_values() + warp * kRows * l.value_pitch,
                              l.value_pitch, tiles.stage_values(stage) + piece * l.value_pitch,
                              l.value_pitch, padded(c.value_dim));
#pragma unroll
          for (int i = 0; i < kPieceTiles; ++i) {
            const unsigned bits = has_bits ? __shfl_sync(kAll, own, (lane & ~3) | i) : 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool chosen = (bits >> (e / 2 * 8 + 2 * t + e % 2)) & 1;
              const bool counts = c.masked ? chosen : key + 8 * i + 2 * t + e % 2 < c.keys;
              const RowTerms<Kind>& at = terms[e / 2];
              const float weight = at.weight(scores[i][e] * c.scale, counts, c.one);
              scores[i][e] =
                  at.score_gradient(weight, products[i][e], counts, chosen, c.scale, c);
            }
          }
          multiply_columns<Kind>(sums, scores, tiles.scratch(), of_keys + column, l.pitch, wide);
        }
      });
  store_rows<E>(c.dq, place, first, rows, column, c.dim, sums);
}

template <class Kind, int kTiles>
__global__ void __launch_bounds__(32 * kGradientWarps, 1)
    keys_kernel(GradientCall c, GradientTiling l) {
  using E = typename Kind::Element;
  const GradientTiles<Kind> tiles{l, dynamic_shared<char>()};
  const Place place(c, l);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int block_first = place.block * l.groups * kRows, first = block_first + warp * kRows;
  const int rows = min(max(c.keys - first, 0), kRows);
  const int column = place.chunk * 8 * kTiles;
  const bool needs_k = c.dk.data != nullptr, needs_v = c.dv.data != nullptr;
  const int wide = needs_k ? tiles_from(column, c.dim, kTiles) : 0;
  const int wide_v = needs_v ? tiles_from(column, c.value_dim, kTiles) : 0;
  if (wide == 0 && wide_v == 0) return;
  const E *q = place.of<E>(c.q), *grad = place.of<E>(c.grad);
  tiles.load(tiles.own(), tiles.own_values(), block_first, l.groups * kRows, c.keys,
             place.of<E>(c.k), c.k, c.dim, needs_k ? place.of<E>(c.v) : nullptr, c.v, c.value_dim,
             needs_k);
  uint8_t* flags = tiles.flags();
  if (c.masked) mark_tiles<true>(c, l, place.head, block_first, flags);
  const bool has_bits = c.masked || c.penalty;
  const int of_row = (c.keys + 7) / 8;

  float sums_k[kTiles][4], sums_v[kTiles][4];
  clear(sums_k);
  clear(sums_v);
  stream(
      l.tiles, l.stages,
      [&](int tile) {
        do ++tile;
        while (c.masked && tile < l.tiles && flags[tile] == 0);
        return tile;
      },
      [&](int tile, int stage) {
        tiles.load(tiles.stage(stage), tiles.stage_values(stage), tile * l.step, l.step, c.queries,
                   q, c.q, c.dim, grad, c.grad, c.value_dim, true);
      },
      [&](int tile, int stage) {
#pragma unroll 1
        for (int piece = 0; piece < l.step; piece += kPiece) {
          const int query = tile * l.step + piece;
          if (query >= c.queries || rows == 0) break;
          // A lane reads what is known of one query, and the others get it from there.
          const bool there = query + lane < c.queries;
          const int64_t row = static_cast<int64_t>(place.head) * c.queries + query + lane;
          const RowTerms<Kind> own = row_terms<Kind>(c, row, there, wide > 0);
          unsigned own_bits = 0;
          if (has_bits && there) {
            const uint8_t* line = c.bits + row * of_row + first / 8;
            own_bits = line[0];
            if (first / 8 + 1 < of_row) own_bits |= static_cast<unsigned>(line[1]) << 8;
          }
          if (c.masked && !__any_sync(kAll, own_bits != 0 || own.nan)) continue;
          const E* of_queries = tiles.stage(stage) + piece * l.pitch;
          const E* of_grads = tiles.stage_values(stage) + piece * l.value_pitch;
          float scores[kPieceTiles][4], products[kPieceTiles][4];
          clear(scores);
          clear(products);
          multiply_rows<Kind>(scores, tiles.own() + warp * kRows * l.pitch, l.pitch, of_queries,
                              l.pitch, padded(c.dim));
          if (wide > 0) {
            multiply_rows<Kind>(products, tiles.own_values() + warp * kRows * l.value_pitch,
                                l.value_pitch, of_grads, l.value_pitch, padded(c.value_dim));
          }
#pragma unroll
          for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int from = 8 * i + 2 * t + half;
              RowTerms<Kind> terms{__shfl_sync(kAll, own.top, from),
                                   __shfl_sync(kAll, own.inverse, from),
                                   0.0f, 0.0f, 0.0f, false};
              terms.nan = terms.inverse != terms.inverse;
              if (wide > 0) terms.delta = __shfl_sync(kAll, own.delta, from);
              if (c.penalty) {
                terms.norm = __shfl_sync(kAll, own.norm, from);
                terms.tail = __shfl_sync(kAll, own.tail, from);
              }
              const unsigned bits = has_bits ? __shfl_sync(kAll, own_bits, from) : 0;
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const int e = 2 * r + half;
                const bool chosen = (bits >> (8 * r + g)) & 1;
                const bool counts = c.masked ? chosen : query + from < c.queries;
                scores[i][e] = terms.weight(scores[i][e] * c.scale, counts, c.one);
                if (wide > 0) {
                  products[i][e] = terms.score_gradient(scores[i][e], products[i][e], counts,
                                                        chosen, c.scale, c);
                }
              }
            }
          }
          if (wide_v > 0) {
            multiply_columns<Kind>(sums_v, scores, tiles.scratch(), of_grads + column,
                                   l.value_pitch, wide_v);
          }
          if (wide > 0) {
            multiply_columns<Kind>(sums_k, products, tiles.scratch(), of_queries + column, l.pitch,
                                   wide);
          }
        }
      });
  if (needs_k) store_rows<E>(c.dk, place, first, rows, column, c.dim, sums_k);
  if (needs_v) store_rows<E>(c.dv, place, first, rows, column, c.value_dim, sums_v);
}

template <class Kind, int kTiles>
void run_gradients(const GradientCall& c, int64_t heads, void* stream) {
  if (c.dq.data != nullptr) {
    const GradientTiling l =
        gradient_tiling<Kind>("attention_gradients", c, c.queries, c.keys, 8 * kTiles);
    launch("attention_gradients", queries_kernel<Kind, kTiles>,
           heads * l.blocks.by * l.column_chunks.by, 32 * l.groups, l.bytes, stream, c, l);
  }
  if (c.dk.data != nullptr || c.dv.data != nullptr) {
    const GradientTiling l =
        gradient_tiling<Kind>("attention_gradients", c, c.keys, c.queries, 8 * kTiles);
    launch("attention_gradients", keys_kernel<Kind, kTiles>,
           heads * l.blocks.by * l.column_chunks.by, 32 * l.groups, l.bytes, stream, c, l);
  }
}

// A warp a row.
template <class E>
__global__ void delta_kernel(Source grad, Source out, float* delta, int64_t rows, int heads,
                             int queries, int columns) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t head = row / queries, m = row - head * queries;
  const auto of_row = [&](const Source& s) {
    return static_cast<const E*>(s.data) + head / heads * s.stride[0] + head % heads * s.stride[1] +
           m * s.stride[2];
  };
  const E *one = of_row(grad), *other = of_row(out);
  float sum = 0.0f;
  for (int i = threadIdx.x % 32; i < columns; i += 32) {
    sum = fmaf(widen(one[i]), widen(other[i]), sum);
  }
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(kAll, sum, by);
  if (threadIdx.x % 32 == 0) delta[row] = sum;
}

}  // namespace
}  // namespace attention

void attention_gradients(DType dtype, bool tf32, const AttentionShape& s,
                         const GradientRows& tensors, void* stream) {
  using namespace attention;
  dispatch_kind(dtype, tf32, [&](auto kind) {
    using Kind = decltype(kind);
    constexpr int kSize = sizeof(typename Kind::Element);
    const GradientCall c{source_of(tensors.q, kSize),
                         source_of(tensors.k, kSize),
                         source_of(tensors.v, kSize),
                         source_of(tensors.grad, kSize),
                         tensors.dq,
                         tensors.dk,
                         tensors.dv,
                         tensors.softmax,
                         tensors.delta,
                         tensors.norm,
                         tensors.grad_tail,
                         tensors.selection,
                         static_cast<int>(s.heads),
                         static_cast<int>(s.queries),
                         static_cast<int>(s.keys),
                         static_cast<int>(s.dim),
                         static_cast<int>(s.value_dim),
                         static_cast<float>(s.scale),
                         tensors.selection != nullptr && tensors.norm == nullptr,
                         tensors.norm != nullptr,
                         tensors.one};
    const int64_t heads = s.batch * s.heads;
    if (s.dim <= 64 && s.value_dim <= 64) {
      run_gradients<Kind, 8>(c, heads, stream);
    } else {  // operands of fused products take registers that sums of 128 columns leave too few of
      run_gradients<Kind, kIsFused<Kind> ? 12 : 16>(c, heads, stream);
    }
  });
}

void attention_delta(DType dtype, const AttentionShape& s, HeadRows grad, HeadRows out,
                     float* delta, void* stream) {
  using namespace attention;
  constexpr int kWarps = 8;
  const int64_t rows = s.batch * s.heads * s.queries;
  dispatch(dtype, [&](auto element) {
    using E = decltype(element);
    launch("attention_delta", delta_kernel<E>, (rows + kWarps - 1) / kWarps, 32 * kWarps, 0,
           stream, source_of(grad, sizeof(E)), source_of(out, sizeof(E)), delta, rows,
           static_cast<int>(s.heads), static_cast<int>(s.queries),
           static_cast<int>(s.value_dim));
  });
}

}  // namespace pyvit::cuda
