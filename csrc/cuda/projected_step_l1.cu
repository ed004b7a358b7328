// L1: the sparse step and the projection on the part of the ball within the bounds, by the method
// of csrc/cpu/projected_step_l1.cpp. One block has an image and walks over it until both thresholds
// are found:
// - the smallest score that moves, 11 bits of its pattern in a pass, by counting in shared memory
//   (three passes over x and the direction; two for numbers of 16 bits, whose last 11 are zeros);
// - w = x + step - x0, which is written to memory, in float32;
// - the λ at which Σ_i min(max(|w_i| - λ, 0), room_i) is eps, by Newton's method inside a bracket:
//   some five to ten passes over w and x0.
// There is one block for each image, so that passes run at the rate of a multiprocessor's share of
// the cache: about 15 µs each for 3 x 224 x 224 numbers of 32 bits, some 0.25 ms in all (by
// calculation), whatever the batch, up to the number of multiprocessors.
#include <algorithm>
#include <stdexcept>

#include "cuda/projected_step_pieces.cuh"

namespace pyvit::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kDigit = 11, kDigits = 1 << kDigit;
constexpr int kFirstShift = 22;  // 31 bits: a score is not negative
constexpr int kOperands = operand_set(kX, kGrad, kX0, kOut);

struct L1Shared {
  unsigned counts[kDigits];
  double sums[kMostWarps];
  float floats[kMostWarps];
  int ints[kMostWarps];
  int digit, left, count;
};

// The pixels that move, each by `step`: those whose score is at least `smallest`, and the first
// `ties` of those whose score is `tied`.
struct Choice {
  float smallest, tied, step;
  int ties;
};

// |d|, and 0 where a bound forbids the move.
__device__ float score_of(float x, float d, float lo, float hi) {
  if (d > 0.0f) return x >= hi ? 0.0f : d;
  return d < 0.0f && x > lo ? -d : 0.0f;
}

template <class T, bool kDense>
class L1Image {
 public:
  static constexpr int kRun = kRunOf<T, kDense>;

  __device__ L1Image(const Images& images, const StepNumbers& numbers, int64_t image,
                     float* deltas, L1Shared& shared)
      : images_(images), image_(image), elements_(images.elements),
        deltas_(deltas + image * delta_stride(images.elements)), shared_(shared),
        sign_(numbers.targeted ? -1.0f : 1.0f), lo_(rounded<T>(numbers.lo)),
        hi_(rounded<T>(numbers.hi)) {}

  // False where the direction is not finite.
  __device__ bool choose(int wanted, float step, Choice& choice) {
    bool bad = false;
    int left = wanted, count = 0, zeros = 0;
    uint32_t known = 0;  // the bits found so far of the wanted-th largest score
    constexpr int kLastShift = sizeof(T) == 2 ? kDigit : 0;
    for (int shift = kFirstShift; shift >= kLastShift; shift -= kDigit) {
      for (int i = threadIdx.x; i < kDigits; i += kThreads) shared_.counts[i] = 0;
      __syncthreads();
      int scored = 0;
      for_each_place([&](const auto& place, int64_t) {
        float x[kRun], d[kRun];
        place.load(kX, x);
        place.load(kGrad, d);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {  // zeros past the end
          bad |= !(fabsf(d[i]) < INFINITY);
          const uint32_t bits = __float_as_uint(score_of(x[i], d[i] * sign_, lo_, hi_));
          if (bits == 0) continue;  // most, in places: they need not queue for one counter
          ++scored;
          // In the first pass nothing is known, and nothing is above its bits.
          if (shift == kFirstShift || bits >> (shift + kDigit) == known) {
            atomicAdd(&shared_.counts[bits >> shift & (kDigits - 1)], 1u);
          }
        }
      });
      if (shift == kFirstShift) {
        zeros = static_cast<int>(elements_) - block_reduce(scored, shared_.ints);
      }
      find_digit(known == 0 ? zeros : 0, left);
      known = known << kDigit | static_cast<uint32_t>(shared_.digit);
      left = shared_.left;
      count = shared_.count;
      __syncthreads();  // before any of it is written again
    }
    known <<= kLastShift;
    // `known` is the k-th largest score, and `left` of the `count` pixels that have it are kept.
    const bool whole = known == 0 || left == count;
    choice.smallest = __uint_as_float(whole ? (known == 0 ? 1 : known) : known + 1);
    choice.tied = __uint_as_float(known);
    choice.ties = whole ? 0 : left;
    const int moving = known == 0 ? wanted - left : wanted;
    choice.step = step / static_cast<float>(moving == 0 ? 1 : moving);
    return __syncthreads_or(bad) == 0;
  }

