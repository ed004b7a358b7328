// C[M, N] = start + A[M, K] · B[K, N] with row_kernel.h, both operands packed by the caller: B a
// panel of columns at a time, kept by its thread from task to task, A a few rows at a time.
//
// `Operands` supplies, for a plan of ProductPlan<T>,
//   k_begin, k_end                       the terms summed
//   pack_a(T* to, pitch, m0, mb, k0, kb) A[m0+i, k0+k] to to[i · pitch + k]
//   pack_b(Strips<T> to, n0, k0)         B[k0+k, n0+j] to to.at(k, j)
//   start(T* c, ldc, m0, mb, n0, nb)     writes what the sums are added to
// and, where C is memory of type T, written from registers (the plan's in_place),
//   for_each_piece(m0, mb, n0, f)        f(at, count, T* c, ldc) for parts of C's rows
//                                        [m0, m0 + mb) that lie a constant distance apart
// or else
//   finish(const T* c, ldc, m0, mb, n0, nb)
//
// Every element is summed in the same order whatever task or tile it falls in: along k in chains
// inside a slice, then slice after slice, and both depend on K alone.
#pragma once

#include <algorithm>

#include "cache.h"
#include "parallel.h"
#include "row_kernel.h"

namespace pyvit {

// The length of the fewest equal parts of at most `most`, in whole units.
inline int64_t equal_part(int64_t extent, int64_t most, int64_t unit) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(extent, std::max(most, unit)));
  return round_up(std::max<int64_t>(1, ceil_div(extent, parts)), unit);
}

template <class T>
struct ProductPlan {
  static constexpr int64_t kSlice = 1024;          // most terms packed at a time
  static constexpr int64_t kColumns = 512;         // most columns of a panel
  static constexpr int64_t kRows = 112;            // most rows of A packed at a time
  static constexpr int64_t kRowBytes = 256 << 10;  // and their bytes
  static constexpr int64_t kSumBytes = 448 << 10;  // sums waiting for their next slice
  static constexpr int64_t kRowsInPlace = 1024;    // rows of C waiting there

  int64_t M, N, slice;
  bool whole;           // all terms fit one slice
  bool in_place;
  int64_t nb, blocks;   // columns of a panel
  int64_t mb;           // rows of A packed at a time
  int64_t task_rows, groups;

  // K: the longest sum; `copies`: products of this size that share the threads.
  ProductPlan(int64_t M_, int64_t N_, int64_t K, bool in_place_, int64_t copies = 1)
      : M(M_), N(N_), slice(equal_part(K, kSlice, 1)), whole(slice >= K), in_place(in_place_) {
    constexpr int64_t element = sizeof(T), strip = RowTile<T>::strip, tile = RowTile<T>::pixels;
    const int64_t panel_bytes = std::min<int64_t>(768 << 10, second_cache_bytes() / 4 * 3);
    const int64_t columns = std::min(kColumns, panel_bytes / (slice * element));
    nb = equal_part(N, columns / strip * strip, strip);
    blocks = ceil_div(N, nb);
    const int64_t rows = std::min(kRows, kRowBytes / (pitch() * element));
    mb = std::max<int64_t>(1, rows / tile) * tile;
    auto tasks_of = [&](int64_t rows) { return copies * blocks * ceil_div(M, rows); };
    while (mb > 28 && tasks_of(mb) < 8 * thread_count()) mb = round_up(mb / 2, tile);
    task_rows = mb;
    if (!whole) {  // a panel serves one task alone
      task_rows = std::max(mb, (in_place ? kRowsInPlace : kSumBytes / (nb * element)) / mb * mb);
      task_rows = equal_part(M, task_rows, mb);
      while (task_rows > mb && tasks_of(task_rows) < 2 * thread_count())
        task_rows = round_up(task_rows / 2, mb);
    }
    groups = ceil_div(M, task_rows);
  }

  int64_t tasks() const { return groups * blocks; }
  // Elements from a row of packed A to the next: whole cache lines, and not so many of them that
  // rows share a cache set.
  int64_t pitch() const {
    const int64_t padded = round_up(slice, 64 / static_cast<int64_t>(sizeof(T)));
    return padded % 128 == 0 ? padded + 16 : padded;
  }
  // A whole vector may be read from any of them.
  int64_t sum_elements() const { return in_place ? 0 : task_rows * nb + kLanes<T>; }
  int64_t scratch_bytes() const {
    return Scratch::bytes_for<T>(slice * nb) + Scratch::bytes_for<T>(mb * pitch()) +
           Scratch::bytes_for<T>(sum_elements());
  }
};

