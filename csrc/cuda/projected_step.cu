// Method. An image is cut into chunks, one block each. L-infinity needs one pass and rounds to the
// storage type after each operation, as a chain of PyTorch operators does, so that the results are
// the same bits. Momentum and L2 need sums over an image first: one kernel leaves a sum for each
// chunk, in float64, and every warp of the next adds up those of its image, in an order that the
// image's size alone decides. L2's sums give both lengths:
//     ‖x + a·d - x0‖² = ‖x - x0‖² + 2a·⟨x - x0, d⟩ + a²·‖d‖².
// L1 is in projected_step_l1.cu.
//
// The floor is memory. Float32 images of 3 x 224 x 224, 64 in a batch, are 38.5 MB an operand:
// L-infinity reads three and writes one (36 µs at 4.3 TB/s), with momentum reads five (one of them
// twice) and writes two. L2 reads three twice: its second kernel begins with the images that the
// first read last, which are still in the cache. A thread asks for 48 bytes at a time and 1,024
// threads or more live on a multiprocessor: twice what hides the memory's latency.
//
// Where operands are not dense in one order, or not aligned, elements are read one at a time:
// neighbouring threads have neighbours in the result's memory, but in the kernels of sums, where a
// thread has the same elements as it has of aligned images: an image's sums are then the same bits
// whatever the offset of its first element.
#include "cuda/projected_step.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/projected_step_pieces.cuh"

namespace pyvit::cuda {
namespace {

// A power of two that keeps a norm or a mean within float32's range: both sides of a quotient are
// multiplied by it, which costs no precision.
__device__ double safe_scale(double value) {
  return value > 1e30 ? 0x1p-60 : value < 1e-30 ? 0x1p60 : 1.0;
}

__device__ double chunk_total(const double* sums, int chunks) {
  double sum = 0.0;
  for (int c = threadIdx.x % kWarp; c < chunks; c += kWarp) sum += sums[c];
  return warp_reduce(sum);
}

template <class T, int kSpan, bool kDense, int kOperands, class F>
__device__ void for_each_place(const Images& images, const Chunk& chunk, const F& f) {
  for_each_span<T, kSpan, kDense, kOperands>(images, chunk.image, chunk.begin, chunk.end,
                                             [&](const auto& place, int64_t) { f(place); });
}

// ---- momentum

template <class T, bool kDense>
__global__ void __launch_bounds__(kMostThreads) abs_sums_kernel(Images images, double* sums) {
  constexpr int kRun = kRunOf<T, kDense>;
  const Chunk chunk(images, blockIdx.x);
  double sum = 0.0;
  constexpr int kOperands = operand_set(kGrad);
  for_each_place<T, kVector<T>, kDense, kOperands>(images, chunk, [&](const auto& place) {
    float g[kRun];
    place.load(kGrad, g);
#pragma unroll
    for (int i = 0; i < kRun; ++i) sum += static_cast<double>(fabsf(g[i]));
  });
  sum = block_reduce(sum, dynamic_shared<double>());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// What the step follows: the gradient; or decay·momentum + grad / mean|grad|, rounded to the
// storage type, which is also written.
template <class T, bool kHasMomentum>
class Direction {
 public:
  static constexpr int kOperands =
      operand_set(kGrad) | (kHasMomentum ? operand_set(kMomentum, kMomentumOut) : 0);

  // `abs_sums`: of the gradient's absolute values, one a chunk; of all images.
  __device__ Direction(const Images& images, const Chunk& chunk, const double* abs_sums,
                       float decay)
      : decay_(decay) {
    if constexpr (kHasMomentum) {
      const int chunks = static_cast<int>(images.chunks.by);
      const double total = chunk_total(abs_sums + chunk.image * chunks, chunks);
      const double mean = total / static_cast<double>(images.elements);
      const double scale = safe_scale(mean);
      scale_ = static_cast<float>(scale);
      // Zero divides to zero: an image without a gradient adds nothing.
      divisor_ = mean == 0.0 ? 1.0f : static_cast<float>(mean * scale);
    }
  }

  template <class Place, int kRun>
  __device__ void load(const Place& place, float (&d)[kRun]) const {
    place.load(kGrad, d);
    if constexpr (kHasMomentum) {
      float before[kRun];
      place.load(kMomentum, before);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        d[i] = rounded<T>(d[i] * scale_ / divisor_ + before[i] * decay_);
      }
      place.store(kMomentumOut, d);
    }
  }

 private:
  float scale_ = 1.0f, divisor_ = 1.0f, decay_;
};

template <class T, bool kDense>
__global__ void __launch_bounds__(kMostThreads)
    momentum_kernel(Images images, const double* sums, float decay) {
  using Direction = Direction<T, true>;
  constexpr int kRun = kRunOf<T, kDense>;
  const Chunk chunk(images, blockIdx.x);
  const Direction direction(images, chunk, sums, decay);
  for_each_place<T, kRun, kDense, Direction::kOperands>(images, chunk, [&](const auto& place) {
    float d[kRun];
    direction.load(place, d);
  });
}

// ---- L-infinity

// One image's step and projection of one element. The order and the roundings are those of
//   x = x + step_size * grad.sign();  x = clamp(x0 + clamp(x - x0, -eps, eps), lo, hi)
template <class T>
class LinfStep {
 public:
  __device__ LinfStep(const StepNumbers& numbers, int64_t image)
      : step_(numbers.step_of(image)), length_(rounded<T>(step_)), lo_(rounded<T>(numbers.lo)),
        hi_(rounded<T>(numbers.hi)), raw_(numbers.raw) {
    const float eps = static_cast<float>(numbers.eps_of(image));
    ball_ = eps < INFINITY;
    outer_ = rounded<T>(eps);
  }
  __device__ float operator()(float x, float d, float x0) const {
    const float sign = d > 0.0f ? length_ : d < 0.0f ? -length_ : 0.0f;  // 0 for NaN
    const float moved = rounded<T>(x + (raw_ ? rounded<T>(step_ * d) : sign));
    const float delta = clamp(rounded<T>(moved - x0), -outer_, outer_);
    return clamp(ball_ ? rounded<T>(x0 + delta) : moved, lo_, hi_);
  }

