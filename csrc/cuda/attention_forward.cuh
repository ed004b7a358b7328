// The forward pass of attention for any sizes, from scores (attention_scores.cuh) to results:
// topk_attention.cu says how, and what it should take.
#pragma once

#include "cuda/attention_scores.cuh"

namespace pyvit::cuda::attention {

// A long sum, and what its roundings have lost so far.
struct Total {
  float sum = 0.0f, excess = 0.0f;

  __device__ void add(float x) {
    const float term = x - excess, next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }
};

// What a warp does with weights.
template <class Kind, bool kAgain, bool kPenalty>
struct Forward : Scores<Kind, kAgain> {
  using Base = Scores<Kind, kAgain>;
  using E = typename Kind::Element;
  using Base::c, Base::l, Base::memory, Base::v, Base::lane, Base::g, Base::t;
  using Base::row_group, Base::key_group, Base::head, Base::row, Base::first, Base::rows;
  using Base::values_at, Base::scratch, Base::flags, Base::own_pieces;
  using Base::make_scores, Base::mask_end, Base::recall, Base::find_ranges, Base::together;
  using Base::any, Base::keep, Base::kept_pieces;

  // ---- weights

  // A piece of scores becomes weights. Where `counts`, what is found of rows is added up and stored.
  __device__ void weigh(float (&piece)[kPieceTiles][4], int key, Weigher<Kind, kPenalty>& weigher,
                        Total (&totals)[2][3], bool counts) const {
    unsigned marks = 0;
#pragma unroll
    for (int i = 0; i < kPieceTiles; ++i) {
      marks |= weigher.weigh(piece[i], key + 8 * i + 2 * t, counts) << (4 * i);
    }
    if (!counts) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowSums& sums = weigher.sums[r];
      totals[r][0].add(sums.sum);
      if (kPenalty) {
        totals[r][1].add(sums.squares);
        totals[r][2].add(sums.tail);
      }
      weigher.sums[r] = RowSums{};
    }
    if (c.saved.selection != nullptr) {
      weigher.store_bits(marks, key, c.wanted, row(), rows, c.keys, c.saved.selection);
    }
  }

  // Weights take the place of the scores that are kept.
  __device__ void weigh_kept(Weigher<Kind, kPenalty>& weigher, Total (&totals)[2][3]) const {
    kept_pieces([&](int key, int own) {
      float piece[kPieceTiles][4];
      recall(piece, own);
      weigh(piece, key, weigher, totals, true);
      keep(piece, own);
    });
  }

  // What all warps of a row have found together; the sum is NaN where the row is.
  __device__ void put_together(const Total (&totals)[2][3],
                               Weigher<Kind, kPenalty>& weigher) const {
    RowSums(&sums)[2] = weigher.sums;
    float sum[2] = {totals[0][0].sum, totals[1][0].sum};
    together(sum, Sum{});
    sums[0].sum = weigher.strange[0] ? NAN : sum[0];
    sums[1].sum = weigher.strange[1] ? NAN : sum[1];
    if (!kPenalty) return;
    float squares[2] = {totals[0][1].sum, totals[1][1].sum};
    float tail[2] = {totals[0][2].sum, totals[1][2].sum};
    together(squares, Sum{});
    together(tail, Sum{});
    sums[0].squares = squares[0], sums[1].squares = squares[1];
    sums[0].tail = tail[0], sums[1].tail = tail[1];
  }

  // ---- sums of values

