// The two products of conv2d_product.h.
//
// Over taps: a block has a tile of pixels by channels, and slabs of 128 bytes of terms, deep: the
// image's as they are found, the weight's in rows. Over pixels: a tile of out channels by terms,
// and slabs of 64 or 32 pixels, wide. Each multiprocessor of an H200 takes two blocks of the
// largest tile over taps, whose 3 stages are 108 KB. A slab of it is 2.1 MFLOP in 16 bits, 0.3 to
// 0.45 µs of the matrix units, and 32 KB from L2, 0.75 µs where that delivers 5.5 TB/s to all: of
// layers with many channels L2 is the bound, and a tile of 256 x 128 (1 block of 162 KB) would ask
// it for three quarters of that.
#pragma once

#include "cuda/conv2d_product.h"

namespace pyvit::cuda {

constexpr int kStages = 3;
constexpr int kSlabBytes = 128;  // of terms

// Blocks of a multiprocessor at once, for which registers are kept: fused products have two sums
// for each result, and what is gathered passes registers.
template <class P, bool kAsync>
constexpr int kResident =
    P::kFused || (!kAsync && P::kM * P::kN == 128 * 128) ? 1 : 512 / P::kThreads;

struct Tiling {
  Divisor across, down, groups, phases_x;
};

// The weight's rows, `channels` of them from a tile's first.
template <class S, class E, int kThreads>
__device__ void bring_weights(const S& to, const E* weights, int64_t pitch, int channels,
                              int terms, int slab) {
  constexpr int kSpan = kThreads / S::kChunks;
  const int chunk = threadIdx.x % S::kChunks;
  const int term = slab * S::kTerms + chunk * S::kChunk;
  const int left = min(max((terms - term) * static_cast<int>(sizeof(E)), 0), 16);
#pragma unroll
  for (int pass = 0; pass < S::kLines / kSpan; ++pass) {
    const int line = threadIdx.x / S::kChunks + pass * kSpan;
    const bool there = line < channels && left > 0;
    copy_async16(to.chunk(line, chunk), there ? weights + line * pitch + term : weights,
                 there ? left : 0);
  }
}

// Sums go through shared memory, so that neighbouring threads write neighbouring elements.
template <class P>
struct Stage {
  float* memory;
  bool by_channel;  // a pixel's channels side by side; else a channel's pixels
  static constexpr int kPitch = P::kN + 8, kPitchAcross = P::kM + 4;  // against bank conflicts
  static constexpr int kBytes =
      4 * (P::kM * kPitch > P::kN * kPitchAcross ? P::kM * kPitch : P::kN * kPitchAcross);

  // A loop for each order: the compiler sees then what lies side by side, and writes it at once.
  __device__ void put(const P& product) const {
    if (by_channel) {
      product.for_each([&](int m, int n, float sum) { memory[m * kPitch + n] = sum; });
    } else {
      product.for_each([&](int m, int n, float sum) { memory[n * kPitchAcross + m] = sum; });
    }
  }
};

// Where pixel p of the phase begins in the result.
__device__ inline int64_t place_of(const TapSums& a, const Source& source, int p) {
  const Quotient above(p, source.of_columns), image(above.quotient, source.of_rows);
  const int y = source.rows.first + image.rest * source.rows.every;
  const int x = source.columns.first + above.rest * source.columns.every;
  return image.quotient * a.out_stride[0] + y * a.out_stride[2] + x * a.out_stride[3];
}

// Channels side by side: a thread has a chunk of them, of every so many pixels.
template <class P>
__device__ void write_pixels(const TapSums& a, const Stage<P>& stage, const Source& source,
                             int first_pixel, int first_channel, int channels) {
  using E = typename P::Element;
  constexpr int kChunk = Chunk<E>::kSize, kAcross = P::kN / kChunk;
  const int column = threadIdx.x % kAcross * kChunk, left = channels - column;
  if (left <= 0) return;
  E* out = static_cast<E*>(a.out) + first_channel + column;
  const E* bias = static_cast<const E*>(a.bias);
  float added[kChunk] = {};
  if (bias != nullptr) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (e < left) added[e] = widen(bias[first_channel + column + e]);
    }
  }
