// The gradients of attention in which each query keeps exactly its topk largest scores.
//
// With the chosen keys j of query i and their weights w, and Δ_i = Σ_j w_ij dP_ij,
//
//   dP_ij = dO_i · v_j    dS_ij = scale · w_ij (dP_ij − Δ_i)    dq_i = Σ_j dS_ij k_j
//   dk_j = Σ_i dS_ij q_i  dv_j = Σ_i w_ij dO_i
//
// The first line is a task for each block of queries: gathers of the chosen rows. The second is a
// task for each range of keys, which goes through the queries in order and adds to the sums of
// the keys they chose. So every sum has the order of the queries, wherever the ranges and blocks
// end and whatever the number of threads, and no two tasks write one place.
#include <memory>

#include "topk_attention_rows.h"

namespace pyvit {
namespace {

// ---- dS and dq ------------------------------------------------------------------------------

template <class S>
class QueryPass {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;

 public:
  QueryPass(const AttentionShape& shape, int64_t topk, const SelectedGradients& tensors,
            T* score_grads)
      : shape_(shape), topk_(topk), t_(tensors), score_grads_(score_grads) {}

  // First all that reads the values, then all that reads the keys: each stays in the cache.
  void run() const {
    for_query_rows(shape_, 16, [&](int64_t head, int64_t begin, int64_t end) {
      const int64_t choices = (end - begin) * topk_, padded = round_up(topk_, L);
      const int64_t columns = round_up(std::max(shape_.dim, shape_.value_dim), L);
      NearRows<S> values(shape_.keys, shape_.value_dim, choices);
      NearRows<S> keys(shape_.keys, shape_.dim, choices);
      Scratch scratch(std::max(values.scratch_bytes(), keys.scratch_bytes()) +
                      2 * Scratch::bytes_for<T>(padded) + Scratch::bytes_for<int32_t>(padded) +
                      Scratch::bytes_for<T>(columns));
      Row row{scratch.take<T>(padded), scratch.take<T>(padded), scratch.take<int32_t>(padded),
              scratch.take<T>(columns)};
      Scratch place = scratch;  // values and keys, one after the other
      values.take(place);
      keys.take(scratch);
      std::fill(row.w, row.w + padded, T(0));
      std::fill(row.indices, row.indices + padded, 0);
      std::fill(row.line, row.line + columns, T(0));
      const auto grads = head_rows<S>(t_.grad, head, shape_.heads);
      values(head_rows<S>(t_.v, head, shape_.heads), [&](auto rows, int64_t dim) {
        for (int64_t i = begin; i < end; ++i) {
          prefetch_ahead(grads, i, end, shape_.value_dim);
          score_grad(row, head, i, grads[i], rows, dim);
        }
      });
      if (t_.dq.data == nullptr) return;
      const auto dq = head_rows<S>(t_.dq, head, shape_.heads);
      keys(head_rows<S>(t_.k, head, shape_.heads), [&](auto rows, int64_t dim) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t at = (head * shape_.queries + i) * topk_;
          prefetch_ahead<true>(dq, i, end, shape_.dim);
          gather_sum(row.line, t_.indices + at, score_grads_ + at, topk_, rows, dim);
          narrow_run(dq[i], row.line, shape_.dim);
        }
      });
    });
  }

 private:
  // One query's numbers, padded to whole vectors.
  struct Row {
    T *w, *ds;
    int32_t* indices;
    T* line;
  };

  template <class Values>
  void score_grad(const Row& row, int64_t head, int64_t i, const S* grad,
                  Rows<Values> values, int64_t value_dim) const {
    const int64_t at = (head * shape_.queries + i) * topk_, padded = round_up(topk_, L);
    widen_run(row.w, static_cast<const T*>(t_.weights) + at, topk_);
    std::copy_n(t_.indices + at, topk_, row.indices);
    widen_run(row.line, grad, shape_.value_dim);
    gather_products(row.ds, row.line, row.indices, topk_, values, value_dim);
    for (int64_t n = topk_; n < padded; ++n) row.ds[n] = T(0);
    Vec<T> sum{};
    for (int64_t n = 0; n < padded; n += L) sum = fma(load(row.w + n), load(row.ds + n), sum);
    const Vec<T> delta = broadcast(reduce_add<T>(sum));
    const Vec<T> scale = broadcast(static_cast<T>(shape_.scale));
    for (int64_t n = 0; n < padded; n += L)
      store(row.ds + n, load(row.w + n) * (load(row.ds + n) - delta) * scale);
    widen_run(score_grads_ + at, row.ds, topk_);
  }

  const AttentionShape& shape_;
  const int64_t topk_;
  const SelectedGradients& t_;
  T* score_grads_;  // [batch, head, query, topk]
};

// ---- dk and dv ------------------------------------------------------------------------------

// The part of a query's ascending choices that lies in a range of keys.
struct Part {
  int64_t begin, end;
};

