// Pixels as the vector side of gemm.h: B[k, n] is channel k of destination pixel n.
#pragma once

#include "gemm.h"
#include "patches.h"
#include "transpose.h"

namespace pyvit {

// `data` has the strides (batch, channel, row, column); `grid` is its rows and columns.
template <class S>
void pack_pixel_strips(Compute<S>* dst, const S* data, const int64_t stride[4],
                       const int64_t grid[2], int64_t k0, int64_t kb, int64_t n0, int64_t nb) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  // f(strip, lane, pixel of the run, count) for the pieces of a run that lie in one strip.
  auto pieces = [](const PixelRun& run, const auto& f) {
    for (int64_t t = 0; t < run.count;) {
      const int64_t lane = (run.at + t) % NR, count = std::min(NR - lane, run.count - t);
      f(run.at + t - lane, lane, t, count);
      t += count;
    }
  };
  for_each_run(grid, n0, nb, [&](const PixelRun& run) {
    const S* from = data + run.image * stride[0] + k0 * stride[1] + run.row * stride[2] +
                    run.column * stride[3];
    if (stride[3] == 1) {  // a channel's run is read in one go, as memory likes it
      for (int64_t k = 0; k < kb; ++k, from += stride[1])
        pieces(run, [&](int64_t strip, int64_t lane, int64_t t, int64_t count) {
          widen_run(dst + strip * kb + k * NR + lane, from + t, count);
        });
    } else {
      pieces(run, [&](int64_t strip, int64_t lane, int64_t t, int64_t count) {
        transpose(dst + strip * kb + lane, NR, from + t * stride[3], stride[3], stride[1], count,
                  kb);
      });
    }
  });
  if (nb % NR == 0) return;
  T* last = dst + nb / NR * NR * kb;
  for (int64_t k = 0; k < kb; ++k) std::fill(last + k * NR + nb % NR, last + (k + 1) * NR, T(0));
}

}  // namespace pyvit