 private:
  float step_, length_, outer_, lo_, hi_;
  bool ball_, raw_;
};

template <class T, bool kDense, bool kHasMomentum>
__global__ void __launch_bounds__(kMostThreads)
    linf_kernel(Images images, StepNumbers numbers, const double* sums) {
  using Direction = Direction<T, kHasMomentum>;
  constexpr int kRun = kRunOf<T, kDense>;
  constexpr int kOperands = operand_set(kX, kX0, kOut) | Direction::kOperands;
  const Chunk chunk(images, blockIdx.x);
  const LinfStep<T> step(numbers, chunk.image);
  const Direction direction(images, chunk, sums, numbers.decay);
  for_each_place<T, kRun, kDense, kOperands>(images, chunk, [&](const auto& place) {
    float x[kRun], d[kRun], x0[kRun];
    place.load(kX, x);
    place.load(kX0, x0);
    direction.load(place, d);
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = step(x[i], d[i], x0[i]);
    place.store(kOut, x);
  });
}

// ---- L2

struct L2Sums {
  double direction, delta, product;  // ‖d‖², ‖x - x0‖², ⟨x - x0, d⟩
};

// Writes an image's sums of direction, of delta and of products, one a chunk, one after another;
// and the new momentum, where there is one.
template <class T, bool kDense, bool kHasMomentum>
__global__ void __launch_bounds__(kMostThreads, 4)
    l2_sums_kernel(Images images, float decay, const double* abs_sums, double* sums) {
  using Direction = Direction<T, kHasMomentum>;
  constexpr int kRun = kRunOf<T, kDense>;
  constexpr int kOperands = operand_set(kX, kX0) | Direction::kOperands;
  const Chunk chunk(images, blockIdx.x);
  const Direction direction(images, chunk, abs_sums, decay);
  L2Sums total{0.0, 0.0, 0.0};
  for_each_place<T, kVector<T>, kDense, kOperands>(images, chunk, [&](const auto& place) {
    float x[kRun], d[kRun], x0[kRun];
    place.load(kX, x);
    place.load(kX0, x0);
    direction.load(place, d);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {  // zeros past the end
      const double wide = d[i], delta = x[i] - x0[i];
      total.direction = fma(wide, wide, total.direction);
      total.delta = fma(delta, delta, total.delta);
      total.product = fma(delta, wide, total.product);
    }
  });
  auto* shared = dynamic_shared<double>();
  total.direction = block_reduce(total.direction, shared);
  total.delta = block_reduce(total.delta, shared);
  total.product = block_reduce(total.product, shared);
  if (threadIdx.x == 0) {
    const int chunks = static_cast<int>(images.chunks.by);
    double* to = sums + chunk.image * 3 * chunks + chunk.number;
    to[0] = total.direction;
    to[chunks] = total.delta;
    to[2 * chunks] = total.product;
  }
}

template <class T>
class L2Step {
 public:
  __device__ L2Step(const StepNumbers& numbers, int64_t image, const L2Sums& sums)
      : lo_(rounded<T>(numbers.lo)), hi_(rounded<T>(numbers.hi)) {
    const double step = numbers.step_of(image), eps = numbers.eps_of(image);
    const double norm = numbers.raw || sums.direction == 0.0 ? 1.0 : sqrt(sums.direction);
    const double scale = safe_scale(norm), a = step / norm;
    scale_ = static_cast<float>(scale);
    factor_ = static_cast<float>(step / (norm * scale));
    const double square = sums.delta + 2.0 * a * sums.product + a * a * sums.direction;
    const double length = sqrt(square < 0.0 ? 0.0 : square);  // rounding may go below zero
    // A NaN length makes the whole image NaN, and a perturbation of zero needs no shrinking.
    shrink_ = length <= eps ? 1.0f : static_cast<float>(eps / length);
    ball_ = eps < static_cast<double>(INFINITY);
  }
  __device__ float operator()(float x, float d, float x0) const {
    const float moved = x + d * scale_ * factor_;
    return clamp(ball_ ? x0 + (moved - x0) * shrink_ : moved, lo_, hi_);
  }

