// Convolution of images with few pixels and many channels, such as the last layers of a network:
// the weights are most of the memory, and are multiplied where they lie (conv2d_small_tiles.h).
//
//   forward         y[p, o] = Σ_e patch[p, e] · w[o, e], with e in the order of the weights
//   input gradient  dpatch[p, e] = Σ_o dy[p, o] · w[o, e], each patch then added where it was read
//
// Only taps that meet the image from some pixel take part, where the weights' order lets them be
// left out. Weights of few outputs are soon turned, and then windows of the image need no patches
// (conv2d_small_windows.h). Sums and their order depend on one image's shape and the weights alone.
#include "conv2d_small.h"

#include <algorithm>
#include <vector>

#include "conv2d_small_geometry.h"
#include "conv2d_small_tiles.h"
#include "conv2d_small_windows.h"
#include "parallel.h"

namespace pyvit {
namespace {

constexpr int64_t kMostInputPixels = 256;  // whose gradient is summed in scratch
constexpr int64_t kFewestPixels = 4;
constexpr int64_t kDotLength = 1024;       // of weights that stay in the first-level cache
constexpr int64_t kSumLength = 256;        // longest sum in registers of the gradient
constexpr int64_t kPixelBlock = 48;        // output pixels of one task

// A run of weights of every output channel, and where it begins in a row of patches.
struct Run {
  int64_t weight, length, patch;
};

template <class T>
std::vector<Run> weight_runs(const Geometry& g, int64_t* patch_length) {
  constexpr int64_t L = kLanes<T>;
  std::vector<Run> runs;
  int64_t at = 0;
  auto add = [&](int64_t weight, int64_t length) {
    for (int64_t done = 0; done < length; done += kDotLength) {
      const int64_t part = std::min(kDotLength, length - done);
      runs.push_back({weight + done, part, at + done});
    }
    at += round_up(length, L);
  };
  if (!g.last) {
    add(0, g.C * g.shape.kernel[0] * g.shape.kernel[1]);
  } else {
    for (int64_t i : g.rows)
      add((i * g.shape.kernel[1] + g.columns.front()) * g.C,
          (g.columns.back() - g.columns.front() + 1) * g.C);
  }
  *patch_length = at;
  return runs;
}

// One patch in the order of weight_runs.
template <class T, class S>
void pack_patch(T* to, const Geometry& g, const S* image, const int64_t stride[4], int64_t pixel) {
  constexpr int64_t L = kLanes<T>;
  const int64_t oh = pixel / g.shape.out_width, ow = pixel % g.shape.out_width;
  if (g.last) {
    for (int64_t i : g.rows) {
      const int64_t h = g.input(0, oh, i);
      T* begin = to;
      for (int64_t j = g.columns.front(); j <= g.columns.back(); ++j, to += g.C) {
        const int64_t w = g.input(1, ow, j);
        const S* from = image + h * stride[2] + w * stride[3];
        if (h < 0 || w < 0) {
          std::fill(to, to + g.C, T(0));
        } else if (stride[1] == 1) {
          widen_run(to, from, g.C);
        } else {
          for (int64_t c = 0; c < g.C; ++c) to[c] = widen(from[c * stride[1]]);
        }
      }
      T* end = begin + round_up(to - begin, L);
      std::fill(to, end, T(0));
      to = end;
    }
    return;
  }
  const int64_t columns = g.shape.kernel[1], taps = g.shape.kernel[0] * columns;
  T* const begin = to;
  std::fill(begin, begin + round_up(g.C * taps, L), T(0));
  for (int64_t i : g.rows) {
    const int64_t h = g.input(0, oh, i);
    if (h < 0) continue;
    for (int64_t j : g.columns) {
      const int64_t w = g.input(1, ow, j);
      if (w < 0) continue;
      const S* from = image + h * stride[2] + w * stride[3];
      T* dst = begin + i * columns + j;
      for (int64_t c = 0; c < g.C; ++c) dst[c * taps] = widen(from[c * stride[1]]);
    }
  }
}

template <class S>
bool forward(Conv2dShape shape, View4 x, View4 w, const S* bias, View4 y) {
  using T = Compute<S>;
  using Tile = DotTile<T>;
  const bool whole = flatten_whole_image(shape, x, w);
  const Geometry g(shape, w, whole);
  if (const WindowProduct<S> windows(g); windows.possible) {
    windows.run(x, w, bias, y);
    return true;
  }
  if (!g.pays(shape.out_width < 4, g.C)) return false;
  int64_t length;
  const std::vector<Run> runs = weight_runs<T>(g, &length);
  const int64_t element = sizeof(T), total = shape.batch * g.pixels;
  if (length * Tile::pixels * element > kBytes) return false;
  const int64_t fitting = std::min(kPixelBlock, kBytes / (length * element));
  const int64_t block =
      std::min(total, std::max<int64_t>(1, fitting / Tile::pixels) * Tile::pixels);
  const int64_t pixel_blocks = ceil_div(total, block);
  const int64_t wanted =
      std::max<int64_t>(1, ceil_div(2 * thread_count() - 1, pixel_blocks * shape.groups));
  const int64_t width = std::min<int64_t>(1024, round_up(ceil_div(g.O, wanted), Tile::rows));
  const int64_t channel_blocks = ceil_div(g.O, width);
  parallel_for(shape.groups * pixel_blocks * channel_blocks, [&](int64_t task) {
    const int64_t o0 = task % channel_blocks * width, count = std::min(width, g.O - o0);
    const int64_t p0 = task / channel_blocks % pixel_blocks * block;
    const int64_t pixels = std::min(block, total - p0);
    const int64_t group = task / channel_blocks / pixel_blocks, first = group * g.O + o0;
    Scratch scratch(Scratch::bytes_for<T>(block * length) + Scratch::bytes_for<T>(block * width) +
                    Scratch::bytes_for<T>(Tile::rows * kDotLength));
    T* patches = scratch.take<T>(block * length);
    T* sums = scratch.take<T>(block * width);
    T* widened = scratch.take<T>(Tile::rows * kDotLength);
    const S* image = static_cast<const S*>(x.data) + group * g.C * x.stride[1];
    for (int64_t p = 0; p < pixels; ++p) {
      pack_patch(patches + p * length, g, image + (p0 + p) / g.pixels * x.stride[0], x.stride,
                 (p0 + p) % g.pixels);
      for (int64_t o = 0; o < count; ++o)
        sums[p * width + o] = bias == nullptr ? T(0) : widen(bias[first + o]);
    }
    const S* weights = static_cast<const S*>(w.data) + first * w.stride[0];
    typename Tile::Arguments tile;
    tile.pitch = length;
    tile.c_pitch = width;
    for (const Run& run : runs) {
      tile.length = run.length;
      for (int64_t o = 0; o < count; o += Tile::rows) {
        tile.row_count = std::min<int64_t>(Tile::rows, count - o);
        for (int64_t r = 0; r < Tile::rows; ++r) {
          const S* row =
              weights + (o + std::min(r, tile.row_count - 1)) * w.stride[0] + run.weight;
          if constexpr (std::is_same_v<S, T>) {
            tile.w[r] = row;
          } else {
            tile.w[r] = widened + r * kDotLength;
            widen_run(widened + r * kDotLength, row, run.length);
          }
        }
        for (int64_t p = 0; p < pixels;) {
          const int64_t parts = ceil_div(pixels - p, Tile::pixels), n = (pixels - p) / parts;
          tile.a = patches + p * length + run.patch;
          tile.c = sums + p * width + o;
          kDotKernels<T>[n - 1](tile);
          p += n;
        }
      }
    }
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t pixel = (p0 + p) % g.pixels;
      S* out = static_cast<S*>(y.data) + (p0 + p) / g.pixels * y.stride[0] + first * y.stride[1] +
               pixel / shape.out_width * y.stride[2] + pixel % shape.out_width * y.stride[3];
      for (int64_t o = 0; o < count; ++o) out[o * y.stride[1]] = narrow<S>(sums[p * width + o]);
    }
  });
  return true;
}

// Some of the weights' elements that meet one channel block: `count` of them from `weight` on. With
// channels last they are channels of one tap, else all taps of a few channels.
struct Strip {
  int64_t weight, channel, row, column, count;
};

inline std::vector<Strip> strips(const Geometry& g, int64_t first, int64_t count, int64_t width) {
  const int64_t columns = g.shape.kernel[1], taps = g.shape.kernel[0] * columns;
  std::vector<Strip> all;
  if (!g.last) {
    for (int64_t e = first * taps; e < (first + count) * taps; e += width)
      all.push_back({e, e / taps, e % taps / columns, e % columns,
                     std::min(width, (first + count) * taps - e)});
    return all;
  }
  for (int64_t i : g.rows)
    for (int64_t j : g.columns)
      for (int64_t c = first; c < first + count; c += width)
        all.push_back({(i * columns + j) * g.C + c, c, i, j, std::min(width, first + count - c)});
  return all;
}

// The gradient of some channels of some images: sum[image][row][column][channel].
template <class T>
struct ImageSums {
  const Geometry& g;
  T* sum;
  int64_t first, count;  // channels

