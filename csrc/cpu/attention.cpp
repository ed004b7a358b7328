// Dense attention, and the terms of the k-sparse penalty. Nothing of the size queries × keys is in
// memory: tiles of query rows are made, used and forgotten.
#include "attention_rows.h"
#include "score_tiles.h"
#include "select.h"

namespace pyvit {
namespace {

// ---- rows of weights ----------------------------------------------------------------------

template <class T>
struct RowSums {
  T sum, squares, tail;  // of exp(score − highest), of its squares, of those not selected
};

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
        total[i] = exponentials(s, N, scale_row(N, scale, [s](int64_t j) { return s + j; }));
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
      sums(Rows<T>{scores, score.ld()}, m, values, N, a_panel,
           [&](int64_t i, int64_t column, T* run, int64_t count) {
             for (int64_t c = 0; c < count; ++c) run[c] /= total[i];
             narrow_run(results[i0 + i] + column, run, count);
           });
    }
  });
}

}  // namespace

void attention(DType dtype, const AttentionShape& shape, HeadRows q, HeadRows k, HeadRows v,
               HeadRows out, int64_t topk, const PenaltyTerms* penalty) {
  dispatch(dtype, [&](auto s) { forward<decltype(s)>(shape, q, k, v, out, topk, penalty); });
}

}  // namespace pyvit