 private:
  float scale_, factor_, shrink_, lo_, hi_;
  bool ball_;
};

template <class T, bool kDense>
__global__ void __launch_bounds__(kMostThreads)
    l2_kernel(Images images, StepNumbers numbers, const double* sums) {
  constexpr int kRun = kRunOf<T, kDense>;
  const Chunk chunk(images, gridDim.x - 1 - blockIdx.x);  // the last chunks are in the cache
  const int chunks = static_cast<int>(images.chunks.by);
  sums += chunk.image * 3 * chunks;
  const L2Step<T> step(numbers, chunk.image,
                       {chunk_total(sums, chunks), chunk_total(sums + chunks, chunks),
                        chunk_total(sums + 2 * chunks, chunks)});
  constexpr int kOperands = operand_set(kX, kGrad, kX0, kOut);
  for_each_place<T, kRun, kDense, kOperands>(images, chunk, [&](const auto& place) {
    float x[kRun], d[kRun], x0[kRun];
    place.load(kX, x);
    place.load(kGrad, d);
    place.load(kX0, x0);
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = step(x[i], d[i], x0[i]);
    place.store(kOut, x);
  });
}

// ---- the launches

constexpr const char* kName = "projected_step";
constexpr size_t kSharedBytes = kMostWarps * sizeof(double);

int threads_of(int64_t elements) {
  const int64_t wanted = (elements + kPerThread - 1) / kPerThread;
  return static_cast<int>(std::min<int64_t>((wanted + kWarp - 1) / kWarp * kWarp, kMostThreads));
}

int64_t ceil_divide(int64_t n, int64_t by) { return (n + by - 1) / by; }

int sums_of_chunk(const ProjectedStep& step) {
  return (step.has_momentum ? 1 : 0) + (step.norm == StepNorm::l2 ? 3 : 0);
}

int64_t chunk_elements(const ProjectedStep& step) {
  const int64_t elements = image_elements(step), least = int64_t{threads_of(elements)} * kPerThread;
  const int64_t chunks = ceil_divide(elements, least);
  return sums_of_chunk(step) == 0 ? least : least * ceil_divide(chunks, kMostSums);
}

// Where images differ in nothing but their elements, all are one image to the kernels.
void join_images(ProjectedStep& step) {
  if (step.norm != StepNorm::linf || step.has_momentum || step.step_sizes || step.eps_of_image) {
    return;
  }
  step.sizes.insert(step.sizes.begin(), step.batch);
  for (int o = 0; o < kMomentum; ++o) {
    step.strides[o].insert(step.strides[o].begin(), step.batch_stride[o]);
    step.batch_stride[o] = 0;
  }
  step.batch = 1;
}

void launch_step(DType dtype, const Images& images, const ProjectedStep& step,
                 const StepNumbers& numbers, StepScratch scratch, void* stream) {
  const int64_t blocks = step.batch * images.chunks.by;
  double* sums = scratch.sums;
  double* abs_sums = sums;
  if (step.has_momentum) sums += blocks;
  auto run = [&](auto kernel, auto... arguments) {
    launch(kName, kernel, blocks, images.threads, kSharedBytes, stream, images, arguments...);
  };
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    auto in_layout = [&](auto dense) {
      constexpr bool kDense = decltype(dense)::value;
      const double* of_gradient = abs_sums;
      if (step.has_momentum) run(abs_sums_kernel<T, kDense>, abs_sums);
      if (step.norm == StepNorm::linf) {
        run(step.has_momentum ? linf_kernel<T, kDense, true> : linf_kernel<T, kDense, false>,
            numbers, of_gradient);
      } else if (step.norm == StepNorm::l2) {
        run(step.has_momentum ? l2_sums_kernel<T, kDense, true> : l2_sums_kernel<T, kDense, false>,
            numbers.decay, of_gradient, sums);
      } else if (step.has_momentum) {
        run(momentum_kernel<T, kDense>, of_gradient, numbers.decay);
      }
    };
    images.dense ? in_layout(std::true_type{}) : in_layout(std::false_type{});
  });
}

