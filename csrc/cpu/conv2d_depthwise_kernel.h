// C[pixel] = base + Σ_k A[pixel, k] · W[k] for a few pixels of one image row, lane by lane: each
// lane is a destination channel, and A holds in it what that channel reads
// (conv2d_depthwise_band.h). Where a group has few channels, no lane is idle, as it would be if a
// group were a matrix product.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd.h"

namespace pyvit {

// Where A has what a vector's lanes meet: in a vector; in half of one, each element for two lanes;
// in some lanes of one or of two, brought to their places; or in one element for all lanes. From
// `few` on, C may have but some lanes.
enum class LaneSource { straight, twice, few, pair, one };

template <class T>
struct LaneTile {
  static constexpr int pixels = 14;  // a sum each, and one vector of weights

  // Sums run over slots (the source channels of a group), kernel rows and kernel columns. Strides
  // are in elements; the weights of a row's taps lie side by side.
  struct Arguments {
    const T* a;
    int64_t pitch;  // from the window of one pixel to the next
    const T* weights;
    int64_t slots, rows, taps;
    int64_t slot_stride, row_stride, tap_stride;
    int64_t weight_slot_stride, weight_row_stride;
    const T* base;
    int64_t base_pitch;
    T* c;
    int64_t c_pitch;
    LaneSource from = LaneSource::straight;
    // From `few` on: the lanes that A and C have, and which of A's each lane takes for slot 0;
    // those of the other slots follow.
    int64_t sources = 0, lanes = 0;
    const int32_t* place = nullptr;
  };
  using Kernel = void (*)(const Arguments&);
};

#if defined(PYVIT_HAS_LANE_MASKS)
template <class T>
inline constexpr bool kHasFewLanes = std::is_same_v<T, float>;
#else
template <class T>
inline constexpr bool kHasFewLanes = false;
#endif

// Elements 0, 0, 1, 1, … of p.
template <class T, int... Lane>
inline Vec<T> load_twice(const T* p, std::integer_sequence<int, Lane...>) {
#if defined(__AVX512F__)
  const Vec<T> half = (Vec<T>)_mm512_castps256_ps512(_mm256_loadu_ps((const float*)p));
#elif defined(__AVX2__)
  const Vec<T> half = (Vec<T>)_mm256_castps128_ps256(_mm_loadu_ps((const float*)p));
#else
  Vec<T> half{};
  std::memcpy(&half, p, sizeof(half) / 2);
#endif
  return shuffle_lanes<T, (Lane / 2)...>(half, half);
}

// Pixels are `Step` vectors apart, or `pitch` where Step is 0: x86 addresses reach a pointer and
// {1, 2} times that, so every third pixel then has a pointer of its own.
template <class T, int Step, LaneSource From, int... Pixel>
inline void lane_kernel(const typename LaneTile<T>::Arguments& g,
                        std::integer_sequence<int, Pixel...>) {
  constexpr int L = kLanes<T>, pixels = sizeof...(Pixel);
  constexpr int bases = Step > 0 ? 1 : (pixels + 2) / 3, reach = Step > 0 ? pixels : 3;
  const int64_t pitch = (Step > 0 ? Step * L : g.pitch) * static_cast<int64_t>(sizeof(T));
  const int64_t tap_stride = g.tap_stride * static_cast<int64_t>(sizeof(T));
#if defined(PYVIT_HAS_LANE_MASKS)
  const LaneMask sources = lanes_between(0, g.sources), more = lanes_between(0, g.sources - L);
#endif
  auto load_a = [&](const char* from, [[maybe_unused]] int64_t slot) {
    const T* p = reinterpret_cast<const T*>(from);
#if defined(PYVIT_HAS_LANE_MASKS)
    if constexpr (From == LaneSource::few) return permute(load_masked(sources, p), g.place, slot);
    if constexpr (From == LaneSource::pair)
      return permute(load(p), load_masked(more, p + L), g.place, slot);
    if constexpr (From == LaneSource::one) return broadcast(*p);
#endif
    if constexpr (From == LaneSource::twice)
      return load_twice(p, std::make_integer_sequence<int, L>{});
    return load(p);
  };
  Vec<T> sum[pixels] = {};
  for (int64_t s = 0; s < g.slots; ++s) {
    for (int64_t i = 0; i < g.rows; ++i) {
      const char* a[bases];
      a[0] = reinterpret_cast<const char*>(g.a + s * g.slot_stride + i * g.row_stride);
#pragma GCC unroll 5
      for (int q = 1; q < bases; ++q) a[q] = a[q - 1] + 3 * pitch;
      const T* w = g.weights + s * g.weight_slot_stride + i * g.weight_row_stride;
      for (int64_t j = g.taps; j > 0; --j, w += L) {
        const Vec<T> wj = load(w);
        ((sum[Pixel] = fma(load_a(a[Pixel / reach] + Pixel % reach * pitch, s), wj,
                            sum[Pixel])),
         ...);
#pragma GCC unroll 5
        for (int q = 0; q < bases; ++q) {
          a[q] += tap_stride;
          asm("" : "+r"(a[q]));  // or the compiler makes it one pointer a pixel, which spills
        }
      }
    }
  }
  const T* base = g.base;
  T* c = g.c;
  const int64_t base_pitch = g.base_pitch, c_pitch = g.c_pitch;  // stores might alias g
#if defined(PYVIT_HAS_LANE_MASKS)
  if constexpr (From >= LaneSource::few) {
    const LaneMask lanes = lanes_between(0, g.lanes);
    if (g.lanes < L)
      return ((store_masked(c + Pixel * c_pitch, lanes,
                            load(base + Pixel * base_pitch) + sum[Pixel])), ...);
  }
#endif
  ((store(c + Pixel * c_pitch, load(base + Pixel * base_pitch) + sum[Pixel])), ...);
}

template <class T, int Step, LaneSource From, int Pixels>
void lane_kernel_of(const typename LaneTile<T>::Arguments& g) {
  lane_kernel<T, Step, From>(g, std::make_integer_sequence<int, Pixels>{});
}

template <class T, int Step, LaneSource From, int... Pixels>
constexpr auto lane_kernel_table(std::integer_sequence<int, Pixels...>) {
  return std::array<typename LaneTile<T>::Kernel, sizeof...(Pixels)>{
      lane_kernel_of<T, Step, From, Pixels + 1>...};
}
template <class T, int Step, LaneSource From = LaneSource::straight>
inline constexpr auto kLaneKernels =
    lane_kernel_table<T, Step, From>(std::make_integer_sequence<int, LaneTile<T>::pixels>{});

template <class T>
inline void run_lane_kernel(int64_t pixels, const typename LaneTile<T>::Arguments& g) {
  if constexpr (kHasFewLanes<T>) {
    if (g.from == LaneSource::few) return kLaneKernels<T, 0, LaneSource::few>[pixels - 1](g);
    if (g.from == LaneSource::pair) return kLaneKernels<T, 0, LaneSource::pair>[pixels - 1](g);
    if (g.from == LaneSource::one) return kLaneKernels<T, 0, LaneSource::one>[pixels - 1](g);
  }
  (g.from == LaneSource::twice ? kLaneKernels<T, 0, LaneSource::twice>
   : g.pitch == kLanes<T>     ? kLaneKernels<T, 1>
   : g.pitch == 2 * kLanes<T> ? kLaneKernels<T, 2>
                              : kLaneKernels<T, 0>)[pixels - 1](g);
}

}  // namespace pyvit
