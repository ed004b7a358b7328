// What the gradient kernels of attention share: a block's own rows stay in shared memory, those of
// the other side stream by in tiles. See attention_gradients.cu.
#pragma once

#include "cuda/attention_tiles.cuh"
#include "cuda/topk_attention.h"

namespace pyvit::cuda::attention {

struct GradientCall {
  Source q, k, v, grad;
  HeadRows dq, dk, dv;
  const float *softmax, *delta, *norm, *grad_tail;
  const uint8_t* bits;
  int heads, queries, keys, dim, value_dim;
  float scale;
  bool masked, penalty, one;
};

// Of a block: groups of sixteen own rows, a warp each; tiles of `step` rows of the others. Rows of
// the first kind have dim columns (q or k), of the second value_dim (grad or v).
struct GradientTiling {
  int groups, step, stages, tiles;
  int pitch, value_pitch;
  Divisor blocks, column_chunks, chunks, value_chunks;
  int own_values_at, stages_at, stage_bytes, values_at, scratch_at, flags_at, bytes;
};

template <class Kind>
struct GradientTiles {
  using E = typename Kind::Element;

  const GradientTiling& l;
  char* memory;

  __device__ E* own() const { return reinterpret_cast<E*>(memory); }
  __device__ E* own_values() const { return reinterpret_cast<E*>(memory + l.own_values_at); }
  __device__ E* stage(int i) const {
    return reinterpret_cast<E*>(memory + l.stages_at + i * l.stage_bytes);
  }
  __device__ E* stage_values(int i) const {
    return reinterpret_cast<E*>(memory + l.stages_at + i * l.stage_bytes + l.values_at);
  }
  __device__ float* scratch() const {
    return reinterpret_cast<float*>(memory + l.scratch_at) +
           threadIdx.x / 32 * (kRows * kScratchPitch);
  }
  __device__ uint8_t* flags() const { return reinterpret_cast<uint8_t*>(memory + l.flags_at); }

  __device__ void load(E* to, E* to_values, int first, int count, int rows, const E* from,
                       const Source& source, int columns, const E* values,
                       const Source& value_source, int value_columns, bool with_values) const {
    load_rows(to, l.pitch, from, source.stride[2], source.vectors, first, rows, count, columns,
              l.chunks);
    if (!with_values) return;
    load_rows(to_values, l.value_pitch, values, value_source.stride[2], value_source.vectors,
              first, rows, count, value_columns, l.value_chunks);
  }
};

// Weights of a tile's scores, and the gradients of scores.
template <class Kind>
struct RowTerms {
  float top, inverse, delta, norm, tail;
  bool nan;

  __device__ float weight(float score, bool counts, bool one) const {
    if (!counts) return 0.0f;
    if (one) return nan ? NAN : 1.0f;
    // A product of other tiles may round a score above the largest one; NaN passes.
    return exponential<Kind>(score > top ? 0.0f : score - top) * inverse;
  }
  __device__ float score_gradient(float weight, float product, bool counts, bool chosen,
                                  float scale, const GradientCall& c) const {
    if (!counts) return 0.0f;
    if (c.one) return weight - weight;  // NaN where the weight is
    if (c.penalty) product = fmaf(weight, norm + (chosen ? 0.0f : tail), product);
    return weight * (product - delta) * scale;
  }
};

template <class Kind>
__device__ RowTerms<Kind> row_terms(const GradientCall& c, int64_t row, bool there,
                                    bool wants_scores) {
  if (!there) return {0.0f, 1.0f, 0.0f, 0.0f, 0.0f, false};
  const float sum = c.softmax[2 * row + 1];
  RowTerms<Kind> terms{c.softmax[2 * row], 1.0f / sum, 0.0f, 0.0f, 0.0f, sum != sum};
  if (wants_scores) terms.delta = c.delta[row];
  if (c.penalty) {
    terms.norm = c.norm[row];
    terms.tail = 2.0f * c.grad_tail[row];
  }
  return terms;
}

constexpr int kGradientWarps = 4;

// `own` rows in blocks, `others` in tiles; `columns` of results at once.
template <class Kind>
GradientTiling gradient_tiling(const char* name, const GradientCall& c, int own, int others,
                               int columns) {
  constexpr int kSize = sizeof(typename Kind::Element);
  const int most_bytes = most_bytes_of_block();
  struct Choice {
    int groups, step, stages;
  };
  constexpr Choice kChoices[] = {{4, 64, 2}, {4, 32, 2}, {4, 32, 1}, {2, 32, 2},
                                 {2, 32, 1}, {1, 32, 2}, {1, 32, 1}};
  for (const Choice& choice : kChoices) {
    if (kSize == 4 && choice.step > 32) continue;
    GradientTiling l{};
    l.groups = choice.groups;
    l.step = choice.step;
    l.tiles = (others + l.step - 1) / l.step;
    l.stages = l.tiles > 1 ? choice.stages : 1;
    l.pitch = pitch_of(c.dim, kSize);
    l.value_pitch = pitch_of(c.value_dim, kSize);
    l.blocks = Divisor((own + kRows * l.groups - 1) / (kRows * l.groups));
    l.column_chunks = Divisor((max(c.dim, c.value_dim) + columns - 1) / columns);
    l.chunks = Divisor(padded(c.dim) * kSize / 16);
    l.value_chunks = Divisor(padded(c.value_dim) * kSize / 16);
    l.own_values_at = l.groups * kRows * l.pitch * kSize;
    l.stages_at = l.own_values_at + l.groups * kRows * l.value_pitch * kSize;
    l.values_at = l.step * l.pitch * kSize;
    l.stage_bytes = l.values_at + l.step * l.value_pitch * kSize;
    l.scratch_at = l.stages_at + l.stages * l.stage_bytes;
    l.flags_at = l.scratch_at + (kSize == 4 ? l.groups * kRows * kScratchPitch * 4 : 0);
    l.bytes = l.flags_at + (l.tiles + 15) / 16 * 16;
    if (l.bytes <= most_bytes) return l;
  }
  throw std::runtime_error(std::string("pyvit.") + name +
                           ": the CUDA C++ kernels take no head dimensions of " +
                           std::to_string(c.dim) + " and " + std::to_string(c.value_dim) +
                           " on this GPU, or not so many keys or queries; ask for backend "
                           "'triton'");
}

}  // namespace pyvit::cuda::attention