  // Leaves w in deltas_; its largest size in `largest`. False where one is not finite.
  __device__ bool move(const Choice& choice, bool raw, float& largest) {
    bool bad = false;
    int seen = 0;  // ties
    largest = 0.0f;
    for (int64_t begin = 0; begin < elements_; begin += int64_t{kThreads} * kRun) {
      const int64_t e = begin + int64_t{threadIdx.x} * kRun;
      float x[kRun] = {}, d[kRun] = {}, x0[kRun] = {};
      if (e < elements_) {
        const Place<T, kRun, kDense, kOperands> place(images_, image_, e, elements_);
        place.load(kX, x);
        place.load(kGrad, d);
        place.load(kX0, x0);
      }
      int tied = 0;
      if (choice.ties > 0) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (score_of(x[i], d[i] * sign_, lo_, hi_) == choice.tied) ++tied;
        }
        const Prefix prefix = block_prefix(tied, shared_.ints);
        tied = seen + prefix.before;
        seen += prefix.all;
      }
      Run<float, kRun> delta;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float along = d[i] * sign_;
        float by = choice.step * along;
        if (!raw) {
          const float score = score_of(x[i], along, lo_, hi_);
          bool moves = score >= choice.smallest;
          if (choice.ties > 0 && score == choice.tied) moves = tied++ < choice.ties;
          by = !moves ? 0.0f : along < 0.0f ? -choice.step : choice.step;
        }
        delta.values[i] = x[i] + by - x0[i];
        const float size = fabsf(delta.values[i]);
        bad |= !(size < INFINITY);
        largest = largest < size ? size : largest;
      }
      if (e < elements_) *reinterpret_cast<Run<float, kRun>*>(deltas_ + e) = delta;
    }
    largest = block_reduce(largest, shared_.floats, Largest{});
    return __syncthreads_or(bad) == 0;
  }

  // λ
  __device__ float threshold(double eps, float largest) {
    float low = 0.0f, high = largest, lambda = 0.0f;  // f(low) > eps >= f(high)
    for (int round = 0;; ++round) {
      double sum = 0.0;
      int sliding = 0;
      for_each_delta([&](const auto& place, const Run<float, kRun>& delta) {
        float x0[kRun];
        place.load(kX0, x0);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float size = fabsf(delta.values[i]), above = size - lambda;
          const float room = delta.values[i] > 0.0f ? hi_ - x0[i] : x0[i] - lo_;
          if (i >= place.count()) continue;
          if (above < room) {
            if (above > 0.0f) {  // between the kinks of its term
              sum += static_cast<double>(size);
              ++sliding;
            }
          } else if (room > 0.0f) {  // at its bound
            sum += static_cast<double>(room);
          }
        }
      });
      sum = block_reduce(sum, shared_.sums);
      const double n = block_reduce(sliding, shared_.ints);
      if (sum - n * lambda <= eps) {
        if (lambda == 0.0f) return lambda;  // inside the ball already
        high = lambda;
      } else {
        low = lambda;
      }
      float next = static_cast<float>((sum - eps) / n);  // not a number in between for n = 0
      if (next == lambda) return lambda;
      if (!(low < next && next < high) || round % 8 == 7) next = low + (high - low) / 2.0f;
      if (!(low < next && next < high)) return high;  // neighbouring numbers: stay in the ball
      lambda = next;
    }
  }

  __device__ void write(float lambda) {
    for_each_delta([&](const auto& place, const Run<float, kRun>& delta) {
      float y[kRun];
      place.load(kX0, y);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float w = delta.values[i], size = fabsf(w) - lambda;
        const float kept = size > 0.0f ? size : 0.0f;
        y[i] = clamp(y[i] + (w < 0.0f ? -kept : kept), lo_, hi_);
      }
      place.store(kOut, y);
    });
  }

  __device__ void fill_with_nan() {
    float nan[kRun];
#pragma unroll
    for (int i = 0; i < kRun; ++i) nan[i] = NAN;
    for_each_place([&](const auto& place, int64_t) { place.store(kOut, nan); });
  }

 private:
  template <class F>
  __device__ void for_each_place(const F& f) {
    for_each_span<T, kVector<T>, kDense, kOperands>(images_, image_, 0, elements_, f);
  }
  template <class F>
  __device__ void for_each_delta(const F& f) {
    for_each_place([&](const auto& place, int64_t e) {
      f(place, *reinterpret_cast<const Run<float, kRun>*>(deltas_ + e));
    });
  }

  // The largest digit that, with those above it, `left` scores have at least; what is then left of
  // them, and how many have it. `zeros` scores were not counted.
  __device__ void find_digit(int zeros, int left) {
    static_assert(kDigits == 2 * kThreads, "a thread has two digits");
    __syncthreads();
    const int upper = kDigits - 1 - 2 * static_cast<int>(threadIdx.x), lower = upper - 1;
    const int of_upper = static_cast<int>(shared_.counts[upper]);
    const int of_lower = static_cast<int>(shared_.counts[lower]) + (lower == 0 ? zeros : 0);
    left -= block_prefix(of_upper + of_lower, shared_.ints).before;
    if (left > 0 && left <= of_upper + of_lower) {
      const bool in_upper = left <= of_upper;
      shared_.digit = in_upper ? upper : lower;
      shared_.left = in_upper ? left : left - of_upper;
      shared_.count = in_upper ? of_upper : of_lower;
    }
    __syncthreads();
  }

  const Images& images_;
  int64_t image_, elements_;
  float* deltas_;
  L1Shared& shared_;
  float sign_, lo_, hi_;
};

