// The forward pass for few chosen keys among many: scores are made once and never kept. See
// topk_attention.cu.
//
// A warp has sixteen queries, past which key tiles stream. What exceeds a row's threshold goes to
// the row's list in shared memory; where a list may overflow, it is cut to the largest `wanted`
// (select.cuh), the least of which is the threshold from then on: keys that come later and equal
// it lose. At the end the lists are the selection: their exponentials weigh rows of values, which
// are gathered, so that a dropped key's value is never read.
#pragma once

#include "cuda/attention_rows.cuh"

namespace pyvit::cuda::attention {

struct CandidateTiling {
  int warps, tile, tiles, stages, pitch;
  int capacity;  // of a row's list: 4 modulo 32, so that rows meet in no bank
  Divisor blocks, chunks;
  int stages_at, stage_bytes, lists_at, bytes;
  int map_bytes;  // of a warp's map of bits, where the stages were
};

constexpr int kCandidateWarps = 4;

// A warp's lists; four lanes share a row and take turns at its entries.
struct Candidates {
  float* scores;  // [rows][capacity]
  int* keys;
  int capacity, g, t;
  int count[2];
  float threshold[2];  // NaN before the first cut: all that comes is taken

  __device__ int at(int r, int i) const { return (g + 8 * r) * capacity + i; }

  // A piece of scores from `key` on; the lane's marks of those that are taken, a bit each.
  __device__ void take(const float (&piece)[kPieceTiles][4], unsigned marks, int key) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned own = marks & (0x3333u << (2 * r));
      // Eight bits for each of the four lanes' numbers; those of lower lanes come first.
      unsigned numbers = static_cast<unsigned>(__popc(own)) << (8 * t);
      numbers = across_quad(numbers, Union{});
      const unsigned sums = numbers * 0x01010101u;  // byte i: the sum up to lane i
      const int all = static_cast<int>(sums >> 24);
      int to = at(r, count[r] + static_cast<int>((sums << 8) >> (8 * t) & 255));
#pragma unroll
      for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!(own >> (4 * i + 2 * r + half) & 1)) continue;
          scores[to] = piece[i][2 * r + half];
          keys[to++] = key + 8 * i + 2 * t + half;
        }
      }
      count[r] += all;
    }
  }

  // Leaves the `wanted` largest of every list that is longer.
  __device__ void cut(int all_keys, int wanted) {
    __syncwarp();  // entries of other lanes
    RowRange range[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      range[r] = {-INFINITY, INFINITY, 0.0f, 0.0f, count[r], count[r] > wanted};
      for (int i = t; i < count[r]; i += 4) {
        const float score = scores[at(r, i)];
        range[r].top = fmaxf(range[r].top, score);
        range[r].bottom = fminf(range[r].bottom, score);
        range[r].total += score;
        range[r].squares = fmaf(score, score, range[r].squares);
      }
      range[r].top = across_quad(range[r].top, Largest{});
      range[r].bottom = across_quad(range[r].bottom, Least{});
      range[r].total = across_quad(range[r].total, Sum{});
      range[r].squares = across_quad(range[r].squares, Sum{});
    }
    Cut cuts[2];
    ForCut rows{*this};
    cut_rows(rows, range, all_keys, wanted, 0.0f, cuts);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool shorter = range[r].searched;
      const int most = __reduce_max_sync(kAll, shorter ? count[r] : 0);
      int kept = 0;
      for (int i = t; i - t < most; i += 4) {
        const bool there = shorter && i < count[r];
        const float score = there ? scores[at(r, i)] : 0.0f;
        const int key = there ? keys[at(r, i)] : 0;
        const bool keeps = there && cuts[r].keeps(score, key);
        const unsigned quad = __ballot_sync(kAll, keeps) >> (4 * g) & 15u;  // all have read
        if (keeps) {
          const int to = at(r, kept + __popc(quad & ((1u << t) - 1)));
          scores[to] = score;
          keys[to] = key;
        }
        kept += __popc(quad);
        __syncwarp();
      }
      if (!shorter) continue;
      count[r] = kept;
      threshold[r] = cuts[r].threshold;
    }
    __syncwarp();
  }

  struct ForCut {
    const Candidates& lists;

    __device__ bool any(bool x) const { return __any_sync(kAll, x); }
    template <class F>
    __device__ void count(int (&sum)[2], const F& holds) const {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int own = 0;
        for (int i = lists.t; i < lists.count[r]; i += 4) {
          own += holds(r, lists.scores[lists.at(r, i)], lists.keys[lists.at(r, i)]);
        }
        sum[r] = across_quad(own, Sum{});
      }
    }
  };
};

// What the lanes of row m know.
template <class V>
__device__ V of_row(const V (&of_lane)[2], int m) {
  return __shfl_sync(kAll, m < 8 ? of_lane[0] : of_lane[1], m % 8 * 4);
}

