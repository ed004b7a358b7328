// The gradients of dense attention and of the terms of the k-sparse penalty. Nothing of the size
// queries × keys is in memory: the scores are computed again, tile by tile of query rows.
//
// With weights w = softmax(scale · q k^T), dP = dO · v^T, and a row's penalty terms (tail energy
// Σ_tail w², Hoyer sparsity (√N − 1/‖w‖) / (√N − 1)),
//
//   dW_ij = dP_ij + w_ij (2 dTail_i [j in the tail] + dHoyer_i / ((√N − 1) ‖w_i‖³))
//   dS_ij = scale · w_ij (dW_ij − Δ_i),   Δ_i = Σ_j w_ij dW_ij
//   dq = dS k    dk = dS^T q    dv = w^T dO
//
// Where the sums dk and dv of a whole head fit the scratch, one task a head makes each tile once:
// five matrix products. Else, or where there are fewer heads than threads, one task for each
// block of queries finds dq and the statistics of its rows, and then one for each block of keys
// recomputes its columns: seven products. Both ways give the same bits.
#include <memory>

#include "attention_rows.h"
#include "score_tiles.h"

namespace pyvit {
namespace {

// What a row's gradient of scores needs besides its scores and dP.
template <class T>
struct RowTerms {
  T highest, inverse_sum;  // w = exp(s − highest) · inverse_sum
  T tail, norm;            // dW = dP + w · (tail outside the selection + norm)
  T delta;
};

// One vector of dW; `selection` are a row's bits, or null where there is no penalty.
template <class T>
inline Vec<T> weight_grad(Vec<T> w, Vec<T> dp, const RowTerms<T>& row, const uint8_t* selection,
                          int64_t j) {
  if (selection == nullptr) return dp;
  uint32_t bits = 0;
  std::memcpy(&bits, selection + j / 8, (kLanes<T> + 7) / 8);
  const Mask<T> kept = bits_mask<T>(bits >> (j % 8));
  const Vec<T> norm = broadcast(row.norm);
  return fma(w, kept ? norm : norm + broadcast(row.tail), dp);
}

// What the tiles of a head's queries with keys j0 to j0 + n need: scores, dP, a row's bits of the
// selection, and the sums of dk and dv that are wanted, transposed: the tile of weights is the
// vector side of the micro-kernel as it lies.
template <class S>
struct KeyTiles {
  using T = Compute<S>;
  using P = Panel<T>;
  static constexpr int64_t L = kLanes<T>;

  int64_t n, dim_k, dim_v;  // dim_k and dim_v are 0 where no gradient is wanted
  RowProducts<S> score, value;
  int64_t ld = score.ld();
  Scratch scratch;
  T* a_panel;
  StripTile<T> s, dp;
  T *sum_k, *sum_v;
  uint8_t* selection;

  // `more` bytes of the scratch are left for the caller.
  KeyTiles(const AttentionShape& shape, int64_t n, int64_t tile, int64_t dim_k, int64_t dim_v,
           int64_t more)
      : n(n),
        dim_k(dim_k),
        dim_v(dim_v),
        score(n, shape.dim),
        value(n, shape.value_dim),
        scratch(score.scratch_bytes() + value.scratch_bytes() +
                Scratch::bytes_for<T>(P::MC * P::lda) + 2 * Scratch::bytes_for<T>(tile * ld) +
                Scratch::bytes_for<T>(dim_k * ld) + Scratch::bytes_for<T>(dim_v * ld) +
                Scratch::bytes_for<uint8_t>(n / 8 + L) + more) {
    score.take(scratch);
    value.take(scratch);
    a_panel = scratch.take<T>(P::MC * P::lda);
    s = {scratch.take<T>(tile * ld), 0};
    dp = {scratch.take<T>(tile * ld), 0};
    sum_k = scratch.take<T>(dim_k * ld);
    sum_v = scratch.take<T>(dim_v * ld);
    selection = scratch.take<uint8_t>(n / 8 + L);
    std::fill(sum_k, sum_k + dim_k * ld, T(0));
    std::fill(sum_v, sum_v + dim_v * ld, T(0));
  }

  void start(Rows<S> keys, Rows<S> values, int64_t j0) {
    score.start(keys, j0);
    value.start(values, j0);
  }

