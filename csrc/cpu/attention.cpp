// Dense attention, the terms of the k-sparse penalty, and the gradients of both. Nothing of the
// size queries × keys is in memory: tiles of query rows are made, used and forgotten.
//
// Backward recomputes the scores. With weights w = softmax(scale · q k^T), dP = dO · v^T, and
// a row's penalty terms (tail energy Σ_tail w², Hoyer sparsity (√N − 1/‖w‖) / (√N − 1)),
//
//   dW_ij = dP_ij + w_ij (2 dTail_i [j in the tail] + dHoyer_i / ((√N − 1) ‖w_i‖³))
//   dS_ij = scale · w_ij (dW_ij − Δ_i),   Δ_i = Σ_j w_ij dW_ij
//
// One task for each block of queries finds dq and the statistics of its rows; then one for each
// block of keys recomputes its columns, tile by tile of queries, and sums dk and dv.
#include <array>
#include <cmath>
#include <memory>

#include "score_tiles.h"
#include "select.h"

namespace pyvit {
namespace {

// ---- rows of weights ----------------------------------------------------------------------

template <class T>
struct RowSums {
  T sum, squares, tail;  // of exp(score − highest), of its squares, of those not selected
};

// `Count` sums over a row, one vector at a time by f(j, sums); in blocks of 512, so that the
// rounding of long sums stays small.
template <class T, int Count, class F>
std::array<T, Count> row_sums(int64_t n, const F& f) {
  Vec<T> total[Count] = {};
  for (int64_t j = 0; j < n;) {
    Vec<T> block[Count] = {};
    for (const int64_t end = std::min(n, j + 512); j < end; j += kLanes<T>) f(j, block);
    for (int c = 0; c < Count; ++c) total[c] += block[c];
  }
  std::array<T, Count> sums;
  for (int c = 0; c < Count; ++c) sums[c] = reduce_add<T>(total[c]);
  return sums;
}

// s[0:n] = scale · s with -inf up to the next whole vector; returns the largest.
template <class T>
T scale_row(T* s, int64_t n, T scale) {
  constexpr int L = kLanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  Vec<T> highest = broadcast(-inf);
  for (int64_t j = 0; j < n; j += L) {
    Vec<T> x = fma(load(s + j), broadcast(scale), Vec<T>{});
    if (n - j < L) x = lane_numbers<T>() < static_cast<Int<T>>(n - j) ? x : broadcast(-inf);
    store(s + j, x);
    highest = lane_max(highest, x);
  }
  return reduce_max<T>(highest);
}

// s = exp(s − highest); returns the sum.
template <class T>
T exponentials(T* s, int64_t n, T highest) {
  return row_sums<T, 1>(n, [&](int64_t j, Vec<T>* sums) {
    const Vec<T> e = exp_lanes(load(s + j) - broadcast(highest));
    store(s + j, e);
    sums[0] += e;
  })[0];
}

// The same, with the squares, and the cut as bits (whole 32-bit words).
template <class T>
RowSums<T> exponentials(T* s, int64_t n, T highest, const Cut<T>& cut, uint32_t* bits) {
  const auto sums = row_sums<T, 3>(n, [&](int64_t j, Vec<T>* sums) {
    const Vec<T> x = load(s + j);
    const Mask<T> kept = selected(x, j, cut);
    const Vec<T> e = exp_lanes(x - broadcast(highest));
    store(s + j, e);
    sums[0] += e;
    sums[1] = fma(e, e, sums[1]);
    sums[2] = kept ? sums[2] : fma(e, e, sums[2]);
    const uint32_t before = j % 32 == 0 ? 0 : bits[j / 32];
    bits[j / 32] = before | mask_bits(kept) << (j % 32);
  });
  return {sums[0], sums[1], sums[2]};
}

// √N − 1; a row of one weight is as sparse as can be, whatever its gradient.
template <class T>
T hoyer_span(int64_t n) {
  return std::sqrt(static_cast<T>(n)) - T(1);
}

// ---- forward ------------------------------------------------------------------------------

template <class S>
void forward(const AttentionShape& shape, const HeadRows& q, const HeadRows& k, const HeadRows& v,
             const HeadRows& out, int64_t topk, const PenaltyTerms* penalty) {
  using T = Compute<S>;
  using P = Panel<T>;
  const int64_t N = shape.keys, mask_bytes = ceil_div(N, 8);
  const T scale = static_cast<T>(shape.scale), span = hoyer_span<T>(N);
  const CutFinder<T> find_cuts(N, topk);
  const int64_t tile = tile_rows<T>(round_up(N, P::NR), 1);
  for_query_rows(shape, tile, [&](int64_t head, int64_t begin, int64_t end) {
    const auto queries = head_rows<S>(q, head, shape.heads);
    const auto values = head_rows<S>(v, head, shape.heads);
    const auto results = head_rows<S>(out, head, shape.heads);
    RowProducts<S> score(N, shape.dim);
    WeightedSums<S> sums(tile, shape.value_dim);
    Scratch scratch(score.scratch_bytes() + sums.scratch_bytes() +
                    Scratch::bytes_for<T>(P::MC * P::lda) +
                    Scratch::bytes_for<T>(tile * score.ld()) + Scratch::bytes_for<T>(tile) +
                    Scratch::bytes_for<uint32_t>(ceil_div(N, 32)));
    score.take(scratch);
    sums.take(scratch);
    T* a_panel = scratch.take<T>(P::MC * P::lda);
    T* scores = scratch.take<T>(tile * score.ld());
    T* total = scratch.take<T>(tile);
    uint32_t* bits = scratch.take<uint32_t>(ceil_div(N, 32));
    score.start(head_rows<S>(k, head, shape.heads), 0);
    for (int64_t i0 = begin; i0 < end; i0 += tile) {
      const int64_t m = std::min(tile, end - i0);
      score(queries, i0, m, a_panel, scores);
      for (int64_t i = 0; i < m && penalty == nullptr; ++i) {
        T* s = scores + i * score.ld();
        total[i] = exponentials(s, N, scale_row(s, N, scale));
      }
      for (int64_t b = 0; b < m && penalty != nullptr; b += find_cuts.batch()) {
        const int rows = static_cast<int>(std::min<int64_t>(find_cuts.batch(), m - b));
        T* batch = scores + b * score.ld();
        const RowStatistics<T> statistics = prepare_rows(batch, score.ld(), rows, N, scale);
        Cut<T> cuts[kLanes<T>];
        find_cuts(batch, score.ld(), rows, statistics, cuts);
        for (int i = 0; i < rows; ++i) {
          const RowSums<T> r = exponentials(batch + i * score.ld(), N,
                                            T(statistics.highest[i]), cuts[i], bits);
          const int64_t at = head * shape.queries + i0 + b + i;
          total[b + i] = r.sum;
          static_cast<T*>(penalty->tail_energy)[at] = r.tail / (r.sum * r.sum);
          const T inverse_norm = r.sum / std::sqrt(r.squares);
          static_cast<T*>(penalty->hoyer)[at] =
              N == 1 ? inverse_norm : (span + (T(1) - inverse_norm)) / span;
          if (penalty->selection != nullptr)
            std::memcpy(penalty->selection + at * mask_bytes, bits, mask_bytes);
        }
      }
      sums({scores, score.ld()}, m, values, N, a_panel,
           [&](int64_t i, int64_t column, T* run, int64_t count) {
             for (int64_t c = 0; c < count; ++c) run[c] /= total[i];
             narrow_run(results[i0 + i] + column, run, count);
           });
    }
  });
}

// ---- backward -----------------------------------------------------------------------------

// What a row's gradient of scores needs besides its scores and dP.
template <class T>
struct RowTerms {
  T highest, inverse_sum;  // w = exp(s − highest) · inverse_sum
  T tail, norm;            // dW = dP + w · (tail outside the selection + norm)
  T delta;
};

// One vector of w and of dW.
template <class T>
struct WeightVectors {
  Vec<T> w, dw;
};

template <class T>
inline WeightVectors<T> weight_vectors(Vec<T> s, Vec<T> dp, const RowTerms<T>& row,
                                       const uint8_t* selection, int64_t j) {
  const Vec<T> w = exp_lanes(s - broadcast(row.highest)) * broadcast(row.inverse_sum);
  if (selection == nullptr) return {w, dp};
  uint32_t bits = 0;
  std::memcpy(&bits, selection + j / 8, (kLanes<T> + 7) / 8);
  const Mask<T> kept = bits_mask<T>(bits >> (j % 8));
  const Vec<T> norm = broadcast(row.norm);
  return {w, fma(w, kept ? norm : norm + broadcast(row.tail), dp)};
}

template <class S>
class DenseBackward {
  using T = Compute<S>;
  using P = Panel<T>;
  static constexpr int64_t L = kLanes<T>;

