// The three products of patch_embed_products.h.
//
// Slabs are 128 bytes of terms: deep where an operand's lines are the terms of a sum, wide where
// they are its rows. Sums leave through shared memory, so that neighbouring threads write
// neighbouring elements.
#pragma once

#include <type_traits>

#include "cuda/patch_embed_products.h"

namespace pyvit::cuda {
namespace {  // compiled for its kinds by each file that includes it

constexpr int kStages = 3;
constexpr int kSlabBytes = 128;  // of the terms of a sum

// Blocks that have to fit on a multiprocessor: of 128 registers a thread; of up to twice that for
// fused products and where pixels are made, which wait in registers.
template <class P, class From = void>
constexpr int kTogether =
    (P::kFused                    ? 256
     : std::is_void_v<From>       ? 512
     : P::kM * P::kN == 128 * 128 ? 256
                                  : 384) / P::kThreads;

template <class Kind>
constexpr int kTermsOf = kSlabBytes / static_cast<int>(sizeof(typename Kind::Element));

// Shared memory of a block: the stages of both slabs; afterwards the tile's sums.
template <class P, class A, class B>
struct Shared {
  static constexpr int kPitch = P::kN + 8;
  static constexpr int kSlabs = A::kBytes + B::kBytes;
  static constexpr size_t kBytes = kStages * kSlabs;
  static_assert(P::kM * kPitch * 4 <= kStages * kSlabs, "the sums have the slabs' memory");

  char* memory = dynamic_shared<char>();

  __device__ A a(int stage) const { return {memory + stage * kSlabs}; }
  __device__ B b(int stage) const { return {memory + stage * kSlabs + A::kBytes}; }
  __device__ float* sums(int row) const { return reinterpret_cast<float*>(memory) + row * kPitch; }
};

template <class P, class A, class B, class BringA, class BringB>
__device__ P multiply(const Shared<P, A, B>& shared, int slabs, BringA bring_a, BringB bring_b) {
  P product;
  product.clear();
  pipeline<kStages>(
      slabs,
      [&](int slab, int stage) {
        bring_a.start(slab, shared.a(stage));
        bring_b.start(slab, shared.b(stage));
      },
      [&](int stage) {
        bring_a.finish(shared.a(stage));
        bring_b.finish(shared.b(stage));
      },
      [&](int stage) { product.add(shared.a(stage), shared.b(stage)); });
  return product;
}

__device__ int ceil_divide(int n, int by) { return (n + by - 1) / by; }

// f(row, column) for every chunk of kCount elements of a tile's sums, which are in shared memory
// when it is called: chunks of a row two by two, the next rows, then the row's next two.
template <int kCount, class P, class A, class B, class F>
__device__ void for_each_chunk(const P& product, const Shared<P, A, B>& shared, const F& f) {
  product.for_each([&](int row, int column, float sum) { shared.sums(row)[column] = sum; });
  __syncthreads();
  static_assert(P::kN % (2 * kCount) == 0, "chunks two by two");
#pragma unroll 1
  for (int i = threadIdx.x; i < P::kM * (P::kN / kCount); i += P::kThreads) {
    f(i / 2 % P::kM, (i / 2 / P::kM * 2 + i % 2) * kCount);
  }
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T values[kCount];
};

// to[i] += from[i]
template <class T, int kCount>
__device__ void add_terms(float (&to)[kCount], const T* from, int count, bool vectors) {
  if (vectors) {
    const auto v = *reinterpret_cast<const Vector<T, kCount>*>(from);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] += widen(v.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] += widen(from[i]);
    }
  }
}

template <class T, int kCount>
__device__ void write(T* to, const float (&values)[kCount], int count, bool vectors) {
  if (vectors) {
    Vector<T, kCount> v;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v.values[i] = narrow<T>(values[i]);
    *reinterpret_cast<Vector<T, kCount>*>(to) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] = narrow<T>(values[i]);
    }
  }
}

// ---- forward

// From: what pixels are made of; void: they are copied.
template <class S, class E, class From, int kThreads>
struct BringOf {
  using type = Normalise<S, E, From, kThreads>;
};
template <class S, class E, int kThreads>
struct BringOf<S, E, void, kThreads> {
  using type = Copy<S, E, kThreads>;
};