// The bits of a warp's rows, by way of a map in shared memory, a part of the keys after another.
__device__ inline void store_map(const Candidates& lists, const ForwardCall& c, unsigned* map,
                                 int map_bytes, int rows, int64_t row, unsigned strange) {
  const int lane = threadIdx.x % 32, row_bytes = (c.keys + 7) / 8;
  for (int m = 0; m < rows; ++m) {
    const int count = of_row(lists.count, m);
    for (int start = 0; start < row_bytes; start += map_bytes) {
      for (int i = lane; i < map_bytes / 4; i += 32) map[i] = 0;
      __syncwarp();
      // Rows of NaN keep their first keys, so that backward passes see them.
      const bool first_ones = strange >> m & 1;
      for (int i = lane; i < (first_ones ? c.wanted : count); i += 32) {
        const int bit = (first_ones ? i : lists.keys[m * lists.capacity + i]) - 8 * start;
        if (bit >= 0 && bit < 8 * map_bytes) atomicOr(map + bit / 32, 1u << (bit % 32));
      }
      __syncwarp();
      uint8_t* to = c.saved.selection + (row + m) * row_bytes + start;
      for (int i = lane; i < min(map_bytes, row_bytes - start); i += 32) {
        to[i] = static_cast<uint8_t>(map[i / 4] >> (i % 4 * 8));
      }
      __syncwarp();
    }
  }
}

// Two neighbours at an even place of aligned memory.
template <class E>
__device__ float2 pair_at(const E* from) {
  if constexpr (sizeof(E) == 2) {
    return unpack<E>(*reinterpret_cast<const uint32_t*>(from));
  } else {
    return *reinterpret_cast<const float2*>(from);
  }
}

// Σ weights[i] · value(keys[i]) of two columns. value() must not branch: many loads are on their
// way at once, and a branch would end that.
template <class Value>
__device__ float2 gather(const float* weights, const int* keys, int count, const Value& value) {
  float2 sum = {0.0f, 0.0f};
#pragma unroll 1
  for (int start = 0; start < count; start += kFusedTerms) {
    float2 part = {0.0f, 0.0f};
    const int end = min(start + kFusedTerms, count);
#pragma unroll 16
    for (int i = start; i < end; ++i) {
      const float2 values = value(keys[i]);
      part.x = fmaf(weights[i], values.x, part.x);
      part.y = fmaf(weights[i], values.y, part.y);
    }
    sum.x += part.x;
    sum.y += part.y;
  }
  return sum;
}

template <class Kind>
__global__ void __launch_bounds__(32 * kCandidateWarps, 2)
    candidate_kernel(ForwardCall c, CandidateTiling l) {
  using E = typename Kind::Element;
  const Quotient place(static_cast<int>(blockIdx.x), l.blocks);
  const int64_t batch = place.quotient / c.heads, head = place.quotient % c.heads;
  const auto of_head = [&](const Source& s) {
    return static_cast<const E*>(s.data) + batch * s.stride[0] + head * s.stride[1];
  };
  char* memory = dynamic_shared<char>();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int block_first = place.rest * l.warps * kRows, first = block_first + warp * kRows;
  const int rows = min(max(c.queries - first, 0), kRows);
  const E* k = of_head(c.k);
  load_rows(reinterpret_cast<E*>(memory), l.pitch, of_head(c.q), c.q.stride[2], c.q.vectors,
            block_first, c.queries, l.warps * kRows, c.dim, l.chunks);

  float* own_scores =
      reinterpret_cast<float*>(memory + l.lists_at) + warp * 2 * kRows * l.capacity;
  Candidates lists{own_scores, reinterpret_cast<int*>(own_scores + kRows * l.capacity),
                   l.capacity, g, t, {0, 0}, {NAN, NAN}};
  unsigned bad[2] = {0, 0};
  const auto stage_at = [&](int stage) {
    return reinterpret_cast<E*>(memory + l.stages_at + stage * l.stage_bytes);
  };
  stream(
      l.tiles, l.stages, [](int tile) { return tile + 1; },
      [&](int tile, int stage) {
        load_rows(stage_at(stage), l.pitch, k, c.k.stride[2], c.k.vectors, tile * l.tile, c.keys,
                  l.tile, c.dim, l.chunks);
      },
      [&](int tile, int stage) {
#pragma unroll 1
        for (int piece = 0; piece < l.tile; piece += kPiece) {
          const int key = tile * l.tile + piece;
          if (key >= c.keys || rows == 0) break;
          float scores[kPieceTiles][4];
          clear(scores);
          multiply_rows<Kind>(scores, reinterpret_cast<const E*>(memory) + warp * kRows * l.pitch,
                              l.pitch, stage_at(stage) + piece * l.pitch, l.pitch, padded(c.dim));
          unsigned marks = 0;
#pragma unroll
          for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const bool there = key + 8 * i + 2 * t + e % 2 < c.keys;
              const float score = scores[i][e] *= c.scale;
              marks |= static_cast<unsigned>(there & !(score <= lists.threshold[e / 2]))
                       << (4 * i + e);
              bad[e / 2] |= there & !(score < INFINITY);
            }
          }
          if (!__any_sync(kAll, marks != 0)) continue;
          const bool full = max(lists.count[0], lists.count[1]) > l.capacity - kPiece;
          if (__any_sync(kAll, full)) lists.cut(c.keys, c.wanted);
          lists.take(scores, marks, key);
        }
      });
  lists.cut(c.keys, c.wanted);

  // Weights; a row's sum is NaN where the row is.
  float sum[2];
  unsigned strange = 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
    for (int i = t; i < lists.count[r]; i += 4) top = fmaxf(top, lists.scores[lists.at(r, i)]);
    top = across_quad(top, Largest{});
    const bool is_strange = across_quad(bad[r], Union{}) != 0 || top == -INFINITY;
    float own = 0.0f;
    for (int i = t; i < lists.count[r]; i += 4) {
      float& score = lists.scores[lists.at(r, i)];
      score = exponential<Kind>(score - top);
      own += score;
    }
    own = across_quad(own, Sum{});
    sum[r] = is_strange ? NAN : own;
    // Bit m of row m, from the first of its four lanes.
    const unsigned marked = __ballot_sync(kAll, is_strange);