 public:
  DenseBackward(const AttentionShape& shape, const DenseGradients& tensors)
      : shape_(shape),
        t_(tensors),
        scale_(static_cast<T>(shape.scale)),
        mask_bytes_(ceil_div(shape.keys, 8)),
        wants_scores_(t_.dq.data != nullptr || t_.dk.data != nullptr),
        penalty_(wants_scores_ && t_.grad_tail != nullptr),
        terms_(new RowTerms<T>[shape.batch * shape.heads * shape.queries]) {}

  void run() const {
    query_pass();
    if (t_.dk.data != nullptr || t_.dv.data != nullptr) key_pass();
  }

 private:
  // The selection bits of keys j0 to j0 + n of one row, with room to read a vector past the end.
  const uint8_t* selection_row(int64_t row, int64_t j0, int64_t n, uint8_t* buffer) const {
    if (!penalty_) return nullptr;
    std::memcpy(buffer, t_.selection + row * mask_bytes_ + j0 / 8, ceil_div(n, 8));
    return buffer;
  }

  // The terms of a row from its scaled scores and dP.
  RowTerms<T> row_terms(const T* s, const T* dp, T highest, int64_t row, const uint8_t* selection) const {
    const auto [sum, squares] = row_sums<T, 2>(shape_.keys, [&](int64_t j, Vec<T>* sums) {
      const Vec<T> e = exp_lanes(load(s + j) - broadcast(highest));
      sums[0] += e;
      sums[1] = fma(e, e, sums[1]);
    });
    RowTerms<T> terms{highest, T(1) / sum, T(0), T(0), T(0)};
    if (!wants_scores_) return terms;
    if (penalty_) {
      const T norm = std::sqrt(squares) * terms.inverse_sum;
      const T span = hoyer_span<T>(shape_.keys);
      terms.tail = 2 * static_cast<const T*>(t_.grad_tail)[row];
      terms.norm = shape_.keys == 1
                       ? T(0)
                       : static_cast<const T*>(t_.grad_hoyer)[row] / (span * norm * norm * norm);
    }
    terms.delta = row_sums<T, 1>(shape_.keys, [&](int64_t j, Vec<T>* sums) {
      const auto [w, dw] = weight_vectors(load(s + j), load(dp + j), terms, selection, j);
      sums[0] = fma(w, dw, sums[0]);
    })[0];
    return terms;
  }

