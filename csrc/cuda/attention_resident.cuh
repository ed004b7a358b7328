// The forward pass where all scores of sixteen queries fit a warp's registers: up to 256 keys of 16
// bits, as vision transformers have them. See topk_attention.cu.
//
// All keys and values of a head lie in shared memory; a warp makes its sixteen rows of scores,
// cuts them (a row's counts meet by two shuffles of four lanes), and multiplies the weights
// with the values from where they are: nothing of the size of the scores leaves the registers.
#pragma once

#include "cuda/attention_rows.cuh"

namespace pyvit::cuda::attention {

struct ResidentTiling {
  int warps, pitch, value_pitch;
  Divisor blocks, chunks, value_chunks;
  int keys_at, values_at, flags_at, bytes;
};

constexpr int kResidentWarps = 4;

// For cut_rows.
template <int kTiles>
struct ResidentScores {
  float (&scores)[kTiles][4];
  int t;

  __device__ bool any(bool x) const { return __any_sync(kAll, x); }
  template <class F>
  __device__ void count(int (&count)[2], const F& holds) const {
    count[0] = count[1] = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        count[e / 2] += holds(e / 2, scores[i][e], 8 * i + 2 * t + e % 2);
      }
    }
    count[0] = across_quad(count[0], Sum{});
    count[1] = across_quad(count[1], Sum{});
  }
};

// Of scores that are 0 past the last key: sums need no mask, and the least score may be taken for
// less than it is. `top` is found after those have become -inf.
template <int kTiles>
__device__ RowRange range_of(const float (&scores)[kTiles][4], int r, int keys, bool& strange) {
  float bottom = INFINITY, total = 0.0f, squares = 0.0f;
  unsigned bad = 0;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float score = scores[i][2 * r + half];
      bottom = fminf(bottom, score);
      total += score;
      squares = fmaf(score, score, squares);
      bad |= !(score < INFINITY);
    }
  }
  strange = across_quad(bad, Union{}) != 0;
  return {-INFINITY, across_quad(bottom, Least{}), across_quad(total, Sum{}),
          across_quad(squares, Sum{}), keys, false};
}
template <int kTiles>
__device__ float top_of(const float (&scores)[kTiles][4], int r) {
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    top = fmaxf(top, fmaxf(scores[i][2 * r], scores[i][2 * r + 1]));
  }
  return across_quad(top, Largest{});
}

// Which keys of piece `p` have a weight that was not dropped, four bits a tile: the weights of the
// others are -0.
template <int kTiles>
__device__ unsigned marks_of(const uint32_t (&weights)[kTiles][2], int p) {
  unsigned marks = 0;
#pragma unroll
  for (int i = 0; i < kPieceTiles; ++i) {
    if (kPieceTiles * p + i >= kTiles) break;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t kept = ~weights[kPieceTiles * p + i][r];
      marks |= ((kept >> 15 & 1) | (kept >> 30 & 2)) << (4 * i + 2 * r);
    }
  }
  return marks;
}

template <class T, int kTiles>
__global__ void __launch_bounds__(32 * kResidentWarps, kTiles <= 26 ? 3 : 2)
    resident_kernel(ForwardCall c, ResidentTiling l) {
  using Kind = Halves<T>;
  constexpr int kPieces = (kTiles + kPieceTiles - 1) / kPieceTiles;
  const Quotient place(static_cast<int>(blockIdx.x), l.blocks);
  const int batch = place.quotient / c.heads, head = place.quotient % c.heads;
  const auto of_head = [&](const Source& s) {
    return static_cast<const T*>(s.data) + batch * s.stride[0] + head * s.stride[1];
  };
  char* memory = dynamic_shared<char>();
  T* keys = reinterpret_cast<T*>(memory + l.keys_at);
  T* values = reinterpret_cast<T*>(memory + l.values_at);
  int* flags = reinterpret_cast<int*>(memory + l.flags_at);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int block_first = place.rest * l.warps * kRows, first = block_first + warp * kRows;
  const int rows = min(max(c.queries - first, 0), kRows);

  load_rows(reinterpret_cast<T*>(memory), l.pitch, of_head(c.q), c.q.stride[2], c.q.vectors,
            block_first, c.queries, l.warps * kRows, c.dim, l.chunks);
  load_rows(keys, l.pitch, of_head(c.k), c.k.stride[2], c.k.vectors, 0, c.keys, 8 * kTiles, c.dim,
            l.chunks);
  copy_async_commit();
  load_rows(values, l.value_pitch, of_head(c.v), c.v.stride[2], c.v.vectors, 0, c.keys, 8 * kTiles,
            c.value_dim, l.value_chunks);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();

  uint32_t weights[kTiles][2];
  float sum[2] = {1.0f, 1.0f};  // NaN where the row is
  if (rows > 0) {
    float scores[kTiles][4];
    clear(scores);
    multiply_rows<Kind>(scores, reinterpret_cast<const T*>(memory) + warp * kRows * l.pitch,
                        l.pitch, keys, l.pitch, padded(c.dim));
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[i][e] *= c.scale;
    }
    Weigher<Kind, false> weigher;
    {
      RowRange range[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) range[r] = range_of(scores, r, c.keys, weigher.strange[r]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * i + 2 * t + e % 2 >= c.keys) scores[i][e] = -INFINITY;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float top = top_of(scores, r);
        weigher.strange[r] |= top == -INFINITY;
        range[r].top = top;
        range[r].searched = !weigher.strange[r] && g + 8 * r < rows;
        weigher.top[r] = top;
        weigher.cut[r] = {-INFINITY, c.keys - 1};
      }
      ResidentScores<kTiles> all{scores, t};
      if (c.selects) cut_rows(all, range, c.keys, c.wanted, c.place, weigher.cut);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      weigher.weigh(scores[i], 8 * i + 2 * t, true);
      weights[i][0] = pack<T>(scores[i][0], scores[i][1]);
      weights[i][1] = pack<T>(scores[i][2], scores[i][3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] = across_quad(weigher.sums[r].sum, Sum{});
      if (weigher.strange[r]) sum[r] = NAN;
    }
    const int64_t row = static_cast<int64_t>(place.quotient) * c.queries + first;
    if (c.saved.selection != nullptr) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        weigher.store_bits(marks_of(weights, p), kPiece * p, c.wanted, row, rows, c.keys,
                           c.saved.selection);
      }
    }
    if (c.saved.softmax != nullptr && t == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (g + 8 * r >= rows) continue;
        c.saved.softmax[2 * (row + g + 8 * r)] = weigher.top[r];
        c.saved.softmax[2 * (row + g + 8 * r) + 1] = sum[r];
      }
    }
  }
  copy_async_wait<0>();
  __syncthreads();

  bool extremes = false;
