// How the kernels of projected_step walk over images of any layout.
#pragma once

#include <climits>
#include <cmath>

#include "attack_step.h"
#include "cuda/divide.h"
#include "cuda/dtypes.h"
#include "cuda/reduce.cuh"

namespace pyvit::cuda {

constexpr int kMostDimensions = 25;  // of an image after merging; torch's own kernels take as many
constexpr int kPerThread = 16;       // elements of a thread, of all kernels but L1's
constexpr int kMostThreads = 256;
// Every warp adds up the sums of its image's chunks: those of larger images have more elements.
constexpr int64_t kMostSums = 512;

// The images of a call, brought into order by merge_dimensions.
struct Images {
  int64_t elements;
  int dimensions;
  bool dense;   // one dimension, side by side and aligned to 16 bytes in every operand
  bool large;   // offsets within an image need more than 31 bits
  int threads;  // of a block
  int64_t per_chunk;  // elements; a multiple of `threads` · kPerThread
  Divisor chunks;
  void* data[kStepOperands];
  int64_t batch_stride[kStepOperands];
  int64_t size[kMostDimensions];
  Divisor by_size[kMostDimensions];
  int64_t stride[kStepOperands][kMostDimensions];
};

// What a step is told, in the types that kernels compute in.
struct StepNumbers {
  double step_size, eps;
  const double *step_sizes, *eps_of_image;
  float lo, hi, decay;
  bool raw, targeted;

  __device__ float step_of(int64_t image) const {
    const float step = static_cast<float>(step_sizes ? step_sizes[image] : step_size);
    return targeted ? -step : step;
  }
  __device__ double eps_of(int64_t image) const {
    return eps_of_image ? eps_of_image[image] : eps;
  }
};

// Numbers side by side that are read and written together.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Run {
  T values[kCount];
};
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Sets of operands, which kernels are compiled for.
template <class... Operands>
__host__ __device__ constexpr int operand_set(Operands... operands) {
  return ((1 << operands) | ...);
}
__host__ __device__ constexpr bool uses(int set, int operand) { return (set >> operand & 1) != 0; }

// Where kRun elements of an image, from element e < end on, lie in some operands. Those past `end`
// are read as zeros and not written.
template <class T, int kRun, bool kDense, int kOperands>
class Place {
 public:
  __device__ Place(const Images& images, int64_t image, int64_t e, int64_t end)
      : images_(images), count_(end - e < kRun ? static_cast<int>(end - e) : kRun) {
    static_assert(kDense || kRun == 1, "runs are dense");
#pragma unroll
    for (int o = 0; o < kStepOperands; ++o) {
      if (uses(kOperands, o)) offset_[o] = image * images.batch_stride[o] + (kDense ? e : 0);
    }
    if (!kDense) add_strides(e);
  }

  __device__ void load(int operand, float (&to)[kRun]) const {
    const T* from = static_cast<const T*>(images_.data[operand]) + offset_[operand];
    if (count_ == kRun) {
      const auto run = *reinterpret_cast<const Run<T, kRun>*>(from);
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[i] = widen(run.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) to[i] = i < count_ ? widen(from[i]) : 0.0f;
    }
  }

  __device__ void store(int operand, const float (&values)[kRun]) const {
    T* to = static_cast<T*>(images_.data[operand]) + offset_[operand];
    if (count_ == kRun) {
      Run<T, kRun> run;
#pragma unroll
      for (int i = 0; i < kRun; ++i) run.values[i] = narrow<T>(values[i]);
      *reinterpret_cast<Run<T, kRun>*>(to) = run;
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count_) to[i] = narrow<T>(values[i]);
      }
    }
  }

  __device__ int count() const { return count_; }

 private:
  __device__ void add_strides(int64_t e) {
    for (int d = images_.dimensions - 1; d >= 0; --d) {
      int64_t index = e;
      if (d > 0) {
        e = images_.large ? e / images_.size[d]
                          : images_.by_size[d].quotient(static_cast<uint32_t>(e));
        index -= e * images_.size[d];
      }
#pragma unroll
      for (int o = 0; o < kStepOperands; ++o) {
        if (uses(kOperands, o)) offset_[o] += index * images_.stride[o][d];
      }
    }
  }

  const Images& images_;
  int count_;
  int64_t offset_[kStepOperands];
};

// The image and the part of it that are a block's; `block` is its number.
struct Chunk {
  int64_t image, begin, end;
  int number;

  __device__ Chunk(const Images& images, unsigned block) {
    const Quotient place(static_cast<int>(block), images.chunks);
    image = place.quotient;
    number = place.rest;
    begin = number * images.per_chunk;
    end = min(begin + images.per_chunk, images.elements);
  }
};

// f(place) for a thread's elements from `begin` to `end`: kSpan side by side, then the next ones
// that no other thread has. They come in one order whether they lie densely, and are read together,
// or not.
template <class T, int kSpan, bool kDense, int kOperands, class F>
__device__ void for_each_span(const Images& images, int64_t image, int64_t begin, int64_t end,
                              const F& f) {
  const int64_t step = int64_t{blockDim.x} * kSpan;
  for (int64_t e = begin + int64_t{threadIdx.x} * kSpan; e < end; e += step) {
    if constexpr (kDense) {
      f(Place<T, kSpan, true, kOperands>(images, image, e, end), e);
    } else {
#pragma unroll 1
      for (int64_t i = e; i < e + kSpan && i < end; ++i) {
        f(Place<T, 1, false, kOperands>(images, image, i, end), i);
      }
    }
  }
}
template <class T, bool kDense>
constexpr int kRunOf = kDense ? kVector<T> : 1;  // elements of a place

// ---- arithmetic

template <class T>
__device__ float rounded(float value) {  // to the storage type and back
  return widen(narrow<T>(value));
}

__device__ inline float clamp(float value, float lo, float hi) {  // lets NaN pass
  value = value < lo ? lo : value;
  return value > hi ? hi : value;
}

// ---- the host's side

// The operand that the step follows takes kGrad's place.
Images images_of(DType dtype, const ProjectedStep& step);

// How far an image's numbers in StepScratch::deltas are from the next one's.
__host__ __device__ inline int64_t delta_stride(int64_t elements) { return (elements + 7) / 8 * 8; }

// csrc/cuda/projected_step_l1.cu
void launch_l1(DType dtype, const Images& images, int64_t batch, const StepNumbers& numbers,
               double quantile, float* deltas, void* stream);

}  // namespace pyvit::cuda
