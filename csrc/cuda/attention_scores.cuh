// The scores of the forward pass for any sizes: made tile by tile as keys stream by, kept in shared
// memory or made again, counted and cut. attention_forward.cuh makes weights of them.
//
// A block has row_groups · key_groups warps. Warps of one row group share sixteen queries and take
// turns at pieces of 32 keys; what they find of a row is put together in shared memory.
#pragma once

#include "cuda/attention_rows.cuh"

namespace pyvit::cuda::attention {

constexpr int kMostThreads = 256;

struct ForwardTiling {
  int row_groups, key_groups;
  int tile, tiles;  // keys, a multiple of 32 · key_groups
  int pieces;       // of a tile, for each warp
  int stages;
  int pitch, value_pitch, value_width;  // values are multiplied kValueTiles tiles at a time
  Divisor blocks, chunks, value_chunks;
  int values_at, stage_bytes;  // in a stage
  int stages_at, scores_at, scratch_at, exchange_at, flags_at, bytes;
};

// What a warp does with scores. With `kAgain` they are made anew each time, else each is kept by
// the lane that made it.
template <class Kind, bool kAgain>
struct Scores {
  using E = typename Kind::Element;

  const ForwardCall& c;
  const ForwardTiling& l;
  char* memory;
  const E *k, *v;
  int lane, g, t, row_group, key_group;
  int head;         // among those of all images
  int first, rows;  // the warp's first query, and how many it has

  // Of the warp's first query among those of all heads.
  __device__ int64_t row() const { return static_cast<int64_t>(head) * c.queries + first; }

  __device__ E* stage_at(int stage) const {
    return reinterpret_cast<E*>(memory + l.stages_at + stage * l.stage_bytes);
  }
  __device__ E* values_at(int stage, bool with_keys) const {
    return reinterpret_cast<E*>(memory + l.stages_at + stage * l.stage_bytes +
                                (with_keys ? l.values_at : 0));
  }
  __device__ float4* own_scores() const {
    return reinterpret_cast<float4*>(memory + l.scores_at) +
           (threadIdx.x / 32) * (l.tiles * l.pieces * kPieceTiles * 32) + lane;
  }
  __device__ float* scratch() const {
    return reinterpret_cast<float*>(memory + l.scratch_at) +
           threadIdx.x / 32 * (kRows * kScratchPitch);
  }
  __device__ int* flags() const { return reinterpret_cast<int*>(memory + l.flags_at); }

  // ---- tiles

