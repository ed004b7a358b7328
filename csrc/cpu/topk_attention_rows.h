// Sums and products over the few rows that attention chose: rows read, and added to, in the order
// of a list of indices.
#pragma once

#include "score_tiles.h"

namespace pyvit {

// ---- a copy to read from --------------------------------------------------------------------

// Rows that lie together and end in zeros up to whole vectors are read several times faster than
// slices of a packed projection, which lie a page or more apart and share a few sets of the
// cache. A task copies them where the copy stays in the cache and each row is read a few times.
template <class S>
class NearRows {
  using T = Compute<S>;
  static constexpr int64_t kBytes = 512 << 10;

 public:
  // Of `choices` rows read of n.
  NearRows(int64_t n, int64_t dim, int64_t choices)
      : n_(n), dim_(dim), stride_(round_up(dim, kLanes<T>)) {
    copies_ = n * stride_ * int64_t(sizeof(T)) <= kBytes && choices >= 4 * n;
  }

  int64_t scratch_bytes() const { return Scratch::bytes_for<T>(copies_ ? n_ * stride_ : 0); }
  void take(Scratch& scratch) { copy_ = scratch.take<T>(copies_ ? n_ * stride_ : 0); }

  // f(the rows to read, their columns)
  template <class F>
  void operator()(Rows<S> rows, const F& f) const {
    if (!copies_) return f(rows, dim_);
    for (int64_t j = 0; j < n_; ++j) {
      prefetch_ahead(rows, j, n_, dim_);
      T* row = copy_ + j * stride_;
      widen_run(row, rows[j], dim_);
      for (int64_t d = dim_; d < stride_; ++d) row[d] = T(0);
    }
    f(Rows<T>{copy_, stride_}, stride_);
  }

 private:
  int64_t n_, dim_, stride_;
  bool copies_;
  T* copy_ = nullptr;
};

// ---- runs of columns ------------------------------------------------------------------------

// A run of a few vectors of columns; the last has `last` lanes of the row.
struct ColumnRun {
  int64_t column, last;
};

// f(constant n) for n in [1, Most].
template <int Most, class F>
inline void with_constant(int64_t n, const F& f) {
  if constexpr (Most > 1) {
    if (n < Most) return with_constant<Most - 1>(n, f);
  }
  f(std::integral_constant<int, Most>{});
}

// f(constant C, constant Whole, run) over the runs of C <= Most vectors of a row; Whole where the
// last vector is.
template <class T, int Most, class F>
inline void for_column_runs(int64_t dim, const F& f) {
  constexpr int64_t L = kLanes<T>;
  int64_t column = 0;
  for (; column + Most * L <= dim; column += Most * L)
    f(std::integral_constant<int, Most>{}, std::true_type{}, ColumnRun{column, L});
  if (column == dim) return;
  const int64_t vectors = ceil_div(dim - column, L);
  const ColumnRun run{column, dim - column - (vectors - 1) * L};
  with_constant<Most>(vectors, [&](auto count) {
    if (run.last == L) return f(count, std::true_type{}, run);
    f(count, std::false_type{}, run);
  });
}

// C vectors of a row; nothing past the last lane is read.
template <int C, bool Whole, class S>
inline void load_run(Vec<Compute<S>> (&x)[C], const S* p, int64_t last) {
  constexpr int L = kLanes<Compute<S>>;
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c)
    x[c] = c + 1 < C || Whole ? load_wide(p + c * L) : load_partial(p + c * L, last);
}

// ---- gathers --------------------------------------------------------------------------------

