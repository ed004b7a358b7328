// The exact k largest of a row of scores: ties go to the lowest index. No sorting: a threshold
// between the k-th and the next largest is found by counting, from a guess that the row's mean
// and deviation give; a bracket of order-preserving integer keys makes the search end exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "vector_math.h"

namespace pyvit {

template <class T>
struct RowStatistics {
  T lowest, highest, mean, deviation;  // deviation is not finite where the scores are not
};

// Selected: score > value, or score == value and index < tie_end.
template <class T>
struct Cut {
  T value;
  int64_t tie_end;
};

// Scores s[0:n] *= scale, -inf up to the next whole vector. Adding +0 turns -0 into +0, so that
// the order of scores is the order of their bits. NaN becomes +inf: it is selected first, and
// the softmax makes a NaN of it.
template <class T>
RowStatistics<T> prepare_row(T* s, int64_t n, T scale) {
  constexpr int L = kLanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Vec<T> factor = broadcast(scale);
  Vec<T> sum{}, squares{}, highest = broadcast(-inf), lowest = broadcast(inf);
  auto add = [&](Vec<T> x) {
    sum += x;
    squares = fma(x, x, squares);
    highest = lane_max(highest, x);
    lowest = lane_min(lowest, x);
  };
  int64_t j = 0;
  for (; j + L <= n; j += L) {
    const Vec<T> x = fma(load(s + j), factor, Vec<T>{});
    store(s + j, x);
    add(x);
  }
  if (j < n) {
    const Vec<T> x = fma(load(s + j), factor, Vec<T>{});
    const Mask<T> inside = lane_numbers<T>() < static_cast<Int<T>>(n - j);
    store(s + j, inside ? x : broadcast(-inf));
    sum += inside ? x : Vec<T>{};
    squares = inside ? fma(x, x, squares) : squares;
    highest = inside ? lane_max(highest, x) : highest;
    lowest = inside ? lane_min(lowest, x) : lowest;
  }
  const T mean = reduce_add<T>(sum) / static_cast<T>(n);
  const T variance = reduce_add<T>(squares) / static_cast<T>(n) - mean * mean;
  RowStatistics<T> row{reduce_min<T>(lowest), reduce_max<T>(highest), mean,
                       std::sqrt(std::max(variance, T(0)))};
  if (!std::isfinite(variance)) {
    row.deviation = inf;
    for (j = 0; j < n; ++j)
      if (std::isnan(s[j])) s[j] = row.highest = inf;
    row.lowest = std::min(row.lowest, row.highest);
  }
  return row;
}

template <class T>
int64_t count_at_least(const T* s, int64_t n, T threshold) {
  constexpr int L = kLanes<T>;
  const Vec<T> t = broadcast(threshold);
  Mask<T> negative_count{};
  for (int64_t j = 0; j < n; j += L) negative_count += load(s + j) >= t;
  Int<T> lane[L];
  std::memcpy(lane, &negative_count, sizeof lane);
  int64_t count = 0;
  for (int i = 0; i < L; ++i) count -= lane[i];
  return count;
}

// Signed integers in the order of the numbers.
template <class T>
Int<T> order_key(T x) {
  const auto bits = bit_cast<Int<T>>(x);
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Int<T>>::max());
}
template <class T>
T key_value(Int<T> key) {
  return bit_cast<T>(
      static_cast<Int<T>>(key ^ ((key >> (8 * sizeof(T) - 1)) & std::numeric_limits<Int<T>>::max())));
}

// log2 of a count, to two digits: enough to aim the next guess.
inline float rough_log2(float x) {
  return static_cast<float>(bit_cast<int32_t>(x)) * (1.0f / (1 << 23)) - 127.0f;
}

// Finds cuts in rows of n scores that keep k of them.
template <class T>
class CutFinder {
 public:
  CutFinder(int64_t n, int64_t k) : n_(n), k_(k) {
    // Where the upper tail of a normal distribution holds k of n: the rational approximation
    // 26.2.23 of Abramowitz and Stegun; and by how many deviations the threshold moves when the
    // count is wrong by a factor of 2.
    const double share = (static_cast<double>(k) - 0.5) / static_cast<double>(n);
    const double p = std::min(share, 1 - share);
    const double t = std::sqrt(-2 * std::log(p));
    const double tail = t - (2.515517 + t * (0.802853 + t * 0.010328)) /
                                (1 + t * (1.432788 + t * (0.189269 + t * 0.001308)));
    quantile_ = static_cast<T>(share < 0.5 ? tail : -tail);
    const double density = std::exp(-0.5 * tail * tail) / 2.5066282746310002;
    octave_ = static_cast<T>(0.6931471805599453 * share / std::max(density, 1e-6));
  }

