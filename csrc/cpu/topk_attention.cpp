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
// The first line is a task for each block of queries; the second for each head, or range of its
// keys, which first lists for each key who chose it. So every sum is a gather, in the order of
// the queries whatever the number of threads, and no two tasks write one place.
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

template <class T>
struct Term {
  int32_t row;
  T factor;
};

// sum[0:dim] = Σ_n factor_n · rows[row_n], terms from term(n); sum is padded to whole vectors.
// In blocks of 256 terms, so that the rounding of long sums grows as a matrix product's does.
template <class S, class F>
void gather_sum(Compute<S>* sum, int64_t count, Rows<S> rows, int64_t dim, const F& term) {
  using T = Compute<S>;
  for_column_runs<T>(dim, [&](auto vectors, int64_t column, int64_t last) {
    constexpr int C = decltype(vectors)::value;
    auto add = [&](Vec<T>(&to)[C], const Term<T>& t) {
      Vec<T> x[C];
      load_run<C>(x, rows[t.row] + column, last);
      const Vec<T> factor = broadcast(t.factor);
      for (int c = 0; c < C; ++c) to[c] = fma(factor, x[c], to[c]);
    };
    Vec<T> total[C] = {};
    for (int64_t n = 0; n < count;) {
      const int64_t end = std::min(count, n + 256);
      Vec<T> even[C] = {}, odd[C] = {};
      for (; n + 2 <= end; n += 2) {
        add(even, term(n));
        add(odd, term(n + 1));
      }
      if (n < end) add(even, term(n++));
      for (int c = 0; c < C; ++c) total[c] += even[c] + odd[c];
    }
    for (int c = 0; c < C; ++c) store(sum + column + c * kLanes<T>, total[c]);
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
        collect_selected(s, N, topk, find_cut(s, row), chosen_indices, chosen);
        softmax(chosen, topk, row.highest);
        gather_sum(sum, topk, values, shape.value_dim, [&](int64_t n) {
          return Term<T>{chosen_indices[n], chosen[n]};
        });
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

// dS, and then dq, by blocks of queries: first all that reads the values, then all that reads
// the keys, so that each stays in the cache.
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
    std::fill(line, line + columns, T(0));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (head * shape.queries + i) * topk;
      std::copy_n(static_cast<const T*>(t.weights) + at, topk, w);
      widen_run(line, grads[i], shape.value_dim);
      gather_products(ds, line, t.indices + at, topk, values, shape.value_dim);
      Vec<T> sum{};
      for (int64_t n = 0; n < padded; n += L) sum = fma(load(w + n), load(ds + n), sum);
      const Vec<T> delta = broadcast(reduce_add<T>(sum));
      for (int64_t n = 0; n < padded; n += L)
        store(ds + n, load(w + n) * (load(ds + n) - delta) * broadcast(scale));
      std::copy_n(ds, topk, score_grads + at);
    }
    if (dq.data == nullptr) return;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (head * shape.queries + i) * topk;
      gather_sum(line, topk, keys, shape.dim, [&](int64_t n) {
        return Term<T>{t.indices[at + n], score_grads[at + n]};
      });
      narrow_run(dq[i], line, shape.dim);
    }
  });
}

// A query that chose a key.
template <class T>
struct Choice {
  int32_t query;
  T score_grad, weight;
};