template <class P, class Kind, class From>
__global__ void __launch_bounds__(P::kThreads, kTogether<P, From>)
    tokens_kernel(TokenSums call, Divisor across) {
  using E = typename Kind::Element;
  using A = Slab<E, P::kM, kTermsOf<Kind>, true>;
  using B = Slab<E, P::kN, kTermsOf<Kind>, true>;
  const Quotient tile(static_cast<int>(blockIdx.x), across);
  const int first_token = tile.quotient * P::kM, first_feature = tile.rest * P::kN;
  const int dim = call.weights.lines;
  const Shared<P, A, B> shared;
  using BringA = typename BringOf<A, E, From, P::kThreads>::type;
  const P product = multiply<P>(
      shared, ceil_divide(call.patches.elements, kTermsOf<Kind>),
      BringA(call.patches, first_token, call.patches.lines, 0),
      Copy<B, E, P::kThreads>(call.weights, first_feature, dim, 0));

  constexpr int kCount = A::kChunk;
  const E* bias = static_cast<const E*>(call.bias);
  const E* position = static_cast<const E*>(call.position);
  const E* class_token = static_cast<const E*>(call.class_token);
  const int first = class_token != nullptr, of_image = call.patches.lines_of_image.by;
  for_each_chunk<kCount>(product, shared, [&](int row, int column) {
    const int t = first_token + row, d = first_feature + column;
    if (t >= call.patches.lines || d >= dim) return;
    const Quotient image(t, call.patches.lines_of_image);
    const int token = image.rest + first, count = min(dim - d, kCount);
    float values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = shared.sums(row)[column + i];
    if (bias) add_terms(values, bias + d, count, call.vectors);
    if (position) {
      add_terms(values, position + int64_t{token} * dim + d, count, call.vectors);
    }
    const int64_t first_row = int64_t{image.quotient} * (of_image + first);
    E* out = static_cast<E*>(call.tokens) + first_row * dim + d;
    write(out + int64_t{token} * dim, values, count, call.vectors);
    if (class_token && image.rest == 0) {  // whoever has an image's first patch
#pragma unroll
      for (float& value : values) value = 0.0f;
      add_terms(values, class_token + d, count, call.vectors);
      if (position) add_terms(values, position + d, count, call.vectors);
      write(out, values, count, call.vectors);
    }
  });
}

// ---- the image's gradient

template <class P, class Kind>
__global__ void __launch_bounds__(P::kThreads, kTogether<P>)
    image_kernel(ImageSums call, Divisor across) {
  using E = typename Kind::Element;
  using A = Slab<E, P::kM, kTermsOf<Kind>, true>;
  using B = Slab<E, P::kN, kTermsOf<Kind>, false>;
  const Quotient tile(static_cast<int>(blockIdx.x), across);
  const int first_token = tile.quotient * P::kM, first_pixel = tile.rest * P::kN;
  const Operand& image = call.image;
  const Shared<P, A, B> shared;
  const P product = multiply<P>(
      shared, ceil_divide(call.weights.lines, kTermsOf<Kind>),
      Copy<A, E, P::kThreads>(call.grads, first_token, image.lines, 0),
      Copy<B, E, P::kThreads>(call.weights, 0, call.weights.lines, first_pixel));

  constexpr int kCount = A::kChunk;
  E* out = static_cast<E*>(const_cast<void*>(image.data));
  for_each_chunk<kCount>(product, shared, [&](int row, int column) {
    const int t = first_token + row, k = first_pixel + column;
    if (t >= image.lines || k >= image.elements) return;
    float sums[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = shared.sums(row)[column + i];
    E* to = out + image.line(t);
    with_unit<E>(image.unit, [&](auto unit) {
      constexpr int kUnit = unit.value;
#pragma unroll
      for (int i = 0; i < kCount; i += kUnit) {
        if (k + i >= image.elements) return;
        float values[kUnit], factor = 1.0f;
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          if (image.std && (j == 0 || image.channel_inside)) {
            factor = Normal(image, image.channel(k + i + j)).factor;
          }
          values[j] = sums[i + j] * factor;
        }
        write(to + image.element(k + i), values, kUnit, true);
      }
    });
  });
}

// ---- the weight's gradient

template <class P, class Kind, class From>
__global__ void __launch_bounds__(P::kThreads, kTogether<P, From>)
    weights_kernel(WeightSums call, Divisor across, Divisor down) {
  using E = typename Kind::Element;
  using A = Slab<E, P::kM, kTermsOf<Kind>, false>;
  using B = Slab<E, P::kN, kTermsOf<Kind>, false>;
  const Quotient above(static_cast<int>(blockIdx.x), across), part(above.quotient, down);
  const int first_feature = part.rest * P::kM, first_pixel = above.rest * P::kN;
  const int first = part.quotient * call.each, end = min(first + call.each, call.grads.lines);
  const int dim = call.grads.elements, pixels = call.patches.elements;
  const Shared<P, A, B> shared;
  using BringB = typename BringOf<B, E, From, P::kThreads>::type;
  const P product = multiply<P>(
      shared, ceil_divide(max(end - first, 0), kTermsOf<Kind>),
      Copy<A, E, P::kThreads>(call.grads, first, end, first_feature),
      BringB(call.patches, first, end, first_pixel));

  float* sums = call.sums + int64_t{part.quotient} * dim * pixels;
  product.for_each([&](int row, int column, float sum) {
    const int d = first_feature + row, k = first_pixel + column;
    if (d < dim && k < pixels) sums[int64_t{d} * pixels + k] = sum;
  });
}