#pragma unroll 1
  for (int pixel = threadIdx.x / kAcross; pixel < P::kM; pixel += P::kThreads / kAcross) {
    if (first_pixel + pixel >= source.end) return;
    const float* line = stage.memory + pixel * stage.kPitch + column;
    float sums[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) {
      const float4 four = reinterpret_cast<const float4*>(line)[i];
      sums[4 * i] = four.x, sums[4 * i + 1] = four.y;
      sums[4 * i + 2] = four.z, sums[4 * i + 3] = four.w;
    }
    if (bias != nullptr) {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) sums[e] += added[e];
    }
    E* to = out + place_of(a, source, first_pixel + pixel);
    if (a.vectors) {
      store16(to, Chunk<E>(sums).bits());
    } else {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        if (e < left) to[e] = narrow<E>(sums[e]);
      }
    }
  }
}

// Pixels side by side: a thread has one, of every so many channels.
template <class P>
__device__ void write_planes(const TapSums& a, const Stage<P>& stage, const Source& source,
                             int first_pixel, int first_channel, int channels) {
  using E = typename P::Element;
  static_assert(P::kThreads % P::kM == 0, "no remainder");
  const int pixel = threadIdx.x % P::kM;
  if (first_pixel + pixel >= source.end) return;
  E* out = static_cast<E*>(a.out) + place_of(a, source, first_pixel + pixel);
  const E* bias = static_cast<const E*>(a.bias);
  const int end = min(channels, P::kN);
#pragma unroll 4
  for (int column = threadIdx.x / P::kM; column < end; column += P::kThreads / P::kM) {
    float sum = stage.memory[column * stage.kPitchAcross + pixel];
    if (bias != nullptr) sum += widen(bias[first_channel + column]);
    out[(first_channel + column) * a.out_stride[1]] = narrow<E>(sum);
  }
}

template <class P, bool kAsync>
__global__ void __launch_bounds__(P::kThreads, kResident<P, kAsync>)
    taps_kernel(TapSums a, Tiling tiling) {
  using E = typename P::Element;
  constexpr int kTerms = kSlabBytes / sizeof(E);
  using Left = Slab<E, P::kM, kTerms, true>;
  using Right = Slab<E, P::kN, kTerms, true>;
  const Quotient n(blockIdx.x, tiling.across), m(n.quotient, tiling.down);
  const Quotient group(m.quotient, tiling.groups), phase(group.quotient, tiling.phases_x);
  const Axis rows = a.rows.axis(phase.quotient), columns = a.columns.axis(phase.rest);
  const Source source(a.source, rows, columns, a.rows.size_of(rows), a.columns.size_of(columns),
                      a.batch * rows.size * columns.size);
  const int first_pixel = m.rest * P::kM, first_channel = n.rest * P::kN;
  if (first_pixel >= source.end) return;

  const int64_t summed = group.rest * static_cast<int64_t>(a.source.channels);
  const E* image = static_cast<const E*>(a.from) + summed * a.source.stride[1];
  const int first_tap = rows.tap * a.columns.first_taps() + columns.tap;
  const E* weights = static_cast<const E*>(a.weights) + first_tap * a.next_phase +
                     group.rest * a.next_group + first_channel * a.pitch;
  char* memory = dynamic_shared<char>();
  const auto left = [&](int stage) {
    return Left{memory + stage * (Left::kBytes + Right::kBytes)};
  };
  const auto right = [&](int stage) {
    return Right{memory + stage * (Left::kBytes + Right::kBytes) + Left::kBytes};
  };
  P product;
  product.clear();
  Bring<Left, E, P::kThreads, kAsync> bring(image, source, first_pixel, 0,
                                            memory + kStages * (Left::kBytes + Right::kBytes));
  pipeline<kStages>(
      (source.terms + kTerms - 1) / kTerms,
      [&](int slab, int stage) {
        bring_weights<Right, E, P::kThreads>(right(stage), weights, a.pitch,
                                             a.channels - first_channel, source.terms, slab);
        bring.start(slab, left(stage));
      },
      [&](int stage) { bring.finish(left(stage)); },
      [&](int stage) { product.add(left(stage), right(stage)); });

  const Stage<P> stage{reinterpret_cast<float*>(memory), a.out_stride[1] == 1};
  stage.put(product);
  __syncthreads();
  const int channel = group.rest * a.channels + first_channel, there = a.channels - first_channel;
  if (stage.by_channel) {
    write_pixels(a, stage, source, first_pixel, channel, there);
  } else {
    write_planes(a, stage, source, first_pixel, channel, there);
  }
}

