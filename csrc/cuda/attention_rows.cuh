// What all ways of the forward pass share: the call, weights from scores, the bits of what was
// kept, and values that are not finite.
#pragma once

#include "cuda/attention_tiles.cuh"
#include "cuda/select.cuh"

namespace pyvit::cuda::attention {

struct ForwardCall {
  Source q, k, v;
  void* out;
  int64_t out_stride[3];
  SavedRows saved;
  int heads, queries, keys, dim, value_dim, wanted;
  float scale, place;
  bool selects;
};

constexpr int kValueTiles = 8;

// What becomes of a row besides its sums of values: before the division by `sum`.
struct RowSums {
  float sum = 0.0f, squares = 0.0f, tail = 0.0f;
};

// A lane's two rows: makes weights of scores.
template <class Kind, bool kPenalty>
struct Weigher {
  Cut cut[2];
  float top[2];
  bool strange[2];  // a score is NaN or inf, or all are -inf: the row becomes NaN
  RowSums sums[2];

  // A tile of scores becomes weights before their division; those of keys that were dropped are -0
  // (with the penalty they are weights, too). Returns which were kept, as bits.
  __device__ unsigned weigh(float (&tile)[4], int key, bool counts) {
    unsigned kept = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = e / 2;
      const bool keeps = cut[r].keeps(tile[e], key + e % 2);
      kept |= static_cast<unsigned>(keeps) << e;
      float weight = exponential<Kind>(tile[e] - top[r]);
      if (!kPenalty) weight = keeps ? weight : -0.0f;
      tile[e] = weight;
      if (!counts) continue;
      sums[r].sum += weight;
      if (kPenalty) {
        sums[r].squares = fmaf(weight, weight, sums[r].squares);
        if (!keeps) sums[r].tail = fmaf(weight, weight, sums[r].tail);
      }
    }
    return kept;
  }

  // Which of a piece's keys were kept, from the lane's own marks (four bits a tile), for both rows.
  // Rows of NaN keep their first keys, so that backward passes see them.
  __device__ void store_bits(unsigned marks, int first_key, int wanted,
                             int64_t row, int rows, int keys, uint8_t* selection) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int of_row = (keys + 7) / 8, byte = first_key / 8 + t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      unsigned word = 0;
#pragma unroll
      for (int i = 0; i < kPieceTiles; ++i) {
        word |= ((marks >> (4 * i + 2 * r)) & 3u) << (8 * i + 2 * t);
      }
      word = across_quad(word, Union{});
      if (strange[r]) {
        const int some = min(max(wanted - first_key, 0), 32);
        word = some == 32 ? kAll : (1u << some) - 1;
      }
      if (g + 8 * r < rows && byte < of_row) {
        selection[(row + g + 8 * r) * of_row + byte] = static_cast<uint8_t>(word >> (8 * t));
      }
    }
  }
};

// Values that are not finite must reach the rows alone that kept their keys, and 0 · inf is NaN.
// Where that has spoilt a result it is made anew: clean() puts zeros in the place of such values,
// and marks their keys; add_extremes() adds them to the rows of a piece that kept them.
template <class E>
__device__ void clean(E* values, int pitch, int rows, int width, int* flags) {
  const int whole = (rows + kPiece - 1) / kPiece * kPiece;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) flags[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < rows * width; i += blockDim.x) {
    E& value = values[i / width * pitch + i % width];
    if (fabsf(widen(value)) < INFINITY) continue;
    value = narrow<E>(0.0f);
    flags[i / width] = 1;
  }
  __syncthreads();
}

// `marks`: four bits for each of the piece's tiles, as weigh() returns them.
template <class E>
__device__ void add_extremes(float (&result)[kValueTiles][4], unsigned marks, const int* flags,
                             const E* values, int64_t stride, int column, int value_dim) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  unsigned there = __ballot_sync(kAll, flags[lane]);
  for (; there != 0; there &= there - 1) {
    const int n = __ffs(static_cast<int>(there)) - 1;
    const unsigned of_owner =
        __shfl_sync(kAll, marks, (lane & ~3) | (n % 8 / 2)) >> (n / 8 * 4 + n % 2);
#pragma unroll
    for (int i = 0; i < kValueTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = column + 8 * i + 2 * t + e % 2;
        if (at >= value_dim || !((of_owner >> (2 * (e / 2))) & 1)) continue;
        const float value = widen(values[n * stride + at]);
        if (!(fabsf(value) < INFINITY)) result[i][e] += value;
      }
    }
  }
}

// Where the k-th largest of n normally distributed numbers would be, in deviations from their mean.
double normal_place(int64_t k, int64_t n);

template <class Kind>
ForwardCall forward_call(const AttentionShape& s, int64_t topk, const HeadRows& q,
                         const HeadRows& k, const HeadRows& v, const HeadRows& out,
                         const SavedRows& saved) {
  constexpr int kSize = sizeof(typename Kind::Element);
  const bool selects = topk < s.keys;
  return {source_of(q, kSize),
          source_of(k, kSize),
          source_of(v, kSize),
          out.data,
          {out.stride[0], out.stride[1], out.stride[2]},
          saved,
          static_cast<int>(s.heads),
          static_cast<int>(s.queries),
          static_cast<int>(s.keys),
          static_cast<int>(s.dim),
          static_cast<int>(s.value_dim),
          static_cast<int>(selects ? topk : s.keys),
          static_cast<float>(s.scale),
          static_cast<float>(selects ? normal_place(topk, s.keys) : 0.0),
          selects};
}

}  // namespace pyvit::cuda::attention
