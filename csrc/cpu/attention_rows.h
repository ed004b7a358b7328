// What dense attention does to one row of scores, forward and backward.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "vector_math.h"

namespace pyvit {

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

// Scores j = 0 to n, where at(j) points, times scale, with -inf up to the next whole vector;
// returns the largest.
template <class T, class At>
T scale_row(int64_t n, T scale, const At& at) {
  constexpr int L = kLanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Vec<T> factor = broadcast(scale);
  Vec<T> highest = broadcast(-inf);
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    const Vec<T> x = fma(load(at(j)), factor, Vec<T>{});
    store(at(j), x);
    highest = lane_max(highest, x);
  }
  if (j < n) {
    Vec<T> x = fma(load(at(j)), factor, Vec<T>{});
    x = lane_numbers<T>() < static_cast<Int<T>>(n - j) ? x : broadcast(-inf);
    store(at(j), x);
    highest = lane_max(highest, x);
  }
  return reduce_max<T>(highest);
}

// √N − 1; a row of one weight is as sparse as can be, whatever its gradient.
template <class T>
T hoyer_span(int64_t n) {
  return std::sqrt(static_cast<T>(n)) - T(1);
}

}  // namespace pyvit