template <class P, bool kGradAsync, bool kImageAsync>
__global__ void __launch_bounds__(P::kThreads) pixels_kernel(PixelSums a, Tiling tiling) {
  using E = typename P::Element;
  constexpr int kPixels = kSlabBytes / sizeof(E);
  using Left = Slab<E, P::kM, kPixels, false>;
  using Right = Slab<E, P::kN, kPixels, false>;
  const Quotient m(blockIdx.x, tiling.down), n(m.quotient, tiling.across);
  const Quotient group(n.quotient, tiling.groups);
  const int part = group.quotient, first = part * a.each;
  const int last = min(first + a.each, a.pixels);
  const Axis rows = a.rows.axis(0), columns = a.columns.axis(0);
  const Source image(a.image, rows, columns, a.rows.sizes[0], a.columns.sizes[0], last);
  // The gradient is read where it lies: one tap, its own pixel.
  const Axis own_rows = {rows.size, 0, 1, 1, 0, 1, 1, 0, 1};
  const Axis own_columns = {columns.size, 0, 1, 1, 0, 1, 1, 0, 1};
  const Source grad(a.grad, own_rows, own_columns, a.rows.sizes[0], a.columns.sizes[0], last);

  const int64_t of_group = group.rest;
  const E* from_grad = static_cast<const E*>(a.of_grad) +
                       of_group * a.grad.channels * a.grad.stride[1];
  const E* from_image = static_cast<const E*>(a.of_image) +
                        of_group * a.image.channels * a.image.stride[1];
  char* memory = dynamic_shared<char>();
  const auto left = [&](int stage) {
    return Left{memory + stage * (Left::kBytes + Right::kBytes)};
  };
  const auto right = [&](int stage) {
    return Right{memory + stage * (Left::kBytes + Right::kBytes) + Left::kBytes};
  };
  const int first_row = m.rest * P::kM, first_column = n.rest * P::kN;
  P product;
  product.clear();
  using BringGrad = Bring<Left, E, P::kThreads, kGradAsync>;
  using BringImage = Bring<Right, E, P::kThreads, kImageAsync>;
  char* tables = memory + kStages * (Left::kBytes + Right::kBytes);
  BringGrad of_grad(from_grad, grad, first, first_row, tables);
  BringImage of_image(from_image, image, first, first_column, tables + BringGrad::kTableBytes);
  pipeline<kStages>(
      (max(last - first, 0) + kPixels - 1) / kPixels,
      [&](int slab, int stage) {
        of_grad.start(slab, left(stage));
        of_image.start(slab, right(stage));
      },
      [&](int stage) {
        of_grad.finish(left(stage));
        of_image.finish(right(stage));
      },
      [&](int stage) { product.add(left(stage), right(stage)); });

  const int64_t before = (static_cast<int64_t>(part) * a.groups + group.rest) * a.channels;
  float* sums = a.sums + before * a.terms;
  product.for_each([&](int row, int column, float sum) {
    const int o = first_row + row, k = first_column + column;
    if (o < a.channels && k < a.terms) sums[static_cast<int64_t>(o) * a.terms + k] = sum;
  });
}

// ---- launches

inline int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Bytes of a block's stages, which Bring's tables follow; slabs are deep over taps, wide over pixels.
template <class Kind, int kM, int kN, bool kDeep>
constexpr size_t shared_bytes() {
  using E = typename Kind::Element;
  constexpr int kTerms = kSlabBytes / sizeof(E);
  return kStages * (Slab<E, kM, kTerms, kDeep>::kBytes + Slab<E, kN, kTerms, kDeep>::kBytes);
}