  // Rows i0 to i0 + m of the scores, and of dP where it is wanted.
  void fill(Rows<S> queries, Rows<S> grads, int64_t i0, int64_t m, bool wants_dp) {
    s.rows = dp.rows = m;
    score(queries, i0, m, a_panel, s);
    if (wants_dp) value(grads, i0, m, a_panel, dp);
  }

  // Adds what the tile's rows, now weights and dS, give to dk and dv.
  void add(Rows<S> queries, Rows<S> grads, int64_t i0) {
    add_transposed(sum_v, grads, i0, dim_v, s);
    add_transposed(sum_k, queries, i0, dim_k, dp);
  }

  void write(Rows<S> dk, Rows<S> dv, int64_t j0) const {
    write_transposed(dk, j0, sum_k, dim_k);
    write_transposed(dv, j0, sum_v, dim_v);
  }

 private:
  // sum [dim, n] += rows^T · tile
  void add_transposed(T* sum, Rows<S> rows, int64_t i0, int64_t dim, StripTile<T> tile) {
    for (int64_t d = 0; d < dim; d += P::MC) {
      const int64_t depth = std::min(P::MC, dim - d);
      pack_columns(a_panel, rows, i0, tile.rows, d, depth);
      multiply_panels(a_panel, depth, tile.data, n, tile.rows, sum + d * ld, ld, true);
    }
  }

  // By squares of one vector's worth of keys and columns, in the panel that is free now.
  void write_transposed(Rows<S> out, int64_t j0, T* sum, int64_t dim) const {
    const Rows<T> sums{sum, ld};
    for (int64_t j = 0; j < n; j += L)
      for (int64_t d = 0; d < dim; d += P::KC) {
        const int64_t depth = std::min(P::KC, dim - d), count = std::min(L, n - j);
        for (int64_t c = 0; c < depth; c += L)
          transpose_lanes(a_panel + c, P::lda, sums, d + c, std::min(L, depth - c), j, count);
        for (int64_t i = 0; i < count; ++i)
          narrow_run(out[j0 + j + i] + d, a_panel + i * P::lda, depth);
      }
  }
};

template <class S>
class DenseBackward {
  using T = Compute<S>;
  using P = Panel<T>;
  using Tile = StripTile<T>;
  static constexpr int64_t L = kLanes<T>;

 public:
  DenseBackward(const AttentionShape& shape, const DenseGradients& tensors)
      : shape_(shape),
        t_(tensors),
        scale_(static_cast<T>(shape.scale)),
        mask_bytes_(ceil_div(shape.keys, 8)),
        wants_scores_(t_.dq.data != nullptr || t_.dk.data != nullptr),
        penalty_(wants_scores_ && t_.grad_tail != nullptr),
        whole_tile_(whole_head_tile()),
        terms_(new RowTerms<T>[shape.batch * shape.heads * shape.queries]) {}

  void run() const {
    const bool wants_keys = t_.dk.data != nullptr || t_.dv.data != nullptr;
    const int64_t heads = shape_.batch * shape_.heads;
    if (whole_tile_ > 0 && wants_keys && heads >= thread_count())
      return parallel_for(heads, [&](int64_t head) {
        query_rows(head, 0, shape_.queries, whole_tile_, true);
      });
    const int64_t tile = query_tile();
    for_query_rows(shape_, tile, [&](int64_t head, int64_t begin, int64_t end) {
      query_rows(head, begin, end, tile, false);
    });
    if (wants_keys) key_pass();
  }

 private:
  // ---- rows -------------------------------------------------------------------------------

  // The selection bits of keys j0 to j0 + n of one row, with room to read a vector past the end.
  const uint8_t* selection_row(int64_t row, int64_t j0, int64_t n, uint8_t* buffer) const {
    if (!penalty_) return nullptr;
    std::memcpy(buffer, t_.selection + row * mask_bytes_ + j0 / 8, ceil_div(n, 8));
    return buffer;
  }

