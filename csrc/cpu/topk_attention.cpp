// Attention in which each query keeps exactly its topk largest scores.
//
// Forward: a tile of query rows' scores, made by the GEMM micro-kernel, stays in the cache; each
// row is cut (select.h), the chosen scores are gathered, and the softmax and the product with
// the values touch the chosen keys alone.
//
// Backward: with the chosen keys j of query i and their weights w, and Δ_i = Σ_j w_ij dP_ij,
//
//   dP_ij = dO_i · v_j    dS_ij = scale · w_ij (dP_ij − Δ_i)    dq_i = Σ_j dS_ij k_j
//   dk_j = Σ_i dS_ij q_i  dv_j = Σ_i w_ij dO_i
//
// The first line is a task for each block of queries. The second is a task for each range of
// keys, which goes through the queries in order and adds to private rows: no two tasks write one
// place, and the order of every sum is that of the queries, whatever the number of threads.
#include <memory>

#include "score_tiles.h"
#include "select.h"

namespace pyvit {
namespace {

// ---- gathers of chosen rows ---------------------------------------------------------------

// f(constant C, column, lanes of the last vector) over runs of at most four vectors of columns.
template <class T, class F>
void for_column_runs(int64_t dim, const F& f) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t column = 0; column < dim; column += 4 * L) {
    const int64_t width = std::min(4 * L, dim - column), vectors = ceil_div(width, L);
    const int64_t last = width - (vectors - 1) * L;
    switch (vectors) {
      case 1: f(std::integral_constant<int, 1>{}, column, last); break;
      case 2: f(std::integral_constant<int, 2>{}, column, last); break;
      case 3: f(std::integral_constant<int, 3>{}, column, last); break;
      default: f(std::integral_constant<int, 4>{}, column, last);
    }
  }
}

// C vectors of a row; the last may be partial, and nothing past it is read.
template <int C, class S>
inline void load_run(Vec<Compute<S>> (&x)[C], const S* p, int64_t last) {
  constexpr int L = kLanes<Compute<S>>;
#pragma GCC unroll 4
  for (int c = 0; c + 1 < C; ++c) x[c] = load_wide(p + c * L);
  x[C - 1] = last == L ? load_wide(p + (C - 1) * L) : load_partial(p + (C - 1) * L, last);
}

// sum[0:dim] = Σ_n weights[n] · rows[indices[n]]; sum is padded to whole vectors.
template <class S>
void gather_sum(Compute<S>* sum, const Compute<S>* weights, const int32_t* indices, int64_t count,
                Rows<S> rows, int64_t dim) {
  using T = Compute<S>;
  for_column_runs<T>(dim, [&](auto vectors, int64_t column, int64_t last) {
    constexpr int C = decltype(vectors)::value;
    Vec<T> even[C] = {}, odd[C] = {}, x[C];
    int64_t n = 0;
    for (; n + 2 <= count; n += 2) {
      load_run<C>(x, rows[indices[n]] + column, last);
      for (int c = 0; c < C; ++c) even[c] = fma(broadcast(weights[n]), x[c], even[c]);
      load_run<C>(x, rows[indices[n + 1]] + column, last);
      for (int c = 0; c < C; ++c) odd[c] = fma(broadcast(weights[n + 1]), x[c], odd[c]);
    }
    if (n < count) {
      load_run<C>(x, rows[indices[n]] + column, last);
      for (int c = 0; c < C; ++c) even[c] = fma(broadcast(weights[n]), x[c], even[c]);
    }
    for (int c = 0; c < C; ++c) store(sum + column + c * kLanes<T>, even[c] + odd[c]);
  });
}

