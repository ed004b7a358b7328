// What the attention kernels share: rows of one head, products of rows with rows on the GEMM
// micro-kernel, and sums of rows with weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "gemm.h"
#include "parallel.h"
#include "vector_math.h"

namespace pyvit {

// The rows of one head.
template <class S>
struct Rows {
  S* data;
  int64_t stride;
  S* operator[](int64_t i) const { return data + i * stride; }
};

template <class S>
Rows<S> head_rows(const HeadRows& t, int64_t head, int64_t heads) {
  if (t.data == nullptr) return {nullptr, 0};
  const int64_t offset = head / heads * t.stride[0] + head % heads * t.stride[1];
  return {static_cast<S*>(t.data) + offset, t.stride[2]};
}

// Asks for row i + 8 of n, to be read or written: rows of a packed projection lie a page or more
// apart, where no hardware looks ahead.
template <bool Write = false, class S>
inline void prefetch_ahead(Rows<S> rows, int64_t i, int64_t n, int64_t dim) {
  if (i + 8 >= n) return;
  const char* row = reinterpret_cast<const char*>(rows[i + 8]);
  for (int64_t b = 0; b < dim * int64_t(sizeof(S)); b += 64) __builtin_prefetch(row + b, Write);
}

// ---- packing (layouts of gemm.h) ----------------------------------------------------------

// A: dst[i * lda + c] = rows[i][c0 + c].
template <class S>
void pack_rows(Compute<S>* dst, Rows<S> rows, int64_t i0, int64_t m, int64_t c0, int64_t columns) {
  for (int64_t i = 0; i < m; ++i) {
    prefetch_ahead(rows, i0 + i, i0 + m, c0 + columns);
    widen_run(dst + i * Panel<Compute<S>>::lda, rows[i0 + i] + c0, columns);
  }
}

// B: strips of rows[k0 + k][c0 + j], k < kb, j < columns.
template <class S>
void pack_strips(Compute<S>* dst, Rows<S> rows, int64_t k0, int64_t kb, int64_t c0,
                 int64_t columns) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  for (int64_t j = 0; j < columns; j += NR, dst += kb * NR) {
    const int64_t width = std::min<int64_t>(NR, columns - j);
    for (int64_t k = 0; k < kb; ++k) {
      widen_run(dst + k * NR, rows[k0 + k] + c0 + j, width);
      for (int64_t t = width; t < NR; ++t) dst[k * NR + t] = T(0);
    }
  }
}

// dst[c * ld + i] = rows[i0 + i][c0 + c] for one vector's worth of i; zeros for i >= m.
template <class S>
void transpose_lanes(Compute<S>* dst, int64_t ld, Rows<S> rows, int64_t i0, int64_t m, int64_t c0,
                     int64_t columns) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < columns; c += L) {
    const int64_t width = std::min<int64_t>(L, columns - c);
    Vec<T> square[L];
    for (int i = 0; i < L; ++i) {
      if (i >= m) {
        square[i] = Vec<T>{};
      } else if (width == L) {
        square[i] = load_wide(rows[i0 + i] + c0 + c);
      } else {
        square[i] = load_partial(rows[i0 + i] + c0 + c, width);
      }
    }
    transpose_square<T>(square);
    if (width == L) {
#pragma GCC unroll 16
      for (int t = 0; t < L; ++t) store(dst + (c + t) * ld, square[t]);
    } else {
      for (int64_t t = 0; t < width; ++t) store(dst + (c + t) * ld, square[t]);
    }
  }
}

// A of the transposed rows: dst[c * lda + i] = rows[i0 + i][c0 + c].
template <class S>
void pack_columns(Compute<S>* dst, Rows<S> rows, int64_t i0, int64_t m, int64_t c0,
                  int64_t columns) {
  using T = Compute<S>;
  for (int64_t i = 0; i < m; i += kLanes<T>)
    transpose_lanes(dst + i, Panel<T>::lda, rows, i0 + i, std::min<int64_t>(kLanes<T>, m - i), c0,
                    columns);
}