  void add(const Strip& strip, const T* patch, int64_t image, int64_t pixel) const {
    const int64_t oh = pixel / g.shape.out_width, ow = pixel % g.shape.out_width;
    T* of_image = sum + image * g.shape.height * g.shape.width * count;
    auto at = [&](int64_t h, int64_t w) { return of_image + (h * g.shape.width + w) * count; };
    int64_t h = g.input(0, oh, strip.row);
    if (g.last) {
      const int64_t w = g.input(1, ow, strip.column);
      if (h >= 0 && w >= 0) add_run(at(h, w) + strip.channel - first, patch, strip.count);
      return;
    }
    int64_t channel = strip.channel - first, i = strip.row, j = strip.column;
    for (int64_t e = 0; e < strip.count; ++e) {
      const int64_t w = g.input(1, ow, j);
      if (h >= 0 && w >= 0) at(h, w)[channel] += patch[e];
      if (++j < g.shape.kernel[1]) continue;
      j = 0;
      if (++i == g.shape.kernel[0]) i = 0, ++channel;
      h = g.input(0, oh, i);
    }
  }
};

template <class S>
bool input_grad(Conv2dShape shape, View4 dy, View4 w, View4 dx) {
  using T = Compute<S>;
  using Tile = StripTile<T>;
  const bool whole = flatten_whole_image(shape, dx, w);
  const Geometry g(shape, w, whole);
  const int64_t element = sizeof(T), in_pixels = shape.height * shape.width;
  // Planar weights of few channels: to turn them would repay more pixels.
  const bool joined = !g.last && g.pixels <= kFewestPixels;
  const int64_t run = joined ? g.C * shape.kernel[0] * shape.kernel[1] : g.C;
  // Each product is added to memory: it must be a long sum by then.
  if ((!whole && g.O < kManyChannels) || !g.pays(shape.width < 4 * shape.stride[1], run) ||
      in_pixels > kMostInputPixels)
    return false;
  const int64_t wanted = std::max<int64_t>(1, ceil_div(2 * thread_count() - 1, shape.groups));
  int64_t width = std::min(g.C, round_up(ceil_div(g.C, wanted), Tile::width));
  auto image_bytes = [&] {
    return (in_pixels * width + g.pixels * g.O) * element;
  };
  while (width > Tile::width && image_bytes() > kBytes) width = round_up(width / 2, Tile::width);
  if (image_bytes() > kBytes || g.O * Tile::width * element > kBytes) return false;
  const int64_t images = std::min(
      shape.batch, std::max<int64_t>(1, std::min(kPixelBlock / g.pixels, kBytes / image_bytes())));
  const int64_t image_blocks = ceil_div(shape.batch, images), channel_blocks = ceil_div(g.C, width);
  parallel_for(shape.groups * image_blocks * channel_blocks, [&](int64_t task) {
    const int64_t c0 = task % channel_blocks * width, channels = std::min(width, g.C - c0);
    const int64_t image0 = task / channel_blocks % image_blocks * images;
    const int64_t count = std::min(images, shape.batch - image0), pixels = count * g.pixels;
    const int64_t group = task / channel_blocks / image_blocks;
    Scratch scratch(Scratch::bytes_for<T>(images * g.pixels * g.O) +
                    Scratch::bytes_for<T>(images * in_pixels * width) +
                    Scratch::bytes_for<T>(g.O * Tile::width) +
                    Scratch::bytes_for<T>(Tile::pixels * Tile::width));
    T* grad = scratch.take<T>(images * g.pixels * g.O);
    const ImageSums<T> result{g, scratch.take<T>(images * in_pixels * width), c0, channels};
    T* packed = scratch.take<T>(g.O * Tile::width);
    T* product = scratch.take<T>(Tile::pixels * Tile::width);
    std::fill(result.sum, result.sum + count * in_pixels * channels, T(0));
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t pixel = p % g.pixels;
      const S* from = static_cast<const S*>(dy.data) + (image0 + p / g.pixels) * dy.stride[0] +
                      group * g.O * dy.stride[1] + pixel / shape.out_width * dy.stride[2] +
                      pixel % shape.out_width * dy.stride[3];
      for (int64_t o = 0; o < g.O; ++o) grad[p * g.O + o] = widen(from[o * dy.stride[1]]);
    }
    const S* weights = static_cast<const S*>(w.data) + group * g.O * w.stride[0];
    typename Tile::Arguments tile;
    tile.pitch = g.O;
    tile.c = product;
    for (const Strip& strip : strips(g, c0, channels, Tile::width)) {
      const T* b = packed;
      tile.b_pitch = Tile::width;
      bool in_place = false;
      if constexpr (std::is_same_v<S, T>) {
        in_place = strip.count == Tile::width;
        if (in_place) b = weights + strip.weight, tile.b_pitch = w.stride[0];
      }
      for (int64_t o = 0; o < g.O && !in_place; ++o) {
        widen_run(packed + o * Tile::width, weights + o * w.stride[0] + strip.weight, strip.count);
        std::fill(packed + o * Tile::width + strip.count, packed + (o + 1) * Tile::width, T(0));
      }
      for (int64_t p = 0; p < pixels;) {
        const int64_t parts = ceil_div(pixels - p, Tile::pixels), n = (pixels - p) / parts;
        for (int64_t o = 0; o < g.O; o += kSumLength) {
          tile.a = grad + p * g.O + o;
          tile.b = b + o * tile.b_pitch;
          tile.length = std::min(kSumLength, g.O - o);
          kStripKernels<T>[n - 1](tile);
          for (int64_t q = p; q < p + n; ++q)
            result.add(strip, product + (q - p) * Tile::width, q / g.pixels, q % g.pixels);
        }
        p += n;
      }
    }
    const T* from = result.sum;
    for (int64_t p = 0; p < count * in_pixels; ++p, from += channels) {
      const int64_t pixel = p % in_pixels;
      S* out = static_cast<S*>(dx.data) + (image0 + p / in_pixels) * dx.stride[0] +
               (group * g.C + c0) * dx.stride[1] + pixel / shape.width * dx.stride[2] +
               pixel % shape.width * dx.stride[3];
      for (int64_t c = 0; c < channels; ++c) out[c * dx.stride[1]] = narrow<S>(from[c]);
    }
  });
  return true;
}

}  // namespace

bool conv2d_small(DType dtype, const Conv2dShape& shape, View4 x, View4 w, const void* bias,
                  View4 y) {
  bool done = false;
  dispatch(dtype, [&](auto s) {
    done = forward<decltype(s)>(shape, x, w, static_cast<const decltype(s)*>(bias), y);
  });
  return done;
}

bool conv2d_small_input_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 w, View4 dx) {
  bool done = false;
  dispatch(dtype, [&](auto s) { done = input_grad<decltype(s)>(shape, dy, w, dx); });
  return done;
}

}  // namespace pyvit