#pragma unroll
    for (int m = 0; m < 8; ++m) strange |= (marked >> (4 * m) & 1) << (8 * r + m);
    if (t == 0 && g + 8 * r < rows && c.saved.softmax != nullptr) {
      const int64_t at = static_cast<int64_t>(place.quotient) * c.queries + first + g + 8 * r;
      c.saved.softmax[2 * at] = top;
      c.saved.softmax[2 * at + 1] = sum[r];
    }
  }
  __syncthreads();  // the stages are free, and a warp sees its lanes' weights
  if (c.saved.selection != nullptr) {
    store_map(lists, c, reinterpret_cast<unsigned*>(memory + l.stages_at + warp * l.map_bytes),
              l.map_bytes, rows, static_cast<int64_t>(place.quotient) * c.queries + first,
              strange);
  }

  // A row after another, two columns a lane.
  const E* v = of_head(c.v);
  const bool even = c.value_dim % 2 == 0;
#pragma unroll 1
  for (int m = 0; m < rows; ++m) {
    const int count = of_row(lists.count, m);
    const float inverse = 1.0f / of_row(sum, m);
    const float* weights = lists.scores + m * l.capacity;
    const int* keys = lists.keys + m * l.capacity;
    E* out = static_cast<E*>(c.out) + batch * c.out_stride[0] + head * c.out_stride[1] +
             static_cast<int64_t>(first + m) * c.out_stride[2];
#pragma unroll 1
    for (int column = 2 * lane; column < c.value_dim; column += 64) {
      const E* from = v + column;
      float2 sums;
      if (c.v.vectors && column + 1 < c.value_dim) {
        sums = gather(weights, keys, count,
                      [&](int key) { return pair_at(from + key * c.v.stride[2]); });
      } else {
        const int next = column + 1 < c.value_dim;  // else the same again, for nothing
        sums = gather(weights, keys, count, [&](int key) {
          const E* one = from + key * c.v.stride[2];
          return float2{widen(one[0]), widen(one[next])};
        });
      }
      store_pair(out, column, c.value_dim, even, sums.x * inverse, sums.y * inverse);
    }
  }
}

// Whether it was launched: lists of many keys leave no room.
template <class Kind>
bool candidates(const char* name, const ForwardCall& c, int64_t heads, int most_bytes,
                void* stream) {
  constexpr int kSize = sizeof(typename Kind::Element);
  struct Choice {
    int warps, tile, stages;
  };
  for (const Choice& choice : {Choice{4, 64, 2}, Choice{4, 32, 2}, Choice{2, 32, 2},
                               Choice{2, 32, 1}}) {
    CandidateTiling l{};
    l.warps = choice.warps;
    l.tile = choice.tile;
    l.tiles = (c.keys + l.tile - 1) / l.tile;
    l.stages = choice.stages;
    l.pitch = pitch_of(c.dim, kSize);
    l.capacity = (c.wanted + 3 * kPiece + 31) / 32 * 32 + 4;
    l.blocks = Divisor((c.queries + kRows * l.warps - 1) / (kRows * l.warps));
    l.chunks = Divisor(padded(c.dim) * kSize / 16);
    l.stages_at = l.warps * kRows * l.pitch * kSize;
    l.stage_bytes = l.tile * l.pitch * kSize;
    l.map_bytes = l.stages * l.stage_bytes / l.warps / 128 * 128;
    l.lists_at = l.stages_at + l.stages * l.stage_bytes;
    const int64_t bytes = l.lists_at + int64_t{l.warps} * kRows * l.capacity * 8;
    if (bytes > most_bytes) continue;
    l.bytes = static_cast<int>(bytes);
    launch(name, candidate_kernel<Kind>, heads * l.blocks.by, 32 * l.warps, l.bytes, stream, c, l);
    return true;
  }
  return false;
}

}  // namespace pyvit::cuda::attention
