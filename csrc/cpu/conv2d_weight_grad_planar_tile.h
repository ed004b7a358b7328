// The innermost product of the planar weight gradient: a tile of output channels × patch elements,
// whose pixels lie side by side in the lanes.
#pragma once

#include <array>
#include <utility>

#include "conv2d_weight_grad_prefetch.h"
#include "simd.h"

namespace pyvit::weight_gradient {

template <class T>
using MaskBits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Images of a band and vectors of pixels in each.
struct PixelVectors {
  int64_t images, image_step, count;

  // Times that a kernel fetches something on its way through the pixels.
  static constexpr int64_t kFetchVectors = 16;
  int64_t fetches() const { return images * ceil_div(count, kFetchVectors); }
};

// sums[o · sum_step + e · L + lane] (+)= Σ_pixels dy[o][pixel] · x[pixel + offset[e]] over the
// pixels of each lane, where `mask` is on. Elsewhere dy is 0, and x may be anything.
template <class T, int Outs, int Elements>
void planar_kernel(const T* x, const int64_t* offset, const T* dy, int64_t plane_step,
                   const MaskBits<T>* mask, PixelVectors pixels, T* sums, int64_t sum_step,
                   bool accumulate, Prefetcher& next, int64_t lines) {
  constexpr int64_t L = kLanes<T>;
  using Bits = Vec<MaskBits<T>>;
  Vec<T> sum[Outs][Elements] = {};
  for (int64_t n = 0; n < pixels.images; ++n, x += pixels.image_step, dy += pixels.image_step) {
    for (int64_t k = 0, left = pixels.count; left > 0; left -= PixelVectors::kFetchVectors) {
      next.fetch(lines);
      for (int64_t some = std::min(left, PixelVectors::kFetchVectors); some > 0; --some, k += L) {
        const Bits inside = load(mask + k);
        Vec<T> b[Outs];
        for (int o = 0; o < Outs; ++o) b[o] = load(dy + o * plane_step + k);
#pragma GCC unroll 32
        for (int e = 0; e < Elements; ++e) {
          const Vec<T> a = (Vec<T>)((Bits)load(x + offset[e] + k) & inside);
          for (int o = 0; o < Outs; ++o) sum[o][e] = fma(a, b[o], sum[o][e]);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int o = 0; o < Outs; ++o) {
#pragma GCC unroll 32
    for (int e = 0; e < Elements; ++e) {
      T* to = sums + o * sum_step + e * L;
      store(to, accumulate ? load(to) + sum[o][e] : sum[o][e]);
    }
  }
}

template <class T>
using PlanarKernel = void (*)(const T*, const int64_t*, const T*, int64_t, const MaskBits<T>*,
                              PixelVectors, T*, int64_t, bool, Prefetcher&, int64_t);

// Elements of the widest tile of so many output channels: what the registers hold.
inline constexpr int kPlanarOuts = kVectorBytes == 64 ? 4 : 3;
inline constexpr int kPlanarElements[5] = {0, kVectorBytes == 64 ? 12 : 8,
                                           kVectorBytes == 64 ? 12 : 5,
                                           kVectorBytes == 64 ? 8 : 3, 6};

template <class T, int Outs, int... Elements>
constexpr auto planar_kernels(std::integer_sequence<int, Elements...>) {
  return std::array<PlanarKernel<T>, sizeof...(Elements)>{
      planar_kernel<T, Outs, Elements + 1>...};
}
template <class T, int Outs>
inline constexpr auto kPlanarKernels =
    planar_kernels<T, Outs>(std::make_integer_sequence<int, kPlanarElements[Outs]>{});

template <class T>
PlanarKernel<T> planar_kernel_for(int64_t outs, int64_t elements) {
  switch (outs) {
    case 1:
      return kPlanarKernels<T, 1>[elements - 1];
    case 2:
      return kPlanarKernels<T, 2>[elements - 1];
    case 3:
      return kPlanarKernels<T, 3>[elements - 1];
  }
  if constexpr (kPlanarOuts == 4) return kPlanarKernels<T, 4>[elements - 1];
  return nullptr;
}

// f(begin, count) for nearly equal parts of `extent`, none longer than `most`.
template <class F>
void equal_parts(int64_t extent, int64_t most, const F& f) {
  int64_t parts = ceil_div(extent, most);
  for (int64_t begin = 0; parts > 0; --parts) {
    const int64_t count = (extent - begin) / parts;
    f(begin, count);
    begin += count;
  }
}

}  // namespace pyvit::weight_gradient
