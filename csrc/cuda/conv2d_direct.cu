// Each result by a thread's multiply-adds, without matrix units: with a channel or two in a group
// there is nothing to share but pixels, and those come from the cache. The floor is memory: every
// tensor once. A thread has a run of results side by side, so that a weight is read once for all of
// them; neighbouring threads have neighbouring runs, or where a pixel's channels lie side by side
// neighbouring channels.
#include "cuda/conv2d_direct.h"

#include <algorithm>

#include "cuda/dtypes.h"

namespace pyvit::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 4;

struct Items {
  Divisor channels, runs, rows, batch, phases_x, of_group;
  bool by_channel;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const T* from, const T* weight, const T* bias, T* out, DirectSums a, Items items,
                int64_t count) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= count) return;
  int channel, run;
  int rest = static_cast<int>(item);
  if (items.by_channel) {
    const Quotient c(rest, items.channels), r(c.quotient, items.runs);
    channel = c.rest, run = r.rest, rest = r.quotient;
  } else {
    const Quotient r(rest, items.runs);
    run = r.rest, rest = r.quotient;
  }
  const Quotient row(rest, items.rows);
  rest = row.quotient;
  if (!items.by_channel) {
    const Quotient c(rest, items.channels);
    channel = c.rest, rest = c.quotient;
  }
  const Quotient image(rest, items.batch), phase(image.quotient, items.phases_x);
  const Axis rows = a.rows.axis(phase.quotient), columns = a.columns.axis(phase.rest);
  if (row.rest >= rows.size || run * kRun >= columns.size) return;

  const Quotient group(channel, items.of_group);  // and the channel in it
  const SourceShape& source = a.source;
  from += image.rest * source.stride[0] +
          static_cast<int64_t>(group.quotient) * source.channels * source.stride[1];
  weight += group.quotient * a.next_group + group.rest * a.weight.stride[0] +
            rows.tap * a.weight.stride[2] + columns.tap * a.weight.stride[3];
  float sums[kRun] = {};
  const int y0 = row.rest * rows.factor + rows.offset;
  const int x0 = run * kRun * columns.factor + columns.offset;
  for (int i = 0; i < rows.taps; ++i) {
    const int y = y0 + i * rows.step;
    const T* of_row = weight + i * rows.tap_step * a.weight.stride[2];
    // A row beside the image counts as zeros, which a NaN among the weights makes visible.
    const bool in_rows = static_cast<unsigned>(y) < static_cast<unsigned>(source.height);
    for (int j = 0; j < columns.taps; ++j) {
      const int first = x0 + j * columns.step;
      for (int c = 0; c < source.channels; ++c) {
        const float w = widen(of_row[j * columns.tap_step * a.weight.stride[3] +
                                     c * a.weight.stride[1]]);
        const T* pixels = from + (y * source.stride[2] + c * source.stride[1]);
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          const int x = first + r * columns.factor;
          const bool there =
              in_rows && static_cast<unsigned>(x) < static_cast<unsigned>(source.width);
          sums[r] = fmaf(there ? widen(pixels[x * source.stride[3]]) : 0.0f, w, sums[r]);
        }
      }
    }
  }
  const float added = bias != nullptr ? widen(bias[channel]) : 0.0f;
  out += image.rest * a.out.stride[0] + channel * a.out.stride[1] +
         (rows.first + row.rest * rows.every) * a.out.stride[2];
#pragma unroll
  for (int r = 0; r < kRun; ++r) {
    const int t = run * kRun + r;
    if (t >= columns.size) break;
    const float sum = bias != nullptr ? sums[r] + added : sums[r];
    out[(columns.first + t * columns.every) * a.out.stride[3]] = narrow<T>(sum);
  }
}

// ---- the weight's gradient

constexpr int kTaps = 8;  // taps of a row that a thread sums at once

