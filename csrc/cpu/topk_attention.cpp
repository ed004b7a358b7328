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
#include "chosen_rows.h"
#include "select.h"

namespace pyvit {
namespace {

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
        gather_sum(sum, chosen_indices, chosen, topk, values, shape.value_dim);
        narrow_run(results[i0 + i], sum, shape.value_dim);
        if (indices == nullptr) continue;
        const int64_t at = (head * shape.queries + i0 + i) * topk;
        std::copy(chosen_indices, chosen_indices + topk, indices + at);
        std::copy(chosen, chosen + topk, weights + at);
      }
    }
  });
}

}  // namespace

void topk_attention(DType dtype, const AttentionShape& shape, int64_t topk, HeadRows q,
                    HeadRows k, HeadRows v, HeadRows out, int32_t* indices, void* weights) {
  dispatch(dtype, [&](auto s) {
    using S = decltype(s);
    forward<S>(shape, topk, q, k, v, out, indices, static_cast<Compute<S>*>(weights));
  });
}

}  // namespace pyvit