  Vec<T> score_grad(const WeightVectors<T>& x, const RowTerms<T>& row) const {
    return x.w * (x.dw - broadcast(row.delta)) * broadcast(scale_);
  }

  void query_pass() const {
    const int64_t N = shape_.keys;
    const int64_t tile = tile_rows<T>(round_up(N, P::NR), 2);
    for_query_rows(shape_, tile, [&](int64_t head, int64_t begin, int64_t end) {
      const auto queries = head_rows<S>(t_.q, head, shape_.heads);
      const auto keys = head_rows<S>(t_.k, head, shape_.heads);
      const auto grads = head_rows<S>(t_.grad, head, shape_.heads);
      const auto dq = head_rows<S>(t_.dq, head, shape_.heads);
      RowProducts<S> score(N, shape_.dim), value(N, shape_.value_dim);
      WeightedSums<S> sums(tile, shape_.dim);
      const int64_t ld = score.ld();
      Scratch scratch(score.scratch_bytes() + value.scratch_bytes() + sums.scratch_bytes() +
                      Scratch::bytes_for<T>(P::MC * P::lda) + 2 * Scratch::bytes_for<T>(tile * ld) +
                      Scratch::bytes_for<uint8_t>(mask_bytes_ + L));
      score.take(scratch);
      value.take(scratch);
      sums.take(scratch);
      T* a_panel = scratch.take<T>(P::MC * P::lda);
      T* scores = scratch.take<T>(tile * ld);
      T* dp = scratch.take<T>(tile * ld);
      uint8_t* mask = scratch.take<uint8_t>(mask_bytes_ + L);
      score.start(keys, 0);
      value.start(head_rows<S>(t_.v, head, shape_.heads), 0);
      for (int64_t i0 = begin; i0 < end; i0 += tile) {
        const int64_t m = std::min(tile, end - i0);
        score(queries, i0, m, a_panel, scores);
        if (wants_scores_) value(grads, i0, m, a_panel, dp);
        for (int64_t i = 0; i < m; ++i) {
          T* s = scores + i * ld;
          T* d = dp + i * ld;
          const int64_t row = head * shape_.queries + i0 + i;
          const uint8_t* selection = selection_row(row, 0, N, mask);
          const T highest = scale_row(s, N, scale_);
          const RowTerms<T> terms = terms_[row] = row_terms(s, d, highest, row, selection);
          if (dq.data == nullptr) continue;
          for (int64_t j = 0; j < N; j += L)
            store(d + j, score_grad(weight_vectors(load(s + j), load(d + j), terms, selection, j),
                                    terms));
        }
        if (dq.data == nullptr) continue;
        sums({dp, ld}, m, keys, N, a_panel,
             [&](int64_t i, int64_t column, const T* run, int64_t count) {
               narrow_run(dq[i0 + i] + column, run, count);
             });
      }
    });
  }