  // A piece of weights times its values, `extremes`: those that are not finite, which clean() has
  // replaced by zeros, are added to the rows that kept their keys alone: weights of others are -0.
  __device__ void multiply_values(float (&result)[kValueTiles][4],
                                  const float (&weights)[kPieceTiles][4], const E* values,
                                  int piece, int key, int column, bool extremes) const {
    const int tiles = min(kValueTiles, (padded(c.value_dim) - column) / 8);
    unsigned marks = 0;  // before the products: weights take registers
#pragma unroll
    for (int i = 0; i < kPieceTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (extremes) marks |= (~__float_as_uint(weights[i][e]) >> 31) << (4 * i + e);
      }
    }
    multiply_columns<Kind>(result, weights, scratch(), values + piece * kPiece * l.value_pitch,
                           l.value_pitch, tiles);
    if (!extremes) return;
    add_extremes(result, marks, flags() + piece * kPiece, v + key * c.v.stride[2], c.v.stride[2],
                 column, c.value_dim);
  }

  // The results of kValueTiles tiles of columns.
  __device__ void sum_values(float (&result)[kValueTiles][4], Weigher<Kind, kPenalty>& weigher,
                             Total (&totals)[2][3], int column, bool counts, bool extremes) const {
    clear(result);
    this->template pieces<kAgain, true>(column, [&](int tile, int stage) {
      E* values = values_at(stage, kAgain);
      if (extremes) clean(values, l.value_pitch, l.tile, l.value_width, flags());
      own_pieces(tile, [&](int piece, int key, int own) {
        float weights[kPieceTiles][4];
        if constexpr (kAgain) {
          make_scores(weights, stage, piece);
          mask_end(weights, key);
          weigh(weights, key, weigher, totals, counts);
        } else {
          recall(weights, own);
        }
        multiply_values(result, weights, values, piece, key, column, extremes);
      });
    });
  }

  // The sums of the key groups together, divided and stored; returns whether any became NaN that
  // should not have.
  __device__ bool store(const float (&result)[kValueTiles][4],
                        const Weigher<Kind, kPenalty>& weigher, int column) const {
    float4* parts = reinterpret_cast<float4*>(memory + l.stages_at) + lane;
    const int of_warp = kValueTiles * 32, first_warp = row_group * l.key_groups;
#pragma unroll
    for (int i = 0; i < kValueTiles; ++i) {
      parts[(first_warp + key_group) * of_warp + i * 32] = {result[i][0], result[i][1],
                                                             result[i][2], result[i][3]};
    }
    __syncthreads();
    E* out = static_cast<E*>(c.out) + head / c.heads * c.out_stride[0] +
             head % c.heads * c.out_stride[1] + first * c.out_stride[2];
    bool spoilt = false;
    for (int i = key_group; i < kValueTiles; i += l.key_groups) {
      float4 total = parts[first_warp * of_warp + i * 32];
      for (int other = 1; other < l.key_groups; ++other) {
        const float4 part = parts[(first_warp + other) * of_warp + i * 32];
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
      }
      const float pairs[2][2] = {{total.x, total.y}, {total.z, total.w}};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (g + 8 * r >= rows) continue;
        const float sum = weigher.sums[r].sum;
        spoilt |= sum == sum && (pairs[r][0] != pairs[r][0] || pairs[r][1] != pairs[r][1]);
        store_pair(out + (g + 8 * r) * c.out_stride[2], column + 8 * i + 2 * t, c.value_dim,
                   c.value_dim % 2 == 0, pairs[r][0] / sum, pairs[r][1] / sum);
      }
    }
    __syncthreads();  // the stages are free again
    return spoilt;
  }

  __device__ void save_rows(const Weigher<Kind, kPenalty>& weigher) const {
    if (t != 0 || key_group != 0) return;
    const SavedRows& saved = c.saved;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (g + 8 * r >= rows) continue;
      const int64_t at = row() + g + 8 * r;
      const RowSums& sums = weigher.sums[r];
      const float sum = sums.sum;
      if (saved.softmax != nullptr) {
        saved.softmax[2 * at] = weigher.top[r];
        saved.softmax[2 * at + 1] = sum;
      }
      if (kPenalty) {
        const float root = sqrtf(static_cast<float>(c.keys));
        const float spread = (root - sum / sqrtf(sums.squares)) / (root - 1.0f);
        saved.tail_energy[at] = sums.tail / (sum * sum);
        saved.hoyer[at] = c.keys > 1 ? spread : sum / sum;
      }
    }
  }

  __device__ void run() {
    Weigher<Kind, kPenalty> weigher;
    RowRange range[2];
    find_ranges(range, weigher.strange);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weigher.top[r] = range[r].top;
      weigher.cut[r] = {-INFINITY, c.keys - 1};
    }
    if (c.selects) cut_rows(*this, range, c.keys, c.wanted, c.place, weigher.cut);
    Total totals[2][3];
    if constexpr (!kAgain) {
      weigh_kept(weigher, totals);
      put_together(totals, weigher);
      save_rows(weigher);
    }
    bool extremes = false;
#pragma unroll 1
    for (int column = 0; column < c.value_dim;) {
      const bool counts = kAgain && column == 0 && !extremes;
      float result[kValueTiles][4];
      sum_values(result, weigher, totals, column, counts, extremes);
      if (counts) {
        put_together(totals, weigher);
        save_rows(weigher);
      }
      const bool spoilt = store(result, weigher, column);
      extremes = !kPenalty && c.selects && !extremes && any(spoilt);
      if (!extremes) column += 8 * kValueTiles;
    }
  }
};

// Two blocks share a multiprocessor where scores are kept: what is found of rows is found before
// sums of values take registers.
template <class Kind, bool kAgain, bool kPenalty>
__global__ void __launch_bounds__(kMostThreads, kAgain ? 1 : 2)
    forward_kernel(ForwardCall c, ForwardTiling l) {
  using E = typename Kind::Element;
  const Quotient place(static_cast<int>(blockIdx.x), l.blocks);
  const int64_t batch = place.quotient / c.heads, head = place.quotient % c.heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_first = place.rest * l.row_groups * kRows;
  char* memory = dynamic_shared<char>();
  const auto of_head = [&](const Source& s) {
    return static_cast<const E*>(s.data) + batch * s.stride[0] + head * s.stride[1];
  };
  load_rows(reinterpret_cast<E*>(memory), l.pitch, of_head(c.q), c.q.stride[2], c.q.vectors,
            block_first, c.queries, l.row_groups * kRows, c.dim, l.chunks);
  const int first = block_first + warp / l.key_groups * kRows;
  Forward<Kind, kAgain, kPenalty> forward{
      {c, l, memory, of_head(c.k), of_head(c.v), lane, lane / 4, lane % 4, warp / l.key_groups,
       warp % l.key_groups, place.quotient, first, min(max(c.queries - first, 0), kRows)}};
  forward.run();
}