// B of the transposed rows: strips of rows[j0 + j][c0 + c], c < columns, j < n.
template <class S>
void pack_column_strips(Compute<S>* dst, Rows<S> rows, int64_t j0, int64_t n, int64_t c0,
                        int64_t columns) {
  using T = Compute<S>;
  using P = Panel<T>;
  for (int64_t j = 0; j < n; j += P::NR, dst += columns * P::NR)
    for (int64_t half = 0; half < P::NR; half += P::lanes)
      transpose_lanes(dst + half, P::NR, rows, j0 + j + half,
                      std::clamp<int64_t>(n - j - half, 0, P::lanes), c0, columns);
}

// A tile of rows in strips of NR columns: as the micro-kernel reads its vector side, so that a
// tile of weights can be multiplied from the left as it lies.
template <class T>
struct StripTile {
  static constexpr int64_t NR = Panel<T>::NR;
  T* data;
  int64_t rows;
  T* at(int64_t i, int64_t j) const { return data + (j / NR * rows + i) * NR + j % NR; }
};

// A: dst[i * lda + c] = tile(i0 + i, c0 + c).
template <class T>
void pack_rows(T* dst, StripTile<T> tile, int64_t i0, int64_t m, int64_t c0, int64_t columns) {
  constexpr int64_t NR = StripTile<T>::NR;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < columns;) {
      const int64_t run = std::min(NR - (c0 + c) % NR, columns - c);
      widen_run(dst + i * Panel<T>::lda + c, tile.at(i0 + i, c0 + c), run);
      c += run;
    }
}

// ---- products of rows ---------------------------------------------------------------------

// c[i, j] = a_i · b_j for a tile of rows of `a` and n rows of `b` from j0 on: scores, and
// gradients of weights. The packed b stays in the cache from tile to tile where it is small.
template <class S>
class RowProducts {
  using T = Compute<S>;
  using P = Panel<T>;

 public:
  RowProducts(int64_t n, int64_t dim)
      : n_(n), dim_(dim), resident_(is_resident(n, dim)) {}

  int64_t ld() const { return round_up(n_, P::NR); }
  int64_t scratch_bytes() const { return Scratch::bytes_for<T>(packed_size()); }
  void take(Scratch& scratch) { packed_ = scratch.take<T>(packed_size()); }

  void start(Rows<S> b, int64_t j0) {
    b_ = b;
    j0_ = j0;
    is_packed_ = false;
  }

  // c has ld() columns, those past n are zero; `a_panel` is P::MC × P::lda.
  void operator()(Rows<S> a, int64_t i0, int64_t m, T* a_panel, T* c) {
    multiply(a, i0, m, a_panel, c, ld(), P::NR);
  }
  void operator()(Rows<S> a, int64_t i0, int64_t m, T* a_panel, StripTile<T> c) {
    multiply(a, i0, m, a_panel, c.data, P::NR, c.rows * P::NR);
  }

  static bool is_resident(int64_t n, int64_t dim) {
    return round_up(n, P::NR) * dim * int64_t(sizeof(T)) <= kResidentBytes;
  }

 private:
  static constexpr int64_t kResidentBytes = 384 << 10;
  // Columns packed at a time where b does not stay.
  static constexpr int64_t kBlock = 1024 / sizeof(T);

  // Rows of c lie row_step apart, strips of NR columns strip_step.
  void multiply(Rows<S> a, int64_t i0, int64_t m, T* a_panel, T* c, int64_t row_step,
                int64_t strip_step) {
    const int64_t slice = slice_length<T>(dim_), width = resident_ ? ld() : kBlock;
    for (int64_t j = 0; j < n_; j += width) {
      const int64_t columns = std::min(width, n_ - j), padded = round_up(columns, P::NR);
      for (int64_t d = 0; d < dim_; d += slice) {
        const int64_t depth = std::min(slice, dim_ - d);
        T* packed = resident_ ? packed_ + d * padded : packed_;
        if (!is_packed_) pack_column_strips(packed, b_, j0_ + j, columns, d, depth);
        for (int64_t i = 0; i < m; i += P::MC) {
          const int64_t rows = std::min(P::MC, m - i);
          pack_rows(a_panel, a, i0 + i, rows, d, depth);
          for (int64_t t = 0; t < columns; t += P::NR)
            multiply_panels(a_panel, rows, packed + t * depth, P::NR, depth,
                            c + i * row_step + (j + t) / P::NR * strip_step, row_step, d > 0);
        }
      }
    }
    is_packed_ = resident_;
  }

