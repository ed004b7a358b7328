// The exact k largest of a row of scores: ties go to the lowest index. No sorting: a threshold
// between the k-th and the next largest is found by counting, from a guess that the row's mean
// and deviation give; a bracket of order-preserving integer keys makes the search end exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "vector_math.h"

namespace pyvit {

// Selected: score > value, or score == value and index < tie_end.
template <class T>
struct Cut {
  T value;
  int64_t tie_end;
};

// ---- a few rows at a time -------------------------------------------------------------------

// What the search knows of a row at its start, a row a lane.
template <class T>
struct RowStatistics {
  Vec<T> lowest, highest, mean, deviation;  // the last is not finite where the scores are not
};

template <class T>
inline uint32_t first_rows(int count) {
  return static_cast<uint32_t>((uint64_t(1) << count) - 1);
}

// In each of m <= kLanes<T> rows, scores s[0:n] *= scale, -inf up to the next whole vector. Adding
// +0 turns -0 into +0, so that the order of scores is the order of their bits. NaN becomes +inf:
// it is selected first, and the softmax makes a NaN of it.
template <class T>
RowStatistics<T> prepare_rows(T* scores, int64_t ld, int m, int64_t n, T scale) {
  constexpr int L = kLanes<T>;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const Vec<T> factor = broadcast(scale);
  const Mask<T> inside = lane_numbers<T>() < static_cast<Int<T>>(n % L);
  Vec<T> sums[L] = {}, squares[L] = {}, highest[L] = {}, lowest[L] = {};
  for (int i = 0; i < m; ++i) {
    T* s = scores + i * ld;
    Vec<T> sum{}, square{}, high = broadcast(-inf), low = broadcast(inf);
    int64_t j = 0;
    for (; j + L <= n; j += L) {
      const Vec<T> x = fma(load(s + j), factor, Vec<T>{});
      store(s + j, x);
      sum += x;
      square = fma(x, x, square);
      high = lane_max(high, x);
      low = lane_min(low, x);
    }
    if (j < n) {
      const Vec<T> x = fma(load(s + j), factor, Vec<T>{}), within = inside ? x : Vec<T>{};
      store(s + j, inside ? x : broadcast(-inf));
      sum += within;
      square = fma(within, within, square);
      high = lane_max(high, inside ? x : broadcast(-inf));
      low = lane_min(low, inside ? x : broadcast(inf));
    }
    sums[i] = sum, squares[i] = square, highest[i] = high, lowest[i] = low;
  }
  const Vec<T> share = broadcast(T(1) / static_cast<T>(n));
  const Vec<T> mean = sum_of_each<T>(sums) * share;
  const Vec<T> variance = sum_of_each<T>(squares) * share - mean * mean;
  const auto least = [](Vec<T> a, Vec<T> b) { return lane_min(a, b); };
  const auto most = [](Vec<T> a, Vec<T> b) { return lane_max(a, b); };
  RowStatistics<T> rows{reduce_each<T>(lowest, least), reduce_each<T>(highest, most), mean,
                        Vec<T>{}};
  for (int i = 0; i < L; ++i) rows.deviation[i] = std::sqrt(std::max(variance[i], T(0)));
  const uint32_t strange = ~mask_bits(variance - variance == Vec<T>{}) & first_rows<T>(m);
  for (int i = 0; i < m && strange != 0; ++i) {
    if (!(strange >> i & 1)) continue;
    T* s = scores + i * ld;
    rows.deviation[i] = inf;
    for (int64_t j = 0; j < n; ++j)
      if (std::isnan(s[j])) s[j] = rows.highest[i] = inf;
    rows.lowest[i] = std::min<T>(rows.lowest[i], rows.highest[i]);
  }
  return rows;
}

// counts − (x >= threshold), which is -1 or 0.
template <class T>
inline Mask<T> count_lanes(Mask<T> counts, Vec<T> x, Vec<T> threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Mask<T>)_mm512_mask_sub_epi32((__m512i)counts, at_least_bits<T>(x, threshold),
                                          (__m512i)counts, _mm512_set1_epi32(-1));
#endif
  return counts - (x >= threshold);
}