template <class T, bool kDense>
__global__ void __launch_bounds__(kThreads)
    l1_kernel(Images images, StepNumbers numbers, int wanted, float* deltas) {
  const int64_t number = blockIdx.x;
  L1Image<T, kDense> image(images, numbers, number, deltas, *dynamic_shared<L1Shared>());
  // The sign is the direction's, here.
  Choice choice{INFINITY, INFINITY, fabsf(numbers.step_of(number)), 0};
  if (!numbers.raw && !image.choose(wanted, choice.step, choice)) return image.fill_with_nan();
  float largest;
  if (!image.move(choice, numbers.raw, largest)) return image.fill_with_nan();
  const double eps = numbers.eps_of(number);
  image.write(eps < static_cast<double>(INFINITY) ? image.threshold(eps, largest) : 0.0f);
}

}  // namespace

void launch_l1(DType dtype, const Images& images, int64_t batch, const StepNumbers& numbers,
               double quantile, float* deltas, void* stream) {
  if (images.large) {
    throw std::runtime_error(
        "pyvit.projected_step: norm=\"l1\" takes images of fewer than 2^31 elements");
  }
  const double part = std::floor((1.0 - quantile) * static_cast<double>(images.elements) + 0.5);
  const int wanted = std::max(1, static_cast<int>(part));
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    launch("projected_step", images.dense ? l1_kernel<T, true> : l1_kernel<T, false>, batch,
           kThreads, sizeof(L1Shared), stream, images, numbers, wanted, deltas);
  });
}

}  // namespace pyvit::cuda
