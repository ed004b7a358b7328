// Attention in which each query keeps exactly its topk largest scores.
//
// Forward: a tile of query rows' scores, made by the GEMM micro-kernel, stays in the cache; each
// row is cut (select.h), the chosen scores are gathered, and the softmax and the product with
// the values touch the chosen keys alone.
#include "select.h"
#include "topk_attention_rows.h"

namespace pyvit {
namespace {

// scores[0:count] = softmax of them; padded to whole vectors.
template <class T>
inline void softmax(T* scores, int64_t count, T highest) {
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
class Forward {
  using T = Compute<S>;
  using P = Panel<T>;
  static constexpr int64_t L = kLanes<T>;

 public:
  Forward(const AttentionShape& shape, int64_t topk, const HeadRows& q, const HeadRows& k,
          const HeadRows& v, const HeadRows& out, int32_t* indices, T* weights)
      : shape_(shape), topk_(topk), q_(q), k_(k), v_(v), out_(out), indices_(indices),
        weights_(weights), find_cuts_(shape.keys, topk) {}

  void run() const {
    const int64_t N = shape_.keys, tile = tile_rows<T>(round_up(N, P::NR), 1);
    const int64_t chosen = find_cuts_.batch() * chosen_ld();
    for_query_rows(shape_, tile, [&](int64_t head, int64_t begin, int64_t end) {
      const auto queries = head_rows<S>(q_, head, shape_.heads);
      RowProducts<S> score(N, shape_.dim);
      NearRows<S> near(N, shape_.value_dim, (end - begin) * topk_);
      Scratch scratch(score.scratch_bytes() + near.scratch_bytes() +
                      Scratch::bytes_for<T>(P::MC * P::lda) +
                      Scratch::bytes_for<T>(tile * score.ld()) +
                      Scratch::bytes_for<T>(round_up(shape_.value_dim, L)) +
                      Scratch::bytes_for<T>(chosen) + Scratch::bytes_for<int32_t>(chosen));
      score.take(scratch);
      near.take(scratch);
      T* a_panel = scratch.take<T>(P::MC * P::lda);
      T* scores = scratch.take<T>(tile * score.ld());
      const Choices choices{scratch.take<T>(round_up(shape_.value_dim, L)),
                            scratch.take<T>(chosen), scratch.take<int32_t>(chosen)};
      score.start(head_rows<S>(k_, head, shape_.heads), 0);
      near(head_rows<S>(v_, head, shape_.heads), [&](auto values, int64_t value_dim) {
        for (int64_t i0 = begin; i0 < end; i0 += tile) {
          const int64_t m = std::min(tile, end - i0);
          score(queries, i0, m, a_panel, scores);
          for (int64_t b = 0; b < m; b += find_cuts_.batch()) {
            const int rows = static_cast<int>(std::min<int64_t>(find_cuts_.batch(), m - b));
            choose(choices, scores + b * score.ld(), score.ld(), rows);
            write(choices, head, i0 + b, rows, values, value_dim);
          }
        }
      });
    });
  }

 private:
  // What a batch of queries chose, rows of chosen_ld(); and room for one query's sum of values.
  struct Choices {
    T *sum, *weights;
    int32_t* indices;
  };
  int64_t chosen_ld() const { return round_up(topk_, L) + L; }

  // One thing at a time for all rows: what one row waits for, the next does not.
  void choose(const Choices& choices, T* scores, int64_t ld, int rows) const {
    const T scale = static_cast<T>(shape_.scale);
    const RowStatistics<T> statistics = prepare_rows(scores, ld, rows, shape_.keys, scale);
    Cut<T> cuts[L];
    find_cuts_(scores, ld, rows, statistics, cuts);
    for (int r = 0; r < rows; ++r)
      collect_selected(scores + r * ld, shape_.keys, topk_, cuts[r],
                       choices.indices + r * chosen_ld(), choices.weights + r * chosen_ld());
    for (int r = 0; r < rows; ++r)
      softmax<T>(choices.weights + r * chosen_ld(), topk_, statistics.highest[r]);
  }

  template <class Values>
  void write(const Choices& choices, int64_t head, int64_t i0, int rows, Rows<Values> values,
             int64_t value_dim) const {
    const auto results = head_rows<S>(out_, head, shape_.heads);
    for (int r = 0; r < rows; ++r) {
      const int32_t* indices = choices.indices + r * chosen_ld();
      const T* weights = choices.weights + r * chosen_ld();
      prefetch_ahead<true>(results, i0 + r, shape_.queries, shape_.value_dim);
      gather_sum(choices.sum, indices, weights, topk_, values, value_dim);
      narrow_run(results[i0 + r], choices.sum, shape_.value_dim);
      if (indices_ == nullptr) continue;
      const int64_t at = (head * shape_.queries + i0 + r) * topk_;
      std::copy_n(indices, topk_, indices_ + at);
      widen_run(weights_ + at, weights, topk_);
    }
  }

  const AttentionShape& shape_;
  const int64_t topk_;
  HeadRows q_, k_, v_, out_;
  int32_t* indices_;
  T* weights_;
  CutFinder<T> find_cuts_;
};

}  // namespace

void topk_attention(DType dtype, const AttentionShape& shape, int64_t topk, HeadRows q,
                    HeadRows k, HeadRows v, HeadRows out, int32_t* indices, void* weights) {
  dispatch(dtype, [&](auto s) {
    using S = decltype(s);
    Forward<S>(shape, topk, q, k, v, out, indices, static_cast<Compute<S>*>(weights)).run();
  });
}

}  // namespace pyvit