// Of a row padded with -inf to whole vectors.
template <class T>
inline int64_t count_at_least(const T* s, int64_t n, Vec<T> threshold) {
  constexpr int64_t L = kLanes<T>;
  Mask<T> counts[4] = {};
  int64_t j = 0;
  for (; j + 3 * L < n; j += 4 * L)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
      counts[c] = count_lanes<T>(counts[c], load(s + j + c * L), threshold);
  for (; j < n; j += L) counts[0] = count_lanes<T>(counts[0], load(s + j), threshold);
  return reduce_add<Int<T>>((counts[0] + counts[1]) + (counts[2] + counts[3]));
}

// Signed integers in the order of the numbers, and back.
template <class T>
inline Mask<T> order_keys(Vec<T> x) {
  const auto bits = bit_cast<Mask<T>>(x);
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Int<T>>::max());
}
template <class T>
inline Vec<T> key_values(Mask<T> keys) {
  const Mask<T> flipped = (keys >> (8 * sizeof(T) - 1)) & std::numeric_limits<Int<T>>::max();
  return bit_cast<Vec<T>>(keys ^ flipped);
}

// log2 of counts, to two digits: enough to aim the next guess.
template <class T>
inline Vec<T> rough_log2(Vec<T> x) {
  using C = ExpConstants<T>;
  const auto bits = __builtin_convertvector(bit_cast<Mask<T>>(x), Vec<T>);
  return bits * broadcast(T(1) / static_cast<T>(Int<T>(1) << C::mantissa)) -
         broadcast(static_cast<T>(C::bias));
}

// Finds cuts in rows of n scores that keep k of them.
template <class T>
class CutFinder {
  static constexpr int L = kLanes<T>;
  using Keys = Mask<T>;
  using Distance = Vec<std::make_unsigned_t<Int<T>>>;

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

  // Rows that are searched together, so that one's counting hides the other's waiting: as many
  // as stay in the first-level cache.
  int batch() const {
    const int64_t bytes = round_up(n_, L) * int64_t(sizeof(T));
    return static_cast<int>(std::clamp<int64_t>((32 << 10) / bytes, 1, L));
  }

  // The cuts of the m rows that prepare_rows made.
  void operator()(const T* scores, int64_t ld, int m, const RowStatistics<T>& rows,
                  Cut<T>* cuts) const {
    std::fill_n(cuts, m, Cut<T>{-std::numeric_limits<T>::infinity(), n_});
    if (k_ >= n_) return;
    Bracket at{order_keys<T>(rows.lowest), order_keys<T>(rows.highest) + 1,
               broadcast(static_cast<T>(n_)), Vec<T>{}};
    const Vec<T> wanted = broadcast(static_cast<T>(k_));
    Vec<T> guess = rows.mean + broadcast(quantile_) * rows.deviation;
    uint32_t active = first_rows<T>(m);
    for (int round = 0;; ++round) {
      const Distance distance = (Distance)at.high - (Distance)at.low;
      for (uint32_t end = mask_bits((Keys)(distance <= 1)) & active; end != 0; end &= end - 1) {
        const int i = __builtin_ctz(end);
        cuts[i] = tied(scores + i * ld, key_values<T>(at.low)[i],
                       k_ - static_cast<int64_t>(at.reach_high[i]));
        active &= ~(1u << i);
      }
      if (active == 0) return;
      // Halving every third time bounds the search where guesses creep.
      const Keys middle = at.low + (Keys)(distance >> 1);
      Keys key = order_keys<T>(guess);
      key = (guess > key_values<T>(at.low)) & (key < at.high) ? key : middle;
      if (round % 3 == 2 || round > 8) key = middle;
      const Vec<T> threshold = key_values<T>(key), reach = count(scores, ld, active, threshold);
      for (uint32_t end = mask_bits(reach == wanted) & active; end != 0; end &= end - 1)
        cuts[__builtin_ctz(end)] = {threshold[__builtin_ctz(end)], n_};
      active &= ~mask_bits(reach == wanted);
      const Mask<T> more = reach > wanted;
      at.low = more ? key : at.low;
      at.high = more ? at.high : key;
      at.reach_low = more ? reach : at.reach_low;
      at.reach_high = more ? at.reach_high : reach;
      guess = round == 0 ? second_guess(rows, threshold, reach) : next_guess(at);
    }
  }

 private:
  // At least k scores reach `low`; fewer reach `high`.
  struct Bracket {
    Keys low, high;
    Vec<T> reach_low, reach_high;
  };