void launch_l2(DType dtype, const Images& images, int64_t batch, const StepNumbers& numbers,
               const double* sums, void* stream) {
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    launch(kName, images.dense ? l2_kernel<T, true> : l2_kernel<T, false>,
           batch * images.chunks.by, images.threads, 0, stream, images, numbers, sums);
  });
}

}  // namespace

Images images_of(DType dtype, const ProjectedStep& step) {
  Images images{};
  images.elements = image_elements(step);
  images.threads = threads_of(images.elements);
  images.per_chunk = chunk_elements(step);
  images.chunks = Divisor(ceil_divide(images.elements, images.per_chunk));
  images.dimensions = static_cast<int>(step.sizes.size());
  if (step.sizes.size() > kMostDimensions) {
    throw std::runtime_error(
        "pyvit.projected_step: the CUDA kernels take images of at most 25 dimensions that lie "
        "apart in memory");
  }
  const int64_t bytes = dtype == DType::f32 ? 4 : 2;
  const int operands = step.has_momentum ? kStepOperands : kMomentum;
  images.dense = images.dimensions == 1;
  images.large = images.elements > INT_MAX;
  for (int d = 0; d < images.dimensions; ++d) {
    images.size[d] = step.sizes[d];
    images.by_size[d] = Divisor(images.large ? 1 : step.sizes[d]);
  }
  for (int o = 0; o < operands; ++o) {
    images.data[o] = step.data[o];
    images.batch_stride[o] = step.batch_stride[o];
    std::copy(step.strides[o].begin(), step.strides[o].end(), images.stride[o]);
    const bool aligned = reinterpret_cast<uintptr_t>(step.data[o]) % 16 == 0 &&
                         (step.batch == 1 || step.batch_stride[o] * bytes % 16 == 0);
    images.dense = images.dense && images.stride[o][0] == 1 && aligned;
  }
  return images;
}

int64_t step_deltas(const ProjectedStep& step) {
  return step.norm == StepNorm::l1 ? step.batch * delta_stride(image_elements(step)) : 0;
}

int64_t step_sums(const ProjectedStep& step) {
  return sums_of_chunk(step) * step.batch *
         ceil_divide(image_elements(step), chunk_elements(step));
}

void projected_step(DType dtype, ProjectedStep step, StepScratch scratch, void* stream) {
  join_images(step);
  merge_dimensions(step);
  Images images = images_of(dtype, step);
  const StepNumbers numbers{step.step_size,
                            step.eps,
                            step.step_sizes,
                            step.eps_of_image,
                            static_cast<float>(step.lo),
                            static_cast<float>(step.hi),
                            static_cast<float>(step.decay),
                            step.raw,
                            step.targeted};
  launch_step(dtype, images, step, numbers, scratch, stream);
  if (step.norm == StepNorm::linf) return;
  const double* sums = scratch.sums;
  if (step.has_momentum) {  // what the step follows from here on
    sums += step.batch * images.chunks.by;
    images.data[kGrad] = images.data[kMomentumOut];
    images.batch_stride[kGrad] = images.batch_stride[kMomentumOut];
    std::copy(std::begin(images.stride[kMomentumOut]), std::end(images.stride[kMomentumOut]),
              images.stride[kGrad]);
  }
  if (step.norm == StepNorm::l2) {
    launch_l2(dtype, images, step.batch, numbers, sums, stream);
  } else {
    launch_l1(dtype, images, step.batch, numbers, step.quantile, scratch.deltas, stream);
  }
}

}  // namespace pyvit::cuda