// What one thread needs for its tasks.
template <class T, class Operands>
class ProductWorker {
  using Plan = ProductPlan<T>;

 public:
  ProductWorker(const Plan& plan, const Operands& operands) : plan_(plan), operands_(operands) {
    Scratch scratch(plan.scratch_bytes());
    b_ = scratch.take<T>(plan.slice * plan.nb);
    a_ = scratch.take<T>(plan.mb * plan.pitch());
    sums_ = scratch.take<T>(plan.sum_elements());
  }

  void run(int64_t task) {
    const int64_t block = task / plan_.groups, m0 = task % plan_.groups * plan_.task_rows;
    const int64_t end = std::min(plan_.M, m0 + plan_.task_rows);
    n0_ = block * plan_.nb;
    panel_ = {b_, 0, std::min(plan_.nb, plan_.N - n0_)};
    int64_t k0 = operands_.k_begin;
    do {  // once even where there is no term
      panel_.rows = std::min(plan_.slice, operands_.k_end - k0);
      if (block != packed_ || !plan_.whole) operands_.pack_b(panel_, n0_, k0);
      packed_ = block;
      for (int64_t m = m0; m < end; m += plan_.mb)
        add_slice(m, std::min(plan_.mb, end - m), k0, sums_ + (m - m0) * plan_.nb);
      k0 += plan_.slice;
    } while (k0 < operands_.k_end);
  }

 private:
  void add_slice(int64_t m0, int64_t mb, int64_t k0, T* sums) const {
    operands_.pack_a(a_, plan_.pitch(), m0, mb, k0, panel_.rows);
    auto add = [&](int64_t at, int64_t count, T* c, int64_t ldc) {
      if (k0 == operands_.k_begin) operands_.start(c, ldc, m0 + at, count, n0_, panel_.width);
      multiply(a_ + at * plan_.pitch(), count, c, ldc);
    };
    if (plan_.in_place) return operands_.for_each_piece(m0, mb, n0_, add);
    add(0, mb, sums, plan_.nb);
    if (k0 + panel_.rows == operands_.k_end)
      operands_.finish(sums, plan_.nb, m0, mb, n0_, panel_.width);
  }

  // c[0:mb, 0:nb] += packed A · packed B
  void multiply(const T* a, int64_t mb, T* c, int64_t ldc) const {
    const int64_t chain = equal_part(panel_.rows, kChainLength, 1);
    const int64_t tiles = ceil_div(mb, RowTile<T>::pixels);
    BandRun run;
    typename RowTile<T>::Arguments g;
    g.pitch = plan_.pitch();
    g.runs = &run;
    g.run_count = 1;
    g.c_pitch = g.base_pitch = ldc;
    for (int64_t j = 0; j < panel_.width; j += RowTile<T>::strip) {
      g.b = panel_.at(0, j);
      for (int64_t t = 0, i = 0; t < tiles; ++t) {
        const int64_t rows = (mb - i) / (tiles - t);
        g.a = a + i * g.pitch;
        g.c = c + i * ldc + j;
        g.base = g.c;
        for (int64_t k = 0; k < panel_.rows; k += chain) {
          run = {k, std::min(chain, panel_.rows - k), k};
          run_row_kernel<T>(rows, panel_.lanes(j) / kLanes<T>, g);
        }
        i += rows;
      }
    }
  }

  const Plan& plan_;
  const Operands operands_;
  T *b_, *a_, *sums_;
  int64_t packed_ = -1, n0_ = 0;
  Strips<T> panel_;
};

// One product for each part; operands(part) makes its Operands.
template <class T, class MakeOperands>
void run_products(const ProductPlan<T>& plan, int64_t parts, const MakeOperands& operands) {
  using Worker = ProductWorker<T, decltype(operands(0))>;
  const int64_t tasks = plan.tasks();
  parallel_ranges(tasks * parts, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t part = begin / tasks, stop = std::min(end, (part + 1) * tasks);
      Worker worker(plan, operands(part));
      for (; begin < stop; ++begin) worker.run(begin - part * tasks);
    }
  });
}

template <class T, class Operands>
void run_product(const ProductPlan<T>& plan, const Operands& operands) {
  run_products(plan, 1, [&](int64_t) { return operands; });
}

}  // namespace pyvit