  // Keys of one task: whole strips, as many as leave the scratch below its limit.
  int64_t keys_per_task() const {
    const int64_t columns = 2 * (shape_.dim + shape_.value_dim) + 4 * kTileRows<T>;
    const int64_t room = kScratchLimit * 3 / 4 / (columns * int64_t(sizeof(T)));
    return std::clamp<int64_t>(room / P::NR * P::NR, P::NR, 256);
  }

  // Adds rows^T · strips to sum [dim, n]: the gradients of keys and values, transposed, so that
  // the tile of weights is the vector side of the micro-kernel as it lies.
  static void add_transposed(T* sum, int64_t ld, Rows<S> rows, int64_t i0, int64_t m, int64_t dim,
                             const T* strips, int64_t n, T* a_panel) {
    for (int64_t d = 0; d < dim; d += P::MC) {
      const int64_t depth = std::min(P::MC, dim - d);
      pack_columns(a_panel, rows, i0, m, d, depth);
      multiply_panels(a_panel, depth, strips, n, m, sum + d * ld, ld, true);
    }
  }

  static void write_transposed(Rows<S> out, int64_t j0, int64_t n, const T* sum, int64_t ld,
                               int64_t dim) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t d = 0; d < dim; ++d) out[j0 + j][d] = narrow<S>(sum[d * ld + j]);
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
    constexpr int64_t tile = kTileRows<T>;
    const int64_t dim_k = dk.data == nullptr ? 0 : shape_.dim;
    const int64_t dim_v = dv.data == nullptr ? 0 : shape_.value_dim;
    RowProducts<S> score(n, shape_.dim), value(n, shape_.value_dim);
    const int64_t ld = score.ld();
    Scratch scratch(score.scratch_bytes() + value.scratch_bytes() +
                    Scratch::bytes_for<T>(P::MC * P::lda) + 4 * Scratch::bytes_for<T>(tile * ld) +
                    Scratch::bytes_for<T>(dim_k * ld) + Scratch::bytes_for<T>(dim_v * ld) +
                    Scratch::bytes_for<uint8_t>(n / 8 + L));
    score.take(scratch);
    value.take(scratch);
    T* a_panel = scratch.take<T>(P::MC * P::lda);
    T* scores = scratch.take<T>(tile * ld);
    T* dp = scratch.take<T>(tile * ld);
    T* weight_strips = scratch.take<T>(tile * ld);
    T* grad_strips = scratch.take<T>(tile * ld);
    T* sum_k = scratch.take<T>(dim_k * ld);
    T* sum_v = scratch.take<T>(dim_v * ld);
    uint8_t* mask = scratch.take<uint8_t>(n / 8 + L);
    std::fill(sum_k, sum_k + dim_k * ld, T(0));
    std::fill(sum_v, sum_v + dim_v * ld, T(0));
    score.start(head_rows<S>(t_.k, head, shape_.heads), j0);
    value.start(head_rows<S>(t_.v, head, shape_.heads), j0);
    for (int64_t i0 = 0; i0 < shape_.queries; i0 += tile) {
      const int64_t m = std::min(tile, shape_.queries - i0);
      score(queries, i0, m, a_panel, scores);
      if (dim_k > 0) value(grads, i0, m, a_panel, dp);
      for (int64_t i = 0; i < m; ++i) {
        const int64_t row = head * shape_.queries + i0 + i;
        const RowTerms<T>& terms = terms_[row];
        const uint8_t* selection = dim_k > 0 ? selection_row(row, j0, n, mask) : nullptr;
        for (int64_t j = 0; j < ld; j += L) {
          const Vec<T> s = fma(load(scores + i * ld + j), broadcast(scale_), Vec<T>{});
          const Vec<T> d = dim_k > 0 ? load(dp + i * ld + j) : Vec<T>{};
          const WeightVectors<T> x = weight_vectors(s, d, terms, selection, j);
          const int64_t at = j / P::NR * P::NR * m + i * P::NR + j % P::NR;
          store(weight_strips + at, x.w);
          store(grad_strips + at, score_grad(x, terms));
        }
      }
      add_transposed(sum_v, ld, grads, i0, m, dim_v, weight_strips, n, a_panel);
      add_transposed(sum_k, ld, queries, i0, m, dim_k, grad_strips, n, a_panel);
    }
    write_transposed(dk, j0, n, sum_k, ld, dim_k);
    write_transposed(dv, j0, n, sum_v, ld, dim_v);
  }

  const AttentionShape& shape_;
  const DenseGradients& t_;
  T scale_;
  int64_t mask_bytes_;
  bool wants_scores_, penalty_;
  std::unique_ptr<RowTerms<T>[]> terms_;  // [batch, head, query]
};

}  // namespace

void attention(DType dtype, const AttentionShape& shape, HeadRows q, HeadRows k, HeadRows v,
               HeadRows out, int64_t topk, const PenaltyTerms* penalty) {
  dispatch(dtype, [&](auto s) { forward<decltype(s)>(shape, q, k, v, out, topk, penalty); });
}

void attention_dense_backward(DType dtype, const AttentionShape& shape,
                              const DenseGradients& tensors) {
  dispatch(dtype, [&](auto s) { DenseBackward<decltype(s)>(shape, tensors).run(); });
}

}  // namespace pyvit