  int64_t packed_size() const {
    return resident_ ? ld() * dim_ : kBlock * std::min(P::KC, dim_);
  }

  int64_t n_, dim_;
  bool resident_;
  Rows<S> b_{};
  int64_t j0_ = 0;
  T* packed_ = nullptr;
  bool is_packed_ = false;
};

// ---- sums of rows -------------------------------------------------------------------------

// Σ_j weights[i, j] · values_j for a tile of weight rows, on the GEMM micro-kernel: the product
// of attention with dense weights. Columns are finished kChunk at a time.
template <class S>
class WeightedSums {
  using T = Compute<S>;
  using P = Panel<T>;
  static constexpr int64_t kChunk = 1024 / sizeof(T);

 public:
  WeightedSums(int64_t rows, int64_t dim) : rows_(rows), dim_(dim) {}

  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(rows_ * chunk()) + Scratch::bytes_for<T>(P::KC * chunk());
  }
  void take(Scratch& scratch) {
    sum_ = scratch.take<T>(rows_ * chunk());
    strips_ = scratch.take<T>(P::KC * chunk());
  }

  // write(i, column, const T* run, count) receives the finished sums.
  // The weights are Rows or a StripTile.
  template <class Weights, class Write>
  void operator()(Weights weights, int64_t m, Rows<S> values, int64_t n, T* a_panel,
                  const Write& write) {
    const int64_t slice = slice_length<T>(n), ld = chunk();
    for (int64_t column = 0; column < dim_; column += kChunk) {
      const int64_t width = std::min(kChunk, dim_ - column);
      for (int64_t k = 0; k < n; k += slice) {
        const int64_t depth = std::min(slice, n - k);
        pack_strips(strips_, values, k, depth, column, width);
        for (int64_t i = 0; i < m; i += P::MC) {
          const int64_t rows = std::min(P::MC, m - i);
          pack_rows(a_panel, weights, i, rows, k, depth);
          multiply_panels(a_panel, rows, strips_, width, depth, sum_ + i * ld, ld, k > 0);
        }
      }
      for (int64_t i = 0; i < m; ++i) write(i, column, sum_ + i * ld, width);
    }
  }

 private:
  int64_t chunk() const { return std::min(kChunk, round_up(dim_, P::NR)); }

  int64_t rows_, dim_;
  T* sum_ = nullptr;
  T* strips_ = nullptr;
};

// ---- cutting the work ---------------------------------------------------------------------

// Rows of a tile at most; a multiple of the micro-kernel's.
template <class T>
inline constexpr int64_t kTileRows = 56 / Panel<T>::MR * Panel<T>::MR;

// Rows of a tile: as many as `copies` tiles of `ld` columns leave room for in `bytes`. A function
// of the shape alone.
template <class T>
int64_t tile_rows(int64_t ld, int64_t copies, int64_t bytes = 768 << 10) {
  constexpr int64_t MR = Panel<T>::MR;
  const int64_t room = bytes / (copies * ld * int64_t(sizeof(T)));
  if (room >= MR) return std::min(kTileRows<T>, room / MR * MR);
  return std::max<int64_t>(1, room);
}

// f(head, first row, end row) over the query rows of every head: whole heads where there are
// enough of them to go round, else tiles' multiples.
template <class F>
void for_query_rows(const AttentionShape& shape, int64_t tile, const F& f) {
  const int64_t heads = shape.batch * shape.heads, wanted = 4 * thread_count();
  if (heads * shape.queries == 0) return;
  const int64_t parts = ceil_div(wanted, heads);
  const int64_t rows = round_up(ceil_div(shape.queries, parts), tile);
  const int64_t chunks = ceil_div(shape.queries, rows);
  parallel_for(heads * chunks, [&](int64_t task) {
    const int64_t begin = task % chunks * rows;
    f(task / chunks, begin, std::min(shape.queries, begin + rows));
  });
}

}  // namespace pyvit
