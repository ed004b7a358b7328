// What dense attention's gradients need to know of each row: its largest score, its sum of
// exponentials, Δ = Σ w · dW, and the penalty's norm = dHoyer / ((√N − 1) ‖w‖³). One pass over the
// keys, as in a forward pass, with running sums that every lane has of its own columns; lanes that
// share a row put theirs together at the end.
#include "cuda/attention_gradients.cuh"

namespace pyvit::cuda {
namespace attention {
namespace {

// Σ e, Σ e·dP, Σ e², Σ e² over the tail, where e = exp(score − top).
template <class Kind>
struct Running {
  float top = -INFINITY, sum = 0.0f, products = 0.0f, squares = 0.0f, tails = 0.0f;

  __device__ void scale_to(float highest) {
    const float factor = highest == top ? 1.0f : exponential<Kind>(top - highest);
    sum *= factor;
    products *= factor;
    squares *= factor * factor;
    tails *= factor * factor;
    top = highest;
  }
  __device__ void join(int with) {
    const float highest = fmaxf(top, __shfl_xor_sync(kAll, top, with));
    scale_to(highest);
    sum += __shfl_xor_sync(kAll, sum, with);
    products += __shfl_xor_sync(kAll, products, with);
    squares += __shfl_xor_sync(kAll, squares, with);
    tails += __shfl_xor_sync(kAll, tails, with);
  }
};

template <class Kind>
__global__ void __launch_bounds__(32 * kGradientWarps, 1)
    terms_kernel(GradientCall c, GradientTiling l, DenseTerms results) {
  using E = typename Kind::Element;
  const GradientTiles<Kind> tiles{l, dynamic_shared<char>()};
  const Quotient at(static_cast<int>(blockIdx.x), l.blocks);
  const int64_t batch = at.quotient / c.heads, head = at.quotient % c.heads;
  const auto of_head = [&](const Source& s) {
    return static_cast<const E*>(s.data) + batch * s.stride[0] + head * s.stride[1];
  };
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int block_first = at.rest * l.groups * kRows, first = block_first + warp * kRows;
  const int rows = min(max(c.queries - first, 0), kRows);
  const int64_t row = static_cast<int64_t>(at.quotient) * c.queries + first;
  const bool scores_too = results.delta != nullptr;
  const E *k = of_head(c.k), *v = scores_too ? of_head(c.v) : nullptr;
  tiles.load(tiles.own(), tiles.own_values(), block_first, l.groups * kRows, c.queries,
             of_head(c.q), c.q, c.dim, of_head(c.grad), c.grad, c.value_dim, scores_too);
  const int of_row = (c.keys + 7) / 8;
  Running<Kind> running[2];
  stream(
      l.tiles, l.stages, [](int tile) { return tile + 1; },
      [&](int tile, int stage) {
        tiles.load(tiles.stage(stage), tiles.stage_values(stage), tile * l.step, l.step, c.keys, k,
                   c.k, c.dim, v, c.v, c.value_dim, scores_too);
      },
      [&](int tile, int stage) {
#pragma unroll 1
        for (int piece = 0; piece < l.step; piece += kPiece) {
          const int key = tile * l.step + piece;
          if (key >= c.keys || rows == 0) break;
          float scores[kPieceTiles][4], products[kPieceTiles][4];
          clear(scores);
          clear(products);
          multiply_rows<Kind>(scores, tiles.own() + warp * kRows * l.pitch, l.pitch,
                              tiles.stage(stage) + piece * l.pitch, l.pitch, padded(c.dim));
          if (scores_too) {
            multiply_rows<Kind>(products, tiles.own_values() + warp * kRows * l.value_pitch,
                                l.value_pitch, tiles.stage_values(stage) + piece * l.value_pitch,
                                l.value_pitch, padded(c.value_dim));
          }
          unsigned own = 0;
          if (c.penalty && key / 8 + t < of_row) {
            const uint8_t* line = c.bits + (row + g) * of_row + key / 8 + t;
            if (g < rows) own = line[0];
            if (g + 8 < rows) own |= static_cast<unsigned>(line[8 * of_row]) << 8;
          }
          float highest[2] = {running[0].top, running[1].top};
#pragma unroll
          for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool there = key + 8 * i + 2 * t + e % 2 < c.keys;
              scores[i][e] = there ? scores[i][e] * c.scale : -INFINITY;
              highest[e / 2] = fmaxf(highest[e / 2], scores[i][e]);
            }
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) running[r].scale_to(highest[r]);
#pragma unroll
          for (int i = 0; i < kPieceTiles; ++i) {
            const unsigned bits = c.penalty ? __shfl_sync(kAll, own, (lane & ~3) | i) : 0;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              Running<Kind>& sums = running[e / 2];
              // A score of -inf is a weight of 0 even before any other score is known.
              const float weight = scores[i][e] == -INFINITY
                                       ? 0.0f
                                       : exponential<Kind>(scores[i][e] - sums.top);
              sums.sum += weight;
              if (weight != 0.0f) sums.products = fmaf(weight, products[i][e], sums.products);
              if (!c.penalty) continue;
              const bool kept = (bits >> (e / 2 * 8 + 2 * t + e % 2)) & 1;
              sums.squares = fmaf(weight, weight, sums.squares);
              if (!kept) sums.tails = fmaf(weight, weight, sums.tails);
            }
          }
        }
      });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    running[r].join(1);
    running[r].join(2);
    if (t != 0 || g + 8 * r >= rows) continue;
    const int64_t to = row + g + 8 * r;
    const Running<Kind>& sums = running[r];
    // Where all scores are -inf, softmax has no value.
    const float sum = sums.top == -INFINITY ? NAN : sums.sum;
    results.softmax[2 * to] = sums.top;
    results.softmax[2 * to + 1] = sum;
    if (!scores_too) continue;
    float delta = sums.products / sum;
    if (c.penalty) {
      const float length = sqrtf(sums.squares) / sum;
      float of_norm = 0.0f;
      if (c.keys > 1) {
        const float span = sqrtf(static_cast<float>(c.keys)) - 1.0f;
        of_norm = results.grad_hoyer[to] / (span * length * length * length);
      }
      delta += of_norm * length * length + 2.0f * results.grad_tail[to] * sums.tails / (sum * sum);
      results.norm[to] = of_norm;
    }
    results.delta[to] = delta;
  }
}

}  // namespace
}  // namespace attention