// ---- launches

template <class Kind>
ForwardTiling tiling(const ForwardCall& c, bool again, int row_groups, int key_groups, int tile,
                     int stages) {
  constexpr int kSize = sizeof(typename Kind::Element);
  ForwardTiling l{};
  l.row_groups = row_groups;
  l.key_groups = key_groups;
  l.tile = tile;
  l.tiles = (c.keys + tile - 1) / tile;
  l.pieces = tile / (kPiece * key_groups);
  l.stages = l.tiles > 1 ? stages : 1;
  l.value_width = padded(min(c.value_dim, 8 * kValueTiles));
  l.pitch = pitch_of(c.dim, kSize);
  l.value_pitch = pitch_of(l.value_width, kSize);
  l.blocks = Divisor((c.queries + kRows * row_groups - 1) / (kRows * row_groups));
  l.chunks = Divisor(padded(c.dim) * kSize / 16);
  l.value_chunks = Divisor(l.value_width * kSize / 16);
  const int warps = row_groups * key_groups;
  l.values_at = tile * l.pitch * kSize;
  const int of_values = tile * l.value_pitch * kSize;
  l.stage_bytes = again ? l.values_at + of_values : max(l.values_at, of_values);
  l.stages_at = row_groups * kRows * l.pitch * kSize;
  const int of_parts = warps * kValueTiles * 32 * 16;
  l.scores_at = l.stages_at + max(l.stages * l.stage_bytes, of_parts);
  l.scratch_at = l.scores_at + (again ? 0 : row_groups * kRows * l.tiles * tile * 4);
  l.exchange_at = l.scratch_at + (kSize == 4 ? warps * kRows * kScratchPitch * 4 : 0);
  l.flags_at = l.exchange_at + warps * kRows * 4;
  l.bytes = l.flags_at + tile * 4;
  return l;
}

template <class Kind, bool kAgain, bool kPenalty>
void run_forward(const char* name, const ForwardCall& c, int64_t heads, const ForwardTiling& l,
                 void* stream) {
  launch(name, forward_kernel<Kind, kAgain, kPenalty>, heads * l.blocks.by,
         32 * l.row_groups * l.key_groups, l.bytes, stream, c, l);
}

struct Choice {
  int row_groups, key_groups, tile, stages;
};

// Scores are kept where sixteen rows of them fit `most_bytes` of shared memory: by warps of their
// own, or by several warps together. Whether it was launched.
template <class Kind, bool kPenalty>
bool forward_kept(const char* name, const ForwardCall& c, int64_t heads, int most_bytes,
                  void* stream) {
  for (const Choice& choice : {Choice{4, 1, 64, 2}, Choice{2, 4, 128, 2}, Choice{2, 4, 128, 1},
                               Choice{1, 4, 128, 2}, Choice{1, 8, 256, 1}}) {
    if (int64_t{choice.row_groups} * kRows * c.keys * 4 > most_bytes) continue;  // else past an int
    const ForwardTiling l = tiling<Kind>(c, false, choice.row_groups, choice.key_groups,
                                         choice.tile, choice.stages);
    if (l.bytes > most_bytes) continue;
    run_forward<Kind, false, kPenalty>(name, c, heads, l, stream);
    return true;
  }
  return false;
}

// They are made again for each round of the cut.
template <class Kind, bool kPenalty>
void forward_again(const char* name, const ForwardCall& c, int64_t heads, int most_bytes,
                   void* stream) {
  for (const int row_groups : {8, 4, 2, 1}) {
    for (const Choice& choice : {Choice{row_groups, 1, 64, 2}, Choice{row_groups, 1, 32, 2},
                                 Choice{row_groups, 1, 32, 1}}) {
      const ForwardTiling l =
          tiling<Kind>(c, true, choice.row_groups, 1, choice.tile, choice.stages);
      if (l.bytes > most_bytes) continue;
      return run_forward<Kind, true, kPenalty>(name, c, heads, l, stream);
    }
  }
  throw std::runtime_error(std::string("pyvit.") + name +
                           ": the CUDA C++ kernels take no head dimension of " +
                           std::to_string(c.dim) + "; ask for backend 'triton'");
}

}  // namespace pyvit::cuda::attention