  // The terms of row i of a tile of scores and dP; the scores become exponentials.
  template <bool Penalty>
  RowTerms<T> row_terms(Tile s, Tile dp, int64_t i, int64_t row, const uint8_t* selection) const {
    const T top = scale_row(shape_.keys, scale_, [&](int64_t j) { return s.at(i, j); });
    const RowTerms<T> unit{T(0), T(0), T(1), T(0), T(0)};
    const auto [sum, product, squares, tail] =
        row_sums<T, 4>(shape_.keys, [&](int64_t j, Vec<T>* sums) {
          const Vec<T> e = exp_lanes(load(s.at(i, j)) - broadcast(top));
          store(s.at(i, j), e);
          sums[0] += e;
          if (wants_scores_) sums[1] = fma(e, load(dp.at(i, j)), sums[1]);
          if (!Penalty) return;
          sums[2] = fma(e, e, sums[2]);
          sums[3] = fma(e, weight_grad(e, Vec<T>{}, unit, selection, j), sums[3]);
        });
    RowTerms<T> terms{top, T(1) / sum, T(0), T(0), product / sum};
    if (!Penalty) return terms;
    const T norm = std::sqrt(squares) * terms.inverse_sum, span = hoyer_span<T>(shape_.keys);
    terms.tail = 2 * static_cast<const T*>(t_.grad_tail)[row];
    if (shape_.keys > 1)
      terms.norm = static_cast<const T*>(t_.grad_hoyer)[row] / (span * norm * norm * norm);
    terms.delta += terms.norm * norm * norm +
                   terms.tail * tail * terms.inverse_sum * terms.inverse_sum;
    return terms;
  }

  // One vector of exponentials and of dP becomes one of w and of dS.
  void finish(T* s, T* dp, Vec<T> e, const RowTerms<T>& row, const uint8_t* selection,
              int64_t j) const {
    const Vec<T> w = e * broadcast(row.inverse_sum);
    store(s, w);
    if (!wants_scores_) return;
    const Vec<T> dw = weight_grad(w, load(dp), row, selection, j);
    store(dp, w * (dw - broadcast(row.delta)) * broadcast(scale_));
  }

  // ---- queries ----------------------------------------------------------------------------

  // Rows of a tile where the sums of a whole head fit beside it, else 0: of the shape alone.
  int64_t whole_head_tile() const {
    const int64_t N = shape_.keys, columns = round_up(N, P::NR) * int64_t(sizeof(T));
    if (!RowProducts<S>::is_resident(N, std::max(shape_.dim, shape_.value_dim))) return 0;
    for (int64_t tile = kTileRows<T>; tile >= kTileRows<T> / 4; tile -= P::MR) {
      const int64_t bytes = columns * (2 * (shape_.dim + shape_.value_dim) + 2 * tile);
      const int64_t others = WeightedSums<S>(tile, shape_.dim).scratch_bytes() + mask_bytes_;
      if (bytes + others + P::MC * P::lda * int64_t(sizeof(T)) + 4096 <= kScratchLimit) return tile;
    }
    return 0;
  }

  // Rows of a tile else: all the scratch, since keys and values are packed anew for each tile
  // where they do not stay.
  int64_t query_tile() const {
    const int64_t N = shape_.keys;
    const int64_t others = RowProducts<S>(N, shape_.dim).scratch_bytes() +
                           RowProducts<S>(N, shape_.value_dim).scratch_bytes() +
                           WeightedSums<S>(kTileRows<T>, shape_.dim).scratch_bytes() +
                           P::MC * P::lda * int64_t(sizeof(T)) + mask_bytes_ + 4096;
    const int64_t room = std::min<int64_t>(kScratchLimit - others, 1280 << 10);
    return tile_rows<T>(round_up(N, P::NR), 2, room);
  }