template <int C, bool Whole, class S>
void gather_sum_run(Compute<S>* sum, const int32_t* indices, const Compute<S>* factors,
                    int64_t count, Rows<S> rows, ColumnRun run) {
  using T = Compute<S>;
  const S* base = rows.data + run.column;
  auto add = [base, rows, run, indices, factors](Vec<T>(&to)[C], int64_t n) {
    Vec<T> x[C];
    load_run<C, Whole>(x, base + indices[n] * rows.stride, run.last);
    const Vec<T> factor = broadcast(factors[n]);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) to[c] = fma(factor, x[c], to[c]);
  };
  constexpr int kSums = C <= 4 ? 2 : 1;  // so many that no sum waits for its last term
  Vec<T> total[C] = {};
  for (int64_t n = 0; n < count;) {
    const int64_t end = std::min(count, n + 256);
    Vec<T> sums[2][C] = {};
    for (; n + kSums <= end; n += kSums)
#pragma GCC unroll 2
      for (int s = 0; s < kSums; ++s) add(sums[s], n + s);
    if (n < end) add(sums[0], n++);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) total[c] += kSums == 1 ? sums[0][c] : sums[0][c] + sums[1][c];
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) store(sum + run.column + c * kLanes<T>, total[c]);
}

// sum[0:dim] = Σ_n factors[n] · rows[indices[n]]; sum is padded to whole vectors. In blocks of
// 256 terms, so that the rounding of long sums grows as a matrix product's does.
template <class S>
void gather_sum(Compute<S>* sum, const int32_t* indices, const Compute<S>* factors, int64_t count,
                Rows<S> rows, int64_t dim) {
  for_column_runs<Compute<S>, 8>(dim, [&](auto vectors, auto whole, ColumnRun run) {
    gather_sum_run<vectors(), whole()>(sum, indices, factors, count, rows, run);
  });
}

// The products of one run of columns with one vector's worth of rows. All in registers: by way of
// memory it takes twice as long.
template <int C, bool Whole, class S>
inline Vec<Compute<S>> gather_products_run(const Compute<S>* a, const int32_t* indices,
                                           Rows<S> rows, ColumnRun run) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const S* base = rows.data + run.column;
  Vec<T> factor[C], sums[L];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) factor[c] = load(a + run.column + c * L);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    Vec<T> x[C];
    load_run<C, Whole>(x, base + indices[i] * rows.stride, run.last);
    sums[i] = factor[0] * x[0];
#pragma GCC unroll 8
    for (int c = 1; c < C; ++c) sums[i] = fma(factor[c], x[c], sums[i]);
  }
  return sum_of_each<T>(sums);
}

// products[n] = a · rows[indices[n]]; a is padded with zeros. Whole vectors of indices are read,
// those past the count must be rows too; their products are rubbish.
template <class S>
void gather_products(Compute<S>* products, const Compute<S>* a, const int32_t* indices,
                     int64_t count, Rows<S> rows, int64_t dim) {
  using T = Compute<S>;
  for_column_runs<T, 4>(dim, [&](auto vectors, auto whole, ColumnRun run) {
    for (int64_t n = 0; n < count; n += kLanes<T>) {
      const Vec<T> sums = gather_products_run<vectors(), whole()>(a, indices + n, rows, run);
      store(products + n, run.column == 0 ? sums : load(products + n) + sums);
    }
  });
}

// ---- scatter --------------------------------------------------------------------------------

template <int C, class T>
void scatter_add_run(T* sums, const int32_t* indices, int64_t first, const T* factors,
                     int64_t count, const T* a, int64_t dim) {
  constexpr int L = kLanes<T>;
  Vec<T> x[C];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) x[c] = load(a + c * L);
  for (int64_t n = 0; n < count; ++n) {
    T* sum = sums + (indices[n] - first) * dim;
    const Vec<T> factor = broadcast(factors[n]);
    Vec<T> y[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) y[c] = fma(factor, x[c], load(sum + c * L));
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(sum + c * L, y[c]);
  }
}

// sums[indices[n] - first] += factors[n] · a for rows of `dim` columns, whole vectors.
template <class T>
void scatter_add(T* sums, const int32_t* indices, int64_t first, const T* factors, int64_t count,
                 const T* a, int64_t dim) {
  for_column_runs<T, 8>(dim, [&](auto vectors, auto, ColumnRun run) {
    scatter_add_run<vectors()>(sums + run.column, indices, first, factors, count, a + run.column,
                               dim);
  });
}

}  // namespace pyvit