template <int kThreads>
constexpr size_t kTableOf = kThreads * sizeof(Term);  // at most, where chunks are gathered

// A block of sm_86 or sm_89 has at most 99 KB, the largest tile takes 102 or 108.
template <class Kind, bool kDeep>
bool takes_large_tiles() {
  return shared_bytes<Kind, 128, 128, kDeep>() <= most_shared_memory();
}

template <class Kind, int kM, int kN, int kWarpsM, int kWarpsN>
void sum_over_taps_in(const TapSums& a, void* stream) {
  using P = Product<Kind, kM, kN, kWarpsM, kWarpsN>;
  constexpr size_t kShared = shared_bytes<Kind, kM, kN, true>();
  static_assert(Stage<P>::kBytes <= kShared, "the result's stage has the slabs' memory");
  const int64_t pixels = static_cast<int64_t>(a.batch) * a.rows.sizes[0].by * a.columns.sizes[0].by;
  const int64_t across = tiles(a.channels, kN), down = tiles(pixels, kM);
  const Tiling tiling{Divisor(across), Divisor(down), Divisor(a.groups),
                      Divisor(a.columns.phases)};
  const int64_t blocks = across * down * a.groups * a.rows.phases * a.columns.phases;
  launch("conv2d", a.copies ? taps_kernel<P, true> : taps_kernel<P, false>, blocks, P::kThreads,
         kShared + (a.copies ? 0 : kTableOf<P::kThreads>), stream, a, tiling);
}

// The largest tile that gives every multiprocessor something to do. Sums are made in the same
// order in all of them: the choice may depend on the batch.
template <class Kind>
void sum_over_taps(const TapSums& a, void* stream) {
  constexpr int64_t kEnough = 200;
  const int64_t pixels = static_cast<int64_t>(a.batch) * a.rows.sizes[0].by * a.columns.sizes[0].by;
  const int64_t down = tiles(pixels, 128) * a.groups * a.rows.phases * a.columns.phases;
  if (a.channels > 64 && down * tiles(a.channels, 128) >= kEnough &&
      takes_large_tiles<Kind, true>()) {
    return sum_over_taps_in<Kind, 128, 128, 2, 4>(a, stream);
  }
  if (down * tiles(a.channels, 64) >= kEnough) {
    return sum_over_taps_in<Kind, 128, 64, 4, 2>(a, stream);
  }
  sum_over_taps_in<Kind, 64, 64, 2, 2>(a, stream);
}

template <class Kind, int kM, int kN, int kWarpsM, int kWarpsN>
void sum_over_pixels_in(const PixelSums& a, void* stream) {
  using P = Product<Kind, kM, kN, kWarpsM, kWarpsN, false, false>;
  constexpr size_t kShared = shared_bytes<Kind, kM, kN, false>();
  const int64_t down = tiles(a.channels, kM), across = tiles(a.terms, kN);
  const Tiling tiling{Divisor(across), Divisor(down), Divisor(a.groups), Divisor(1)};
  auto kernel = pixels_kernel<P, false, false>;
  if (a.grad_copies && a.image_copies) kernel = pixels_kernel<P, true, true>;
  if (a.grad_copies && !a.image_copies) kernel = pixels_kernel<P, true, false>;
  if (!a.grad_copies && a.image_copies) kernel = pixels_kernel<P, false, true>;
  const size_t tables = kTableOf<P::kThreads> * (!a.grad_copies + !a.image_copies);
  launch("conv2d", kernel, down * across * a.groups * a.parts, P::kThreads, kShared + tables,
         stream, a, tiling);
}

template <class Kind>
void sum_over_pixels(const PixelSums& a, void* stream) {
  if (a.channels > 64 && a.terms > 64 && takes_large_tiles<Kind, false>()) {
    return sum_over_pixels_in<Kind, 128, 128, 2, 4>(a, stream);
  }
  sum_over_pixels_in<Kind, 64, 64, 2, 2>(a, stream);
}

}  // namespace pyvit::cuda
