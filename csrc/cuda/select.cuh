// Exact top-k of rows of scores: the threshold by counting, ties by the lowest index.
//
// Scores are compared as integers of the same order, so that a bracket around the k-th largest can
// always be halved and ends after at most 32 rounds. It starts where that of a normal
// distribution would be, and goes on by interpolation: counts fall about exponentially in the tail,
// so the logarithms of two counts tell where a third one will be. Few rounds are needed then.
#pragma once

#include "cuda/hardware.h"

namespace pyvit::cuda {

// Integers ordered as the scores are; -0 and 0 are equal.
__device__ inline int order_key(float score) {
  const int bits = __float_as_int(score + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ inline float score_of(int key) {
  return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}

// count(keys >= low) is at least `wanted`, count(keys >= high) less.
struct Bracket {
  int low, high, count_low, count_high;

  __device__ bool is_open(int wanted) const { return count_low != wanted && high - 1 > low; }

  // A key inside the bracket.
  __device__ int probe(int wanted, float guess, int round) const {
    if (round % 4 == 3) return (low & high) + ((low ^ high) >> 1);  // halved
    float place = guess;
    if (round > 0) {
      const float at_low = logf(count_low + 0.5f), at_high = logf(count_high + 0.5f);
      const float bottom = score_of(low), top = score_of(high);
      const float share = (at_low - logf(static_cast<float>(wanted))) / (at_low - at_high);
      place = fmaf(top - bottom, share, bottom);
    }
    return min(max(order_key(place), low + 1), high - 1);
  }

  __device__ void take(int probe, int count, int wanted) {
    if (count >= wanted) {
      low = probe;
      count_low = count;
    } else {
      high = probe;
      count_high = count;
    }
  }
};

// What is known of a row before it is cut.
struct RowRange {
  float top, bottom, total, squares;
  int count;      // of its scores
  bool searched;  // false for rows of NaN and those past the last
};

// Kept are the scores above `threshold`, and those equal to it up to the key `last`.
struct Cut {
  float threshold;
  int last;

  __device__ bool keeps(float score, int key) const {
    return (score > threshold) | ((score == threshold) & (key <= last));
  }
};

// The cuts of a lane's two rows. `scores` says how they are kept: scores.count(f) gives for both
// rows of how many of all their scores f(row, score, key) holds; scores.any(x) whether x holds for
// any thread that must take part in counting. `place` is where the k-th largest of normally
// distributed scores would be, in deviations from the mean.
template <class Scores>
__device__ void cut_rows(Scores& scores, const RowRange (&range)[2], int keys, int wanted,
                         float place, Cut (&cut)[2]) {
  Bracket bracket[2];
  float guess[2];
  int probe[2], count[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float mean = range[r].total / range[r].count;
    const float variance = fmaxf(range[r].squares / range[r].count - mean * mean, 0.0f);
    guess[r] = fmaf(place, sqrtf(variance), mean);
    const int high = order_key(range[r].top) + 1;
    bracket[r] = {range[r].searched ? order_key(range[r].bottom) : high - 1, high,
                  range[r].count, 0};
  }
#pragma unroll 1
  for (int round = 0; scores.any(bracket[0].is_open(wanted) || bracket[1].is_open(wanted));
       ++round) {
#pragma unroll
    for (int r = 0; r < 2; ++r) probe[r] = bracket[r].probe(wanted, guess[r], round);
    const float limit[2] = {score_of(probe[0]), score_of(probe[1])};
    scores.count(count, [&](int r, float score, int) { return score >= limit[r]; });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (bracket[r].is_open(wanted)) bracket[r].take(probe[r], count[r], wanted);
    }
  }
  // Of the keys at `low` the first ones: as many as are needed. Found by halving, too.
  int before[2];  // too few up to here
  bool crowded[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    cut[r] = {score_of(bracket[r].low), keys - 1};
    crowded[r] = range[r].searched && bracket[r].count_low > wanted;
    before[r] = crowded[r] ? -1 : keys - 2;
  }
#pragma unroll 1
  while (scores.any(cut[0].last - before[0] > 1 || cut[1].last - before[1] > 1)) {
    const int middle[2] = {(before[0] + cut[0].last + 1) >> 1, (before[1] + cut[1].last + 1) >> 1};
    scores.count(count, [&](int r, float score, int key) {
      return (score == cut[r].threshold) & (key <= middle[r]);
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (cut[r].last - before[r] <= 1) continue;
      if (count[r] >= wanted - bracket[r].count_high) {
        cut[r].last = middle[r];
      } else {
        before[r] = middle[r];
      }
    }
  }
}

}  // namespace pyvit::cuda