#pragma unroll 1
  for (int column = 0; column < c.value_dim;) {
    float result[kValueTiles][4];
    clear(result);
    bool spoilt = false;
    if (rows > 0) {
      const int tiles = min(kValueTiles, (padded(c.value_dim) - column) / 8);
#pragma unroll
      for (int i = 0; i < kTiles; i += 2) {
        const uint32_t pair[4] = {weights[i][0], weights[i][1], weights[i + 1][0],
                                  weights[i + 1][1]};
        multiply_columns(result, pair, values + 8 * i * l.value_pitch + column, l.value_pitch,
                         tiles);
      }
      if (extremes) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) {
          add_extremes(result, marks_of(weights, p), flags + kPiece * p,
                       of_head(c.v) + kPiece * p * c.v.stride[2], c.v.stride[2], column,
                       c.value_dim);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (g + 8 * r >= rows) continue;
        const float inverse = 1.0f / sum[r];
        T* out = static_cast<T*>(c.out) + batch * c.out_stride[0] + head * c.out_stride[1] +
                 static_cast<int64_t>(first + g + 8 * r) * c.out_stride[2];
#pragma unroll
        for (int i = 0; i < kValueTiles; ++i) {
          const float one = result[i][2 * r], other = result[i][2 * r + 1];
          spoilt |= sum[r] == sum[r] && (one != one || other != other);
          store_pair(out, column + 8 * i + 2 * t, c.value_dim, c.value_dim % 2 == 0,
                     one * inverse, other * inverse);
        }
      }
    }
    if (c.selects && !extremes && __syncthreads_or(spoilt)) {
      clean(values, l.value_pitch, 8 * kTiles, padded(c.value_dim), flags);
      extremes = true;
    } else {
      column += 8 * kValueTiles;
    }
  }
}

// Whether it was launched: some head dimensions leave no room for all keys and values.
template <class T, int kTiles>
bool resident(const char* name, const ForwardCall& c, int64_t heads, int most_bytes,
              void* stream) {
  ResidentTiling l{};
  const int groups = (c.queries + kRows - 1) / kRows;
  const int blocks = (groups + kResidentWarps - 1) / kResidentWarps;
  l.warps = (groups + blocks - 1) / blocks;
  l.pitch = pitch_of(c.dim, 2);
  l.value_pitch = pitch_of(c.value_dim, 2);
  l.blocks = Divisor((groups + l.warps - 1) / l.warps);
  l.chunks = Divisor(padded(c.dim) / 8);
  l.value_chunks = Divisor(padded(c.value_dim) / 8);
  l.keys_at = l.warps * kRows * l.pitch * 2;
  l.values_at = l.keys_at + 8 * kTiles * l.pitch * 2;
  l.flags_at = l.values_at + 8 * kTiles * l.value_pitch * 2;
  l.bytes = l.flags_at + (kTiles + kPieceTiles) * 8 * 4;
  if (l.bytes > most_bytes) return false;
  launch(name, resident_kernel<T, kTiles>, heads * l.blocks.by, 32 * l.warps, l.bytes, stream, c,
         l);
  return true;
}

}  // namespace pyvit::cuda::attention