// products[n] = a · rows[indices[n]]; a is padded with zeros, products to whole vectors.
template <class S>
void gather_products(Compute<S>* products, const Compute<S>* a, const int32_t* indices,
                     int64_t count, Rows<S> rows, int64_t dim) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for (int64_t n = 0; n < count; n += L) {
    Vec<T> partial[L] = {};
    for_column_runs<T>(dim, [&](auto vectors, int64_t column, int64_t last) {
      constexpr int C = decltype(vectors)::value;
      Vec<T> x[C], factor[C];
      for (int c = 0; c < C; ++c) factor[c] = load(a + column + c * L);
      for (int i = 0; i < L && n + i < count; ++i) {
        load_run<C>(x, rows[indices[n + i]] + column, last);
        for (int c = 0; c < C; ++c) partial[i] = fma(factor[c], x[c], partial[i]);
      }
    });
    store(products + n, sum_of_each<T>(partial));
  }
}

// rows[indices[n] - first] += weights[n] · a; rows and a are padded to whole vectors.
template <class T>
void scatter_add(T* rows, int64_t ld, int64_t first, const T* weights, const int32_t* indices,
                 int64_t count, const T* a, int64_t dim) {
  for_column_runs<T>(dim, [&](auto vectors, int64_t column, int64_t) {
    constexpr int C = decltype(vectors)::value;
    Vec<T> x[C];
    for (int c = 0; c < C; ++c) x[c] = load(a + column + c * kLanes<T>);
    for (int64_t n = 0; n < count; ++n) {
      T* row = rows + (indices[n] - first) * ld + column;
      const Vec<T> w = broadcast(weights[n]);
      for (int c = 0; c < C; ++c)
        store(row + c * kLanes<T>, fma(w, x[c], load(row + c * kLanes<T>)));
    }
  });
}

// ---- forward ------------------------------------------------------------------------------

// scores[0:count] = softmax of them.
template <class T>
void softmax(T* scores, int64_t count, T highest) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t n = count; n < round_up(count, L); ++n)
    scores[n] = -std::numeric_limits<T>::infinity();
  Vec<T> sum{};
  for (int64_t n = 0; n < count; n += L) {
    const Vec<T> e = exp_lanes(load(scores + n) - broadcast(highest));
    store(scores + n, e);
    sum += e;
  }
  const Vec<T> total = broadcast(reduce_add<T>(sum));
  for (int64_t n = 0; n < count; n += L) store(scores + n, load(scores + n) / total);
}

template <class S>
void forward(const AttentionShape& shape, int64_t topk, const HeadRows& q, const HeadRows& k,
             const HeadRows& v, const HeadRows& out, int32_t* indices, Compute<S>* weights) {
  using T = Compute<S>;
  using P = Panel<T>;
  constexpr int64_t L = kLanes<T>;
  const int64_t N = shape.keys;
  const T scale = static_cast<T>(shape.scale);
  const CutFinder<T> find_cut(N, topk);
  const int64_t tile = tile_rows<T>(round_up(N, P::NR), 1);
  for_query_rows(shape, tile, [&](int64_t head, int64_t begin, int64_t end) {
    const auto queries = head_rows<S>(q, head, shape.heads);
    const auto values = head_rows<S>(v, head, shape.heads);
    const auto results = head_rows<S>(out, head, shape.heads);
    RowProducts<S> score(N, shape.dim);
    Scratch scratch(score.scratch_bytes() + Scratch::bytes_for<T>(P::MC * P::lda) +
                    Scratch::bytes_for<T>(tile * score.ld()) +
                    Scratch::bytes_for<T>(round_up(shape.value_dim, L)) +
                    Scratch::bytes_for<T>(topk + L) + Scratch::bytes_for<int32_t>(topk + L));
    score.take(scratch);
    T* a_panel = scratch.take<T>(P::MC * P::lda);
    T* scores = scratch.take<T>(tile * score.ld());
    T* sum = scratch.take<T>(round_up(shape.value_dim, L));
    T* chosen = scratch.take<T>(topk + L);
    int32_t* chosen_indices = scratch.take<int32_t>(topk + L);
    score.start(head_rows<S>(k, head, shape.heads), 0);
    for (int64_t i0 = begin; i0 < end; i0 += tile) {
      const int64_t m = std::min(tile, end - i0);
      score(queries, i0, m, a_panel, scores);
      for (int64_t i = 0; i < m; ++i) {
        T* s = scores + i * score.ld();
        const RowStatistics<T> row = prepare_row(s, N, scale);
        collect_selected(s, N, find_cut(s, row), chosen_indices, chosen);
        softmax(chosen, topk, row.highest);
        gather_sum(sum, chosen, chosen_indices, topk, values, shape.value_dim);
        narrow_run(results[i0 + i], sum, shape.value_dim);
        if (indices == nullptr) continue;
        const int64_t at = (head * shape.queries + i0 + i) * topk;
        std::copy(chosen_indices, chosen_indices + topk, indices + at);
        std::copy(chosen, chosen + topk, weights + at);
      }
    }
  });
}