// A block sums pixels of a part for some pairs of channels (a result's and one that it sums), whose
// number `pairs` divides its threads, and for kTaps taps of a row; then adds up its threads' sums
// in halves.
template <class T>
__global__ void __launch_bounds__(kThreads)
    pixels_kernel(const T* of_grad, const T* of_image, PixelSums a, Divisor taps_across,
                  Divisor kernel_y, Divisor pair_blocks, Divisor of_group, int pairs) {
  const Quotient across(blockIdx.x, taps_across), down(across.quotient, kernel_y);
  const Quotient block(down.quotient, pair_blocks);
  const int part = block.quotient, i = down.rest, first_tap = across.rest * kTaps;
  const Axis rows = a.rows.axis(0), columns = a.columns.axis(0);
  const int summed = a.image.channels, all_pairs = a.groups * a.channels * summed;
  const int pair = block.rest * pairs + threadIdx.x % pairs;
  float sums[kTaps] = {};
  if (pair < all_pairs) {
    const Quotient o(pair, a.image.of_channels), group(o.quotient, of_group);
    of_grad += o.quotient * a.grad.stride[1];
    of_image += (static_cast<int64_t>(group.quotient) * summed + o.rest) * a.image.stride[1];
    const int last = min((part + 1) * a.each, a.pixels);
    for (int p = part * a.each + threadIdx.x / pairs; p < last; p += kThreads / pairs) {
      const Quotient above(p, a.columns.sizes[0]), image(above.quotient, a.rows.sizes[0]);
      const int y = image.rest * rows.factor + rows.offset + i * rows.step;
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(a.image.height)) continue;
      const float g = widen(of_grad[image.quotient * a.grad.stride[0] +
                                    image.rest * a.grad.stride[2] +
                                    above.rest * a.grad.stride[3]]);
      const T* row = of_image + (image.quotient * a.image.stride[0] + y * a.image.stride[2]);
      const int x0 = above.rest * columns.factor + columns.offset + first_tap * columns.step;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const int x = x0 + j * columns.step;
        if (first_tap + j < columns.taps &&
            static_cast<unsigned>(x) < static_cast<unsigned>(a.image.width)) {
          sums[j] = fmaf(g, widen(row[x * a.image.stride[3]]), sums[j]);
        }
      }
    }
  }
  float* shared = dynamic_shared<float>();
#pragma unroll
  for (int j = 0; j < kTaps; ++j) shared[j * kThreads + threadIdx.x] = sums[j];
  for (int half = kThreads / 2; half >= pairs; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        shared[j * kThreads + threadIdx.x] += shared[j * kThreads + threadIdx.x + half];
      }
    }
  }
  if (static_cast<int>(threadIdx.x) >= pairs || pair >= all_pairs) return;
  // [part, out channel, (i, j, c)]
  const Quotient o(pair, a.image.of_channels);
  float* to = a.sums + (static_cast<int64_t>(part) * a.groups * a.channels + o.quotient) * a.terms;
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    if (first_tap + j >= columns.taps) break;
    to[(i * columns.taps + first_tap + j) * summed + o.rest] = shared[j * kThreads + threadIdx.x];
  }
}

}  // namespace

void direct_sums(DType dtype, const DirectSums& call, void* stream) {
  const int64_t runs = (call.columns.sizes[0].by + kRun - 1) / kRun;
  const int64_t rows = call.rows.sizes[0].by;
  const int64_t channels = static_cast<int64_t>(call.groups) * call.channels;
  const int64_t phases = static_cast<int64_t>(call.rows.phases) * call.columns.phases;
  const int64_t of_image = phases * channels * rows * runs;
  counted("conv2d", of_image, "runs of an image's pixels");
  const int64_t most = kMostCounted / std::max<int64_t>(of_image, 1);
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t first = 0; first < call.batch; first += most) {
      const int64_t batch = std::min<int64_t>(most, call.batch - first);
      const Items items = {Divisor(channels),
                           Divisor(runs),
                           Divisor(rows),
                           Divisor(batch),
                           Divisor(call.columns.phases),
                           Divisor(call.channels),
                           call.out.stride[1] == 1};
      launch("conv2d", sums_kernel<T>, (of_image * batch + kThreads - 1) / kThreads, kThreads, 0,
             stream, static_cast<const T*>(call.from) + first * call.source.stride[0],
             static_cast<const T*>(call.weight.data), static_cast<const T*>(call.bias),
             static_cast<T*>(call.out.data) + first * call.out.stride[0], call, items,
             of_image * batch);
    }
  });
}

void direct_pixels(DType dtype, const PixelSums& call, void* stream) {
  const int kernel_y = call.rows.taps, across = (call.columns.taps + kTaps - 1) / kTaps;
  const int64_t all_pairs = static_cast<int64_t>(call.groups) * call.channels * call.image.channels;
  // Neighbouring threads have neighbouring channels where those lie side by side, else pixels.
  const int pairs = call.image.stride[1] == 1 && call.grad.stride[1] == 1 ? 32 : 1;
  const int64_t blocks = (all_pairs + pairs - 1) / pairs;
  dispatch(dtype, [&](auto element) {
    using T = decltype(element);
    launch("conv2d", pixels_kernel<T>, blocks * across * kernel_y * call.parts, kThreads,
           kTaps * kThreads * sizeof(float), stream, static_cast<const T*>(call.of_grad),
           static_cast<const T*>(call.of_image), call, Divisor(across), Divisor(kernel_y),
           Divisor(blocks), Divisor(call.channels), pairs);
  });
}

}  // namespace pyvit::cuda