// ---- launches

constexpr const char* kName = "patch_embed";
constexpr int64_t kEnough = 100;  // blocks: nearly one for each multiprocessor

inline int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

template <class Kind, bool kDeepA, bool kDeepB>
using Large = Product<Kind, 128, kIsFused<Kind> ? 64 : 128, kIsFused<Kind> ? 4 : 2,
                      kIsFused<Kind> ? 2 : 4, kDeepA, kDeepB>;
template <class Kind, bool kDeepA, bool kDeepB>
using Small = Product<Kind, 64, 64, 2, 2, kDeepA, kDeepB>;

template <class P, class Kind, bool kDeepA, bool kDeepB>
constexpr size_t kSharedBytes =
    Shared<P, Slab<typename Kind::Element, P::kM, kTermsOf<Kind>, kDeepA>,
           Slab<typename Kind::Element, P::kN, kTermsOf<Kind>, kDeepB>>::kBytes;

template <class P, class Kind>
void sum_tokens_in(const TokenSums& call, void* stream) {
  using E = typename Kind::Element;
  const int64_t across = tiles(call.weights.lines, P::kN);
  const auto kernel = call.pixels == Pixels::copied ? tokens_kernel<P, Kind, void>
                      : call.pixels == Pixels::made ? tokens_kernel<P, Kind, E>
                                                    : tokens_kernel<P, Kind, uint8_t>;
  launch(kName, kernel, across * tiles(call.patches.lines, P::kM), P::kThreads,
         kSharedBytes<P, Kind, true, true>, stream, call, Divisor(across));
}

template <class P, class Kind>
void sum_image_in(const ImageSums& call, void* stream) {
  const int64_t across = tiles(call.image.elements, P::kN);
  launch("patch_embed_image_grad", image_kernel<P, Kind>,
         across * tiles(call.image.lines, P::kM), P::kThreads,
         kSharedBytes<P, Kind, true, false>, stream, call, Divisor(across));
}

template <class P, class Kind>
void sum_weights_in(const WeightSums& call, void* stream) {
  using E = typename Kind::Element;
  const int64_t across = tiles(call.patches.elements, P::kN);
  const int64_t down = tiles(call.grads.elements, P::kM);
  const auto kernel = call.pixels == Pixels::copied ? weights_kernel<P, Kind, void>
                      : call.pixels == Pixels::made ? weights_kernel<P, Kind, E>
                                                    : weights_kernel<P, Kind, uint8_t>;
  launch("patch_embed_weight_grad", kernel, across * down * call.parts, P::kThreads,
         kSharedBytes<P, Kind, false, false>, stream, call, Divisor(across), Divisor(down));
}

// Whether large tiles give all multiprocessors work, and fit on one: sm_86 and sm_89 have 99 KB.
template <class P, class Kind, bool kDeepA, bool kDeepB>
bool suits(int64_t rows, int64_t columns) {
  return columns > 64 && tiles(rows, 128) * tiles(columns, 128) >= kEnough &&
         kSharedBytes<P, Kind, kDeepA, kDeepB> <= most_shared_memory();
}

}  // namespace

// Sums are made in the same order in tiles of any size: the choice may depend on the batch.
template <class Kind>
void sum_tokens(const TokenSums& call, void* stream) {
  using P = Large<Kind, true, true>;
  if (suits<P, Kind, true, true>(call.patches.lines, call.weights.lines)) {
    return sum_tokens_in<P, Kind>(call, stream);
  }
  sum_tokens_in<Small<Kind, true, true>, Kind>(call, stream);
}

template <class Kind>
void sum_image(const ImageSums& call, void* stream) {
  using P = Large<Kind, true, false>;
  if (suits<P, Kind, true, false>(call.image.lines, call.image.elements)) {
    return sum_image_in<P, Kind>(call, stream);
  }
  sum_image_in<Small<Kind, true, false>, Kind>(call, stream);
}

template <class Kind>
void sum_weights(const WeightSums& call, void* stream) {
  using P = Large<Kind, false, false>;
  if (call.grads.elements > 64 && call.patches.elements > 64 &&
      kSharedBytes<P, Kind, false, false> <= most_shared_memory()) {
    return sum_weights_in<P, Kind>(call, stream);
  }
  sum_weights_in<Small<Kind, false, false>, Kind>(call, stream);
}

}  // namespace pyvit::cuda