// ---- backward -----------------------------------------------------------------------------

// dS and dq, by blocks of queries. `score_grads` may be null where only dq is wanted.
template <class S>
void query_pass(const AttentionShape& shape, int64_t topk, const SelectedGradients& t,
                Compute<S>* score_grads) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const T scale = static_cast<T>(shape.scale);
  const int64_t padded = round_up(topk, L);
  const int64_t columns = round_up(std::max(shape.dim, shape.value_dim), L);
  for_query_rows(shape, 16, [&](int64_t head, int64_t begin, int64_t end) {
    const auto grads = head_rows<S>(t.grad, head, shape.heads);
    const auto keys = head_rows<S>(t.k, head, shape.heads);
    const auto values = head_rows<S>(t.v, head, shape.heads);
    const auto dq = head_rows<S>(t.dq, head, shape.heads);
    Scratch scratch(2 * Scratch::bytes_for<T>(padded) + Scratch::bytes_for<T>(columns));
    T* w = scratch.take<T>(padded);
    T* ds = scratch.take<T>(padded);
    T* line = scratch.take<T>(columns);
    std::fill(w + topk, w + padded, T(0));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (head * shape.queries + i) * topk;
      std::copy_n(static_cast<const T*>(t.weights) + at, topk, w);
      std::fill(line, line + columns, T(0));
      widen_run(line, grads[i], shape.value_dim);
      gather_products(ds, line, t.indices + at, topk, values, shape.value_dim);
      Vec<T> sum{};
      for (int64_t n = 0; n < padded; n += L) sum = fma(load(w + n), load(ds + n), sum);
      const Vec<T> delta = broadcast(reduce_add<T>(sum));
      for (int64_t n = 0; n < padded; n += L)
        store(ds + n, load(w + n) * (load(ds + n) - delta) * broadcast(scale));
      if (score_grads != nullptr) std::copy_n(ds, topk, score_grads + at);
      if (dq.data == nullptr) continue;
      gather_sum(line, ds, t.indices + at, topk, keys, shape.dim);
      narrow_run(dq[i], line, shape.dim);
    }
  });
}

// How many keys one task adds to: all of a head where the sums fit the scratch and there are
// heads enough for every thread. Each key's sum is the same whatever the range.
template <class T>
int64_t keys_per_range(const AttentionShape& shape, int64_t row_elements) {
  const int64_t heads = std::max<int64_t>(1, shape.batch * shape.heads);
  const int64_t ranges = heads >= thread_count() ? 1 : ceil_div(2 * thread_count(), heads);
  const int64_t room = (kScratchLimit * 3 / 4) / (row_elements * int64_t(sizeof(T)));
  return std::max<int64_t>(1, std::min(room, ceil_div(shape.keys, ranges)));
}

