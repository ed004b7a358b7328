// C[pixel] = base + Σ_k A[pixel, k] · W[k] for a few pixels of one image row, lane by lane: each
// lane is a destination channel, and A holds in it what that channel reads (lane_band.h).
// Where a group has few channels, no lane is idle, as it would be if a group were a matrix product.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "simd.h"

namespace pyvit {

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
  };
  using Kernel = void (*)(const Arguments&);
};

// Pixels are `Step` vectors apart, or `pitch` where Step is 0.
template <class T, int Step, int... Pixel>
inline void lane_kernel(const typename LaneTile<T>::Arguments& g,
                        std::integer_sequence<int, Pixel...>) {
  constexpr int L = kLanes<T>, pixels = sizeof...(Pixel);
  const int64_t pitch = Step > 0 ? Step * L : g.pitch;
  const int64_t tap_stride = g.tap_stride;
  Vec<T> sum[pixels] = {};
  for (int64_t s = 0; s < g.slots; ++s) {
    for (int64_t i = 0; i < g.rows; ++i) {
      const T* a = g.a + s * g.slot_stride + i * g.row_stride;
      const T* w = g.weights + s * g.weight_slot_stride + i * g.weight_row_stride;
      for (int64_t j = g.taps; j > 0; --j, a += tap_stride, w += L) {
        const Vec<T> wj = load(w);
        ((sum[Pixel] = fma(load(a + Pixel * pitch), wj, sum[Pixel])), ...);
      }
    }
  }
  const T* base = g.base;
  T* c = g.c;
  const int64_t base_pitch = g.base_pitch, c_pitch = g.c_pitch;  // stores might alias g
  ((store(c + Pixel * c_pitch, load(base + Pixel * base_pitch) + sum[Pixel])), ...);
}

template <class T, int Step, int Pixels>
void lane_kernel_of(const typename LaneTile<T>::Arguments& g) {
  lane_kernel<T, Step>(g, std::make_integer_sequence<int, Pixels>{});
}

template <class T, int Step, int... Pixels>
constexpr auto lane_kernel_table(std::integer_sequence<int, Pixels...>) {
  return std::array<typename LaneTile<T>::Kernel, sizeof...(Pixels)>{
      lane_kernel_of<T, Step, Pixels + 1>...};
}
template <class T, int Step>
inline constexpr auto kLaneKernels =
    lane_kernel_table<T, Step>(std::make_integer_sequence<int, LaneTile<T>::pixels>{});

template <class T>
inline void run_lane_kernel(int64_t pixels, const typename LaneTile<T>::Arguments& g) {
  const int64_t step = g.pitch / kLanes<T>;
  (step == 1   ? kLaneKernels<T, 1>
   : step == 2 ? kLaneKernels<T, 2>
               : kLaneKernels<T, 0>)[pixels - 1](g);
}

}  // namespace pyvit