  // The padding of prepare_row must be in place.
  Cut<T> operator()(const T* s, const RowStatistics<T>& row) const {
    if (k_ >= n_) return {-std::numeric_limits<T>::infinity(), n_};
    using Key = Int<T>;
    using Unsigned = std::make_unsigned_t<Key>;
    // At least k scores reach `low`; fewer reach `high`.
    Key low = order_key(row.lowest), high = order_key(row.highest) + 1;
    int64_t reach_low = n_, reach_high = 0;
    T guess = row.mean + quantile_ * row.deviation;
    for (int round = 0; static_cast<Unsigned>(high) - static_cast<Unsigned>(low) > 1; ++round) {
      Key key = order_key(guess);
      // Halving every third time bounds the search where guesses creep.
      if (round % 3 == 2 || round > 8 || !(guess > key_value<T>(low) && key < high))
        key = static_cast<Key>(low +
                               (static_cast<Unsigned>(high) - static_cast<Unsigned>(low)) / 2);
      const T threshold = key_value<T>(key);
      const int64_t reach = count_at_least(s, n_, threshold);
      if (reach == k_) return {threshold, n_};
      (reach > k_ ? low : high) = key;
      (reach > k_ ? reach_low : reach_high) = reach;
      guess = next_guess(row, threshold, reach, key_value<T>(low), reach_low,
                         key_value<T>(high), reach_high, round);
    }
    return tied(s, key_value<T>(low), k_ - reach_high);
  }

 private:
  T next_guess(const RowStatistics<T>& row, T threshold, int64_t reach, T low, int64_t reach_low,
               T high, int64_t reach_high, int round) const {
    const float wanted = rough_log2(static_cast<float>(k_));
    if (round == 0) {
      const float ratio = rough_log2(std::max(0.5f, static_cast<float>(reach))) - wanted;
      return threshold + static_cast<T>(ratio) * octave_ * row.deviation;
    }
    const float below = rough_log2(static_cast<float>(reach_low));
    const float above = rough_log2(std::max(0.5f, static_cast<float>(reach_high)));
    return low + (high - low) * static_cast<T>((below - wanted) / (below - above));
  }

  // The cut through scores equal to `value`, of which the first `count` are kept.
  Cut<T> tied(const T* s, T value, int64_t count) const {
    int64_t j = 0;
    for (; j < n_ && count > 0; ++j) count -= s[j] == value;
    return {value, j};
  }

  int64_t n_, k_;
  T quantile_, octave_;
};

// The comparison of one vector of scores, at index j on, with a cut.
template <class T>
inline Mask<T> selected(Vec<T> s, int64_t j, const Cut<T>& cut) {
  const Vec<T> value = broadcast(cut.value);
  const int64_t ties = std::min<int64_t>(std::max<int64_t>(cut.tie_end - j, 0), kLanes<T>);
  return (s > value) | ((s == value) & (lane_numbers<T>() < static_cast<Int<T>>(ties)));
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For each set of 8 lanes, their numbers in order: 8 bytes.
struct LaneOrders {
  uint64_t order[256];
};
constexpr LaneOrders make_lane_orders() {
  LaneOrders table{};
  for (int bits = 0; bits < 256; ++bits) {
    int count = 0;
    for (uint64_t lane = 0; lane < 8; ++lane)
      if (bits >> lane & 1) table.order[bits] |= lane << (8 * count++);
  }
  return table;
}
inline constexpr LaneOrders kLaneOrders = make_lane_orders();
#endif

// Writes j plus the number of each set lane, in order; up to a vector after them is overwritten
// too. Returns how many. Where lanes are `sparse`, half a vector nearly always holds them: whole
// vectors written one over the other would wait for each other.
template <class T>
inline int append_lanes(int32_t* indices, int64_t j, uint32_t bits, [[maybe_unused]] bool sparse) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Mask<T> lanes = lane_numbers<T>() + static_cast<int32_t>(j);
    const __m512i packed =
        _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), (__m512i)lanes);
    const int count = __builtin_popcount(bits);
    if (sparse && count <= 8) {
      _mm256_storeu_si256((__m256i*)indices, _mm512_castsi512_si256(packed));
    } else {
      _mm512_storeu_si512(indices, packed);
    }
    return count;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m128i packed = _mm_loadl_epi64((const __m128i*)&kLaneOrders.order[bits]);
    const __m256i lanes = _mm256_cvtepu8_epi32(packed);
    _mm256_storeu_si256((__m256i*)indices,
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(j))));
    return __builtin_popcount(bits);
  }
#endif
  // Without a branch on the lane: which are set cannot be predicted.
  int count = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    indices[count] = static_cast<int32_t>(j + i);
    count += bits >> i & 1;
  }
  return count;
}

// Writes the indices of the selected scores, ascending, and the scores; returns how many. Both
// need room for one vector more.
template <class T>
int64_t collect_selected(const T* s, int64_t n, int64_t k, const Cut<T>& cut, int32_t* indices,
                         T* scores) {
  const bool sparse = 4 * k < n;
  int64_t count = 0;
  if (cut.tie_end == n) {
    const Vec<T> value = broadcast(cut.value);
    for (int64_t j = 0; j < n; j += kLanes<T>)
      count += append_lanes<T>(indices + count, j, mask_bits(load(s + j) >= value), sparse);
  } else {
    for (int64_t j = 0; j < n; j += kLanes<T>)
      count +=
          append_lanes<T>(indices + count, j, mask_bits(selected(load(s + j), j, cut)), sparse);
  }
  for (int64_t i = 0; i < count; ++i) scores[i] = s[indices[i]];
  return count;
}

}  // namespace pyvit