// dk and dv, by ranges of keys.
template <class S>
void key_pass(const AttentionShape& shape, int64_t topk, const SelectedGradients& t,
              const Compute<S>* score_grads) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t ldk = t.dk.data == nullptr ? 0 : round_up(shape.dim, L);
  const int64_t ldv = t.dv.data == nullptr ? 0 : round_up(shape.value_dim, L);
  const int64_t length = keys_per_range<T>(shape, ldk + ldv);
  const int64_t ranges = ceil_div(shape.keys, length);
  const T* weights = static_cast<const T*>(t.weights);
  parallel_for(shape.batch * shape.heads * ranges, [&](int64_t task) {
    const int64_t head = task / ranges, first = task % ranges * length;
    const int64_t count = std::min(length, shape.keys - first);
    const auto queries = head_rows<S>(t.q, head, shape.heads);
    const auto grads = head_rows<S>(t.grad, head, shape.heads);
    const int64_t columns = std::max(ldk, ldv);
    Scratch scratch(Scratch::bytes_for<T>(count * ldk) + Scratch::bytes_for<T>(count * ldv) +
                    Scratch::bytes_for<T>(columns));
    T* sum_k = scratch.take<T>(count * ldk);
    T* sum_v = scratch.take<T>(count * ldv);
    T* line = scratch.take<T>(columns);
    std::fill(sum_k, sum_k + count * ldk, T(0));
    std::fill(sum_v, sum_v + count * ldv, T(0));
    std::fill(line, line + columns, T(0));
    for (int64_t i = 0; i < shape.queries; ++i) {
      const int64_t row = (head * shape.queries + i) * topk;
      const int32_t* chosen = t.indices + row;
      const int64_t from = ranges == 1 ? 0 : std::lower_bound(chosen, chosen + topk, first) - chosen;
      const int64_t to = ranges == 1 ? topk
                                     : std::lower_bound(chosen + from, chosen + topk,
                                                        first + count) - chosen;
      if (from == to) continue;
      if (ldk > 0) {
        widen_run(line, queries[i], shape.dim);
        std::fill(line + shape.dim, line + ldk, T(0));
        scatter_add(sum_k, ldk, first, score_grads + row + from, chosen + from, to - from, line,
                    shape.dim);
      }
      if (ldv > 0) {
        widen_run(line, grads[i], shape.value_dim);
        std::fill(line + shape.value_dim, line + ldv, T(0));
        scatter_add(sum_v, ldv, first, weights + row + from, chosen + from, to - from, line,
                    shape.value_dim);
      }
    }
    const auto dk = head_rows<S>(t.dk, head, shape.heads);
    const auto dv = head_rows<S>(t.dv, head, shape.heads);
    for (int64_t j = 0; j < count; ++j) {
      if (ldk > 0) narrow_run(dk[first + j], sum_k + j * ldk, shape.dim);
      if (ldv > 0) narrow_run(dv[first + j], sum_v + j * ldv, shape.value_dim);
    }
  });
}

template <class S>
void backward(const AttentionShape& shape, int64_t topk, const SelectedGradients& t) {
  const bool wants_k = t.dk.data != nullptr, wants_v = t.dv.data != nullptr;
  const int64_t chosen = shape.batch * shape.heads * shape.queries * topk;
  std::unique_ptr<Compute<S>[]> score_grads(wants_k ? new Compute<S>[chosen] : nullptr);
  if (wants_k || t.dq.data != nullptr) query_pass<S>(shape, topk, t, score_grads.get());
  if (wants_k || wants_v) key_pass<S>(shape, topk, t, score_grads.get());
}

}  // namespace

void topk_attention(DType dtype, const AttentionShape& shape, int64_t topk, HeadRows q,
                    HeadRows k, HeadRows v, HeadRows out, int32_t* indices, void* weights) {
  dispatch(dtype, [&](auto s) {
    using S = decltype(s);
    forward<S>(shape, topk, q, k, v, out, indices, static_cast<Compute<S>*>(weights));
  });
}

void topk_attention_backward(DType dtype, const AttentionShape& shape, int64_t topk,
                             const SelectedGradients& tensors) {
  dispatch(dtype, [&](auto s) { backward<decltype(s)>(shape, topk, tensors); });
}

}  // namespace pyvit