  // dq and the terms of a head's rows; and, over all its rows, dk and dv.
  void query_rows(int64_t head, int64_t begin, int64_t end, int64_t tile, bool keys_too) const {
    const int64_t N = shape_.keys;
    const auto queries = head_rows<S>(t_.q, head, shape_.heads);
    const auto keys = head_rows<S>(t_.k, head, shape_.heads);
    const auto grads = head_rows<S>(t_.grad, head, shape_.heads);
    const auto dq = head_rows<S>(t_.dq, head, shape_.heads);
    const auto dk = head_rows<S>(t_.dk, head, shape_.heads);
    const auto dv = head_rows<S>(t_.dv, head, shape_.heads);
    WeightedSums<S> sums(tile, shape_.dim);
    KeyTiles<S> tiles(shape_, N, tile, keys_too && dk.data != nullptr ? shape_.dim : 0,
                      keys_too && dv.data != nullptr ? shape_.value_dim : 0,
                      sums.scratch_bytes());
    sums.take(tiles.scratch);
    const Tile &s = tiles.s, &dp = tiles.dp;
    tiles.start(keys, head_rows<S>(t_.v, head, shape_.heads), 0);
    for (int64_t i0 = begin; i0 < end; i0 += tile) {
      const int64_t m = std::min(tile, end - i0);
      tiles.fill(queries, grads, i0, m, wants_scores_);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = head * shape_.queries + i0 + i;
        const uint8_t* selection = selection_row(row, 0, N, tiles.selection);
        const RowTerms<T> terms = penalty_ ? row_terms<true>(s, dp, i, row, selection)
                                           : row_terms<false>(s, dp, i, row, selection);
        terms_[row] = terms;
        if (dq.data == nullptr && !keys_too) continue;
        for (int64_t j = 0; j < N; j += L)
          finish(s.at(i, j), dp.at(i, j), load(s.at(i, j)), terms, selection, j);
      }
      if (dq.data != nullptr)
        sums(dp, m, keys, N, tiles.a_panel,
             [&](int64_t i, int64_t column, const T* run, int64_t count) {
               narrow_run(dq[i0 + i] + column, run, count);
             });
      tiles.add(queries, grads, i0);
    }
    tiles.write(dk, dv, 0);
  }

  // ---- keys -------------------------------------------------------------------------------

  // Keys of one task: whole strips and bytes of the selection, as many as leave the scratch below
  // its limit.
  int64_t keys_per_task() const {
    constexpr int64_t step = std::max(P::NR, 8);
    const int64_t columns = 2 * (shape_.dim + shape_.value_dim) + 2 * kTileRows<T>;
    const int64_t room = kScratchLimit * 3 / 4 / (columns * int64_t(sizeof(T)));
    return std::clamp<int64_t>(room / step * step, step, 256);
  }

  void key_pass() const {
    const int64_t block = keys_per_task(), blocks = ceil_div(shape_.keys, block);
    parallel_for(shape_.batch * shape_.heads * blocks, [&](int64_t task) {
      const int64_t j0 = task % blocks * block;
      key_block(task / blocks, j0, std::min(block, shape_.keys - j0));
    });
  }

  void key_block(int64_t head, int64_t j0, int64_t n) const {
    const auto queries = head_rows<S>(t_.q, head, shape_.heads);
    const auto grads = head_rows<S>(t_.grad, head, shape_.heads);
    const auto dk = head_rows<S>(t_.dk, head, shape_.heads);
    const auto dv = head_rows<S>(t_.dv, head, shape_.heads);
    // Where a whole head could be one task, its tiles: then the sums are the same.
    const int64_t tile = whole_tile_ > 0 ? whole_tile_ : kTileRows<T>;
    KeyTiles<S> tiles(shape_, n, tile, dk.data == nullptr ? 0 : shape_.dim,
                      dv.data == nullptr ? 0 : shape_.value_dim, 0);
    const Tile &s = tiles.s, &dp = tiles.dp;
    tiles.start(head_rows<S>(t_.k, head, shape_.heads), head_rows<S>(t_.v, head, shape_.heads), j0);
    for (int64_t i0 = 0; i0 < shape_.queries; i0 += tile) {
      const int64_t m = std::min(tile, shape_.queries - i0);
      tiles.fill(queries, grads, i0, m, wants_scores_);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = head * shape_.queries + i0 + i;
        const RowTerms<T>& terms = terms_[row];
        const uint8_t* selection = selection_row(row, j0, n, tiles.selection);
        for (int64_t j = 0; j < n; j += L) {
          const Vec<T> scaled = fma(load(s.at(i, j)), broadcast(scale_), Vec<T>{});
          finish(s.at(i, j), dp.at(i, j), exp_lanes(scaled - broadcast(terms.highest)), terms,
                 selection, j);
        }
      }
      tiles.add(queries, grads, i0);
    }
    tiles.write(dk, dv, j0);
  }

  const AttentionShape& shape_;
  const DenseGradients& t_;
  T scale_;
  int64_t mask_bytes_;
  bool wants_scores_, penalty_;
  int64_t whole_tile_;
  std::unique_ptr<RowTerms<T>[]> terms_;  // [batch, head, query]
};

}  // namespace

void attention_dense_backward(DType dtype, const AttentionShape& shape,
                              const DenseGradients& tensors) {
  dispatch(dtype, [&](auto s) { DenseBackward<decltype(s)>(shape, tensors).run(); });
}

}  // namespace pyvit