  // use(stage, piece in the tile, first key, number among the warp's own) for the warp's pieces.
  template <bool kKeys, bool kValues, class Use>
  __device__ void pieces(int column, const Use& use) const {
    stream(
        l.tiles, l.stages, [](int tile) { return tile + 1; },
        [&](int tile, int stage) {
          const int start = tile * l.tile;
          if (kKeys) {
            load_rows(stage_at(stage), l.pitch, k, c.k.stride[2], c.k.vectors, start, c.keys,
                      l.tile, c.dim, l.chunks);
          }
          if (kValues) {
            load_rows(values_at(stage, kKeys), l.value_pitch, v + column, c.v.stride[2],
                      c.v.vectors, start, c.keys, l.tile, c.value_dim - column, l.value_chunks);
          }
        },
        [&](int tile, int stage) { use(tile, stage); });
  }
  template <class Use>
  __device__ void own_pieces(int tile, const Use& use) const {
#pragma unroll 1
    for (int p = 0; p < l.pieces; ++p) {
      const int piece = p * l.key_groups + key_group, key = tile * l.tile + piece * kPiece;
      if (key < c.keys && rows > 0) use(piece, key, tile * l.pieces + p);
    }
  }
  // use(first key, number among the warp's own) for all pieces whose scores the warp keeps.
  template <class Use>
  __device__ void kept_pieces(const Use& use) const {
#pragma unroll 1
    for (int tile = 0; tile < l.tiles; ++tile) {
      own_pieces(tile, [&](int, int key, int own) { use(key, own); });
    }
  }
  __device__ void make_scores(float (&scores)[kPieceTiles][4], int stage, int piece) const {
    clear(scores);
    multiply_rows<Kind>(scores, reinterpret_cast<const E*>(memory) + row_group * kRows * l.pitch,
                        l.pitch, stage_at(stage) + piece * kPiece * l.pitch, l.pitch,
                        padded(c.dim));
#pragma unroll
    for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[i][e] *= c.scale;
    }
  }
  // Scores past the last key are -inf.
  __device__ void mask_end(float (&scores)[kPieceTiles][4], int key) const {
    if (key + kPiece <= c.keys) return;
#pragma unroll
    for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (key + 8 * i + 2 * t + e % 2 >= c.keys) scores[i][e] = -INFINITY;
      }
    }
  }

  // ---- what warps of a row group know together

  template <class V, class Op>
  __device__ void together(V (&x)[2], const Op& op) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) x[r] = across_quad(x[r], op);
    if (l.key_groups == 1) return;
    V* exchange = reinterpret_cast<V*>(memory + l.exchange_at) + row_group * l.key_groups * kRows;
    if (t == 0) {
      exchange[key_group * kRows + g] = x[0];
      exchange[key_group * kRows + g + 8] = x[1];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r] = exchange[g + 8 * r];
      for (int i = 1; i < l.key_groups; ++i) x[r] = op(x[r], exchange[i * kRows + g + 8 * r]);
    }
    __syncthreads();
  }
  // For cut_rows. Threads of the whole block count in step.
  __device__ bool any(bool x) const { return __syncthreads_or(x) != 0; }
  template <class F>
  __device__ void count(int (&count)[2], const F& holds) const {
    count[0] = count[1] = 0;
    const auto in_piece = [&](const float (&scores)[kPieceTiles][4], int key) {
#pragma unroll
      for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          count[e / 2] += holds(e / 2, scores[i][e], key + 8 * i + 2 * t + e % 2);
        }
      }
    };
    if constexpr (kAgain) {
      pieces<true, false>(0, [&](int tile, int stage) {
        own_pieces(tile, [&](int piece, int key, int) {
          float scores[kPieceTiles][4];
          make_scores(scores, stage, piece);
          mask_end(scores, key);
          in_piece(scores, key);
        });
      });
    } else {
      kept_pieces([&](int key, int own) {
        float scores[kPieceTiles][4];
        recall(scores, own);
        in_piece(scores, key);
      });
    }
    together(count, Sum{});
  }
  __device__ void recall(float (&scores)[kPieceTiles][4], int own) const {
#pragma unroll
    for (int i = 0; i < kPieceTiles; ++i) {
      const float4 tile = own_scores()[(own * kPieceTiles + i) * 32];
      scores[i][0] = tile.x, scores[i][1] = tile.y, scores[i][2] = tile.z, scores[i][3] = tile.w;
    }
  }
  __device__ void keep(const float (&scores)[kPieceTiles][4], int own) const {
#pragma unroll
    for (int i = 0; i < kPieceTiles; ++i) {
      own_scores()[(own * kPieceTiles + i) * 32] = {scores[i][0], scores[i][1], scores[i][2],
                                                    scores[i][3]};
    }
  }

  // Scores are made (and kept, unless they are made again); each row's range.
  __device__ void find_ranges(RowRange (&range)[2], bool (&strange)[2]) const {
    float top[2] = {-INFINITY, -INFINITY}, bottom[2] = {INFINITY, INFINITY};
    float total[2] = {0.0f, 0.0f}, squares[2] = {0.0f, 0.0f};
    int bad[2] = {0, 0};
    pieces<true, false>(0, [&](int tile, int stage) {
      own_pieces(tile, [&](int piece, int key, int own) {
        float scores[kPieceTiles][4];
        make_scores(scores, stage, piece);
#pragma unroll
        for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float score = scores[i][e];
            if (key + 8 * i + 2 * t + e % 2 >= c.keys) continue;
            const int r = e / 2;
            top[r] = fmaxf(top[r], score);
            bottom[r] = fminf(bottom[r], score);
            total[r] += score;
            squares[r] = fmaf(score, score, squares[r]);
            bad[r] |= !(score < INFINITY);
          }
        }
        if (!kAgain) {
          mask_end(scores, key);
          keep(scores, own);
        }
      });
    });
    together(top, Largest{});
    together(bad, Sum{});
    if (c.selects) {
      together(bottom, Least{});
      together(total, Sum{});
      together(squares, Sum{});
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      strange[r] = bad[r] != 0 || top[r] == -INFINITY;
      range[r] = {top[r],     bottom[r], total[r],
                  squares[r], c.keys,    !strange[r] && g + 8 * r < rows};
    }
  }
};

}  // namespace pyvit::cuda::attention