inline Part part_of(const int32_t* indices, int64_t count, int64_t first, int64_t end) {
  // Counted, not searched: no branch that cannot be predicted.
  int64_t below = 0, inside = 0;
  for (int64_t n = 0; n < count; ++n) below += indices[n] < first;
  for (int64_t n = 0; n < count; ++n) inside += indices[n] < end;
  return {below, inside};
}

template <class S>
class KeyPass {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  // Queries whose terms are added up before they join the total: the rounding of the sum of a
  // key that all chose grows as a matrix product's does.
  static constexpr int64_t kBlock = 1024;
  static constexpr int64_t kBytes = 768 << 10;

 public:
  KeyPass(const AttentionShape& shape, int64_t topk, const SelectedGradients& tensors,
          const T* score_grads)
      : shape_(shape), topk_(topk), t_(tensors), score_grads_(score_grads) {}

  // By heads, or by ranges of keys where there are too few heads for the threads, or where the
  // sums would not fit the cache.
  void run() const {
    const int64_t heads = shape_.batch * shape_.heads;
    const int64_t row = round_up(std::max(shape_.dim, shape_.value_dim), L) * sizeof(T);
    const int64_t most = std::max<int64_t>(1, kBytes / (row * copies()));
    const int64_t fewest = heads >= thread_count() ? 1 : ceil_div(2 * thread_count(), heads);
    const int64_t ranges = std::max(fewest, ceil_div(shape_.keys, most));
    const int64_t length = ceil_div(shape_.keys, ranges);
    parallel_for(heads * ranges, [&](int64_t task) {
      const int64_t head = task / ranges, first = task % ranges * length;
      const int64_t end = std::min(shape_.keys, first + length);
      if (first >= end) return;
      if (t_.dk.data != nullptr)
        add_up(head, first, end, t_.dk, t_.q, shape_.dim, score_grads_);
      if (t_.dv.data != nullptr)
        add_up(head, first, end, t_.dv, t_.grad, shape_.value_dim,
               static_cast<const T*>(t_.weights));
    });
  }

 private:
  int64_t copies() const { return shape_.queries > kBlock ? 2 : 1; }

  // out_j = Σ_i factors_ij · in_i for the keys from first to end.
  void add_up(int64_t head, int64_t first, int64_t end, const HeadRows& out, const HeadRows& in,
              int64_t dim, const T* factors) const {
    const auto results = head_rows<S>(out, head, shape_.heads);
    const auto rows = head_rows<S>(in, head, shape_.heads);
    const int64_t columns = round_up(dim, L), size = (end - first) * columns;
    Scratch scratch(copies() * Scratch::bytes_for<T>(size) + Scratch::bytes_for<T>(columns));
    T* line = scratch.take<T>(columns);
    T* sums = scratch.take<T>(size);
    T* total = copies() > 1 ? scratch.take<T>(size) : sums;
    std::fill(line, line + columns, T(0));
    std::fill(total, total + size, T(0));
    for (int64_t i0 = 0; i0 < shape_.queries; i0 += kBlock) {
      if (sums != total) std::fill(sums, sums + size, T(0));
      for (int64_t i = i0; i < std::min(shape_.queries, i0 + kBlock); ++i) {
        const int64_t at = (head * shape_.queries + i) * topk_;
        const int32_t* indices = t_.indices + at;
        const Part part = end - first == shape_.keys ? Part{0, topk_}
                                                     : part_of(indices, topk_, first, end);
        prefetch_ahead(rows, i, shape_.queries, dim);
        widen_run(line, rows[i], dim);
        scatter_add(sums, indices + part.begin, first, factors + at + part.begin,
                    part.end - part.begin, line, columns);
      }
      if (sums == total) continue;
      for (int64_t n = 0; n < size; n += L) store(total + n, load(total + n) + load(sums + n));
    }
    for (int64_t j = first; j < end; ++j) {
      prefetch_ahead<true>(results, j, end, dim);
      narrow_run(results[j], total + (j - first) * columns, dim);
    }
  }

  const AttentionShape& shape_;
  const int64_t topk_;
  const SelectedGradients& t_;
  const T* score_grads_;  // [batch, head, query, topk]
};

template <class S>
void backward(const AttentionShape& shape, int64_t topk, const SelectedGradients& t) {
  using T = Compute<S>;
  const bool wants_k = t.dk.data != nullptr, wants_v = t.dv.data != nullptr;
  const int64_t chosen = shape.batch * shape.heads * shape.queries * topk;
  const bool wants_scores = wants_k || t.dq.data != nullptr;
  std::unique_ptr<T[]> score_grads(wants_scores ? new T[chosen] : nullptr);
  if (wants_scores) QueryPass<S>(shape, topk, t, score_grads.get()).run();
  if (wants_k || wants_v) KeyPass<S>(shape, topk, t, score_grads.get()).run();
}

}  // namespace

void topk_attention_backward(DType dtype, const AttentionShape& shape, int64_t topk,
                             const SelectedGradients& tensors) {
  dispatch(dtype, [&](auto s) { backward<decltype(s)>(shape, topk, tensors); });
}

}  // namespace pyvit