// The choices of one head turned round: for each key of a range, who chose it, in the order of
// the queries. A counting sort.
template <class T>
class ChoicesByKey {
 public:
  // indices, score_grads and weights [queries, topk]; indices ascend in each row.
  ChoicesByKey(const int32_t* indices, const T* score_grads, const T* weights, int64_t queries,
               int64_t topk, int64_t first, int64_t count)
      : first_(first), ends_(new int64_t[count + 1]()) {
    for_each(indices, queries, topk, count, [&](int64_t, int64_t n) {
      ++ends_[indices[n] - first_ + 1];
    });
    // ends_[j + 1] is where the choices of key j begin, and becomes where they end.
    int64_t total = 0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t chosen = ends_[j + 1];
      ends_[j + 1] = total;
      total += chosen;
    }
    choices_.reset(new Choice<T>[total]);
    for_each(indices, queries, topk, count, [&](int64_t i, int64_t n) {
      choices_[ends_[indices[n] - first_ + 1]++] = {
          static_cast<int32_t>(i), score_grads == nullptr ? T(0) : score_grads[n], weights[n]};
    });
  }

  const Choice<T>* begin(int64_t j) const { return choices_.get() + ends_[j - first_]; }
  int64_t count(int64_t j) const { return ends_[j - first_ + 1] - ends_[j - first_]; }

 private:
  template <class F>
  void for_each(const int32_t* indices, int64_t queries, int64_t topk, int64_t count,
                const F& f) const {
    for (int64_t i = 0; i < queries; ++i) {
      const int32_t* row = indices + i * topk;
      const int32_t* end = row + topk;
      if (first_ > 0) row = std::lower_bound(row, end, first_);
      for (; row != end && *row < first_ + count; ++row) f(i, row - indices);
    }
  }

  int64_t first_;
  std::unique_ptr<int64_t[]> ends_;
  std::unique_ptr<Choice<T>[]> choices_;
};

// dk and dv, by heads, or by ranges of keys where there are too few heads for the threads.
template <class S>
void key_pass(const AttentionShape& shape, int64_t topk, const SelectedGradients& t,
              const Compute<S>* score_grads) {
  using T = Compute<S>;
  const int64_t heads = shape.batch * shape.heads;
  const int64_t ranges = heads >= thread_count() ? 1 : ceil_div(2 * thread_count(), heads);
  const int64_t length = ceil_div(shape.keys, ranges);
  const int64_t columns = round_up(std::max(shape.dim, shape.value_dim), kLanes<T>);
  parallel_for(heads * ranges, [&](int64_t task) {
    const int64_t head = task / ranges, first = task % ranges * length;
    const int64_t end = std::min(shape.keys, first + length);
    if (first >= end) return;
    const int64_t at = head * shape.queries * topk;
    const ChoicesByKey<T> choices(t.indices + at, score_grads == nullptr ? nullptr : score_grads + at,
                                  static_cast<const T*>(t.weights) + at, shape.queries, topk,
                                  first, end - first);
    Scratch scratch(Scratch::bytes_for<T>(columns));
    T* line = scratch.take<T>(columns);
    auto add_up = [&](const HeadRows& out, const HeadRows& in, int64_t dim, T Choice<T>::*factor) {
      const auto results = head_rows<S>(out, head, shape.heads);
      const auto rows = head_rows<S>(in, head, shape.heads);
      for (int64_t j = first; j < end; ++j) {
        const Choice<T>* chosen = choices.begin(j);
        gather_sum(line, choices.count(j), rows, dim, [&](int64_t n) {
          return Term<T>{chosen[n].query, chosen[n].*factor};
        });
        narrow_run(results[j], line, dim);
      }
    };
    if (t.dk.data != nullptr) add_up(t.dk, t.q, shape.dim, &Choice<T>::score_grad);
    if (t.dv.data != nullptr) add_up(t.dv, t.grad, shape.value_dim, &Choice<T>::weight);
  });
}

template <class S>
void backward(const AttentionShape& shape, int64_t topk, const SelectedGradients& t) {
  const bool wants_k = t.dk.data != nullptr, wants_v = t.dv.data != nullptr;
  const int64_t chosen = shape.batch * shape.heads * shape.queries * topk;
  const bool wants_scores = wants_k || t.dq.data != nullptr;
  std::unique_ptr<Compute<S>[]> score_grads(wants_scores ? new Compute<S>[chosen] : nullptr);
  if (wants_scores) query_pass<S>(shape, topk, t, score_grads.get());
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