void attention_terms(DType dtype, bool tf32, const AttentionShape& s, HeadRows q, HeadRows k,
                     HeadRows v, HeadRows grad, const DenseTerms& terms, void* stream) {
  using namespace attention;
  if (s.batch * s.heads * s.queries == 0) return;
  dispatch_kind(dtype, tf32, [&](auto kind) {
    using Kind = decltype(kind);
    constexpr int kSize = sizeof(typename Kind::Element);
    GradientCall c{};
    c.q = source_of(q, kSize);
    c.k = source_of(k, kSize);
    c.v = source_of(v, kSize);
    c.grad = source_of(grad, kSize);
    c.bits = terms.selection;
    c.heads = static_cast<int>(s.heads);
    c.queries = static_cast<int>(s.queries);
    c.keys = static_cast<int>(s.keys);
    c.dim = static_cast<int>(s.dim);
    c.value_dim = static_cast<int>(s.value_dim);
    c.scale = static_cast<float>(s.scale);
    c.penalty = terms.norm != nullptr;
    const int widest = max(c.dim, c.value_dim);
    const GradientTiling l =
        gradient_tiling<Kind>("attention_terms", c, c.queries, c.keys, widest);
    launch("attention_terms", terms_kernel<Kind>, s.batch * s.heads * l.blocks.by, 32 * l.groups,
           l.bytes, stream, c, l, terms);
  });
}

}  // namespace pyvit::cuda