  Vec<T> count(const T* scores, int64_t ld, uint32_t rows, Vec<T> threshold) const {
    T limit[L], reach[L] = {};
    store(limit, threshold);
    for (; rows != 0; rows &= rows - 1) {
      const int i = __builtin_ctz(rows);
      reach[i] = static_cast<T>(count_at_least<T>(scores + i * ld, n_, broadcast(limit[i])));
    }
    return load(reach);
  }

  static Vec<T> log2_of(Vec<T> count) {
    return rough_log2<T>(lane_max(broadcast(T(0.5)), count));
  }

  Vec<T> second_guess(const RowStatistics<T>& rows, Vec<T> threshold, Vec<T> reach) const {
    const Vec<T> octaves = log2_of(reach) - log2_of(broadcast(static_cast<T>(k_)));
    return threshold + octaves * broadcast(octave_) * rows.deviation;
  }

  Vec<T> next_guess(const Bracket& at) const {
    const Vec<T> low = key_values<T>(at.low), high = key_values<T>(at.high);
    const Vec<T> below = log2_of(at.reach_low), above = log2_of(at.reach_high);
    const Vec<T> wanted = log2_of(broadcast(static_cast<T>(k_)));
    return low + (high - low) * ((below - wanted) / (below - above));
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

// ---- what was kept --------------------------------------------------------------------------

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

// Appends the set lanes of x, at index j on, and their indices, in order; up to a vector after
// them is overwritten too. Returns how many. Where lanes are Sparse, half a vector nearly always
// holds them; whole vectors written one over the other would wait for each other.
template <bool Sparse, class T>
inline int append_lanes(int32_t* indices, T* values, int64_t j, Vec<T> x, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Mask<T> lanes = lane_numbers<T>() + static_cast<int32_t>(j);
    const auto set = static_cast<__mmask16>(bits);
    const __m512i packed = _mm512_maskz_compress_epi32(set, (__m512i)lanes);
    const __m512 packed_x = _mm512_maskz_compress_ps(set, (__m512)x);
    const int count = __builtin_popcount(bits);
    _mm256_storeu_si256((__m256i*)indices, _mm512_castsi512_si256(packed));
    _mm256_storeu_ps(values, _mm512_castps512_ps256(packed_x));
    if (!Sparse || count > 8) {
      _mm256_storeu_si256((__m256i*)(indices + 8), _mm512_extracti64x4_epi64(packed, 1));
      _mm256_storeu_ps(values + 8, _mm512_extractf32x8_ps(packed_x, 1));
    }
    return count;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    const __m128i packed = _mm_loadl_epi64((const __m128i*)&kLaneOrders.order[bits]);
    const __m256i lanes = _mm256_cvtepu8_epi32(packed);
    _mm256_storeu_si256((__m256i*)indices,
                        _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int>(j))));
    _mm256_storeu_ps(values, _mm256_permutevar8x32_ps((__m256)x, lanes));
    return __builtin_popcount(bits);
  }
#endif
  // Without a branch on the lane: which are set cannot be predicted.
  int count = 0;
  for (int i = 0; i < kLanes<T>; ++i) {
    indices[count] = static_cast<int32_t>(j + i);
    values[count] = x[i];
    count += bits >> i & 1;
  }
  return count;
}

template <bool Sparse, class T>
void collect_selected(const T* s, int64_t n, const Cut<T>& cut, int32_t* indices, T* scores) {
  const Vec<T> value = broadcast(cut.value);
  const bool untied = cut.tie_end == n;
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    const Vec<T> x = load(s + j);
    const uint32_t bits = untied ? at_least_bits<T>(x, value) : mask_bits(selected(x, j, cut));
    count += append_lanes<Sparse, T>(indices + count, scores + count, j, x, bits);
  }
}

// Writes the indices of the selected scores, ascending, and the scores. Both need room for one
// vector more than are selected, of which there are k.
template <class T>
void collect_selected(const T* s, int64_t n, int64_t k, const Cut<T>& cut, int32_t* indices,
                      T* scores) {
  if (4 * k < n) return collect_selected<true>(s, n, cut, indices, scores);
  collect_selected<false>(s, n, cut, indices, scores);
}

}  // namespace pyvit
