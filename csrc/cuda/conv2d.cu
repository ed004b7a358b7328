// Implicit matrix products: the column matrix is in no memory. The result and the image's gradient
// are sums over taps and channels (conv2d_taps.cuh), the weight's gradient one over pixels, in
// parts of a number that the sizes alone decide, which a second kernel adds up in their order. The
// image's gradient where patches lie side by side is patch_embed.cu's.
//
// Floor on an H200, the shapes of benchmarks/ at batch 256 in bfloat16: 3 x 3 layers of 64 channels
// and more by arithmetic (56² x 64 -> 64: 59 GFLOP, 0.08 ms dense, 0.2 GB, 0.05 ms), 1 x 1 layers
// and stems by memory. The weight is put in rows of terms, padded to chunks, by a launch of its own
// where it does not lie so: it is read and written once, a hundredth of the product's bytes from
// L2, and every copy of it is then one of 16 bytes. Groups of very few channels leave matrix units
// empty and go to conv2d_direct.cu.
#include "cuda/conv2d.h"

#include <algorithm>

#include "cuda/conv2d_direct.h"
#include "cuda/conv2d_product.h"
#include "cuda/dtypes.h"
#include "cuda/patch_embed.h"

namespace pyvit::cuda {
namespace {

constexpr int kThreads = 256;

int chunk_of(DType dtype) { return dtype == DType::f32 ? 4 : 8; }
int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// A sum's three tensors, the weight with strides by result channel, summed channel, row, column.
struct Sum {
  View4 source, weight, out;
  int64_t height, width;  // of the source
  int64_t channels, summed, groups, batch;
  int64_t next_group;  // of the weight
  AxisRule rows, columns;

  int64_t first_taps() const {  // the number of phases that have any
    return static_cast<int64_t>(rows.first_taps()) * columns.first_taps();
  }
  int64_t most_terms() const {
    return static_cast<int64_t>(rows.taps_from(0)) * columns.taps_from(0) * summed;
  }
};

AxisRule rule(const Conv2dShape& s, int axis, bool gradient) {
  const int64_t out = axis == 0 ? s.out_height : s.out_width;
  const int64_t far = s.padding[axis] + (s.kernel[axis] - 1) * s.dilation[axis] +
                      (s.stride[axis] > 1 ? (out - 1) * s.stride[axis] : 0);
  counted("conv2d", 2 * far, "half-pixels across a padded image");
  const int64_t size = gradient ? (axis == 0 ? s.height : s.width) : out;
  return AxisRule(gradient, size, s.kernel[axis], s.stride[axis], s.padding[axis],
                  s.dilation[axis]);
}

// Without the strides along which there is one index: they may be anything.
View4 lying(View4 view, int64_t batch, int64_t height, int64_t width) {
  if (batch == 1) view.stride[0] = 0;
  if (height == 1) view.stride[2] = 0;
  if (width == 1) view.stride[3] = 0;
  return view;
}

Sum forward_sum(const Conv2dShape& s, View4 x, View4 w, View4 y) {
  const int64_t channels = s.out_channels / s.groups;
  // Of an image without pixels, which is all padding, nothing is summed: there is nothing to read.
  const int64_t summed = s.height * s.width > 0 ? s.in_channels / s.groups : 0;
  return {lying(x, s.batch, s.height, s.width), w, lying(y, s.batch, s.out_height, s.out_width),
          s.height, s.width, channels, summed, s.groups, s.batch, channels * w.stride[0],
          rule(s, 0, false), rule(s, 1, false)};
}

Sum gradient_sum(const Conv2dShape& s, View4 dy, View4 w, View4 dx) {
  const int64_t summed = s.out_channels / s.groups;
  const View4 turned = {w.data, {w.stride[1], w.stride[0], w.stride[2], w.stride[3]}};
  return {lying(dy, s.batch, s.out_height, s.out_width), turned,
          lying(dx, s.batch, s.height, s.width), s.out_height, s.out_width,
          s.in_channels / s.groups, summed, s.groups, s.batch, summed * w.stride[0],
          rule(s, 0, true), rule(s, 1, true)};
}

SourceShape source_shape(const View4& view, int64_t height, int64_t width, int64_t channels) {
  SourceShape shape;
  std::copy(view.stride, view.stride + 4, shape.stride);
  shape.height = static_cast<int>(height);
  shape.width = static_cast<int>(width);
  shape.channels = static_cast<int>(channels);
  shape.of_channels = Divisor(std::max<int64_t>(channels, 1));
  return shape;
}

// Whether chunks of a group's channels lie side by side, aligned.
bool in_chunks(DType dtype, const View4& view, int64_t channels) {
  const int chunk = chunk_of(dtype);
  return view.stride[1] == 1 && channels % chunk == 0 && is_aligned(view.data) &&
         view.stride[0] % chunk == 0 && view.stride[2] % chunk == 0 && view.stride[3] % chunk == 0;
}

// ---- the weight in rows

// [phase by its first taps, group, result channel, pitch]
struct WeightRows {
  const void* data;
  int64_t pitch, next_group, next_phase;
};

bool lies_in_rows(DType dtype, const Sum& s) {
  const int64_t (&stride)[4] = s.weight.stride;
  const int64_t taps_x = s.columns.taps, taps_y = s.rows.taps;
  return s.first_taps() == 1 &&  // of one phase, and so all of them
         (s.summed == 1 || stride[1] == 1) && (taps_x == 1 || stride[3] == s.summed) &&
         (taps_y == 1 || stride[2] == taps_x * s.summed) && is_aligned(s.weight.data) &&
         stride[0] % chunk_of(dtype) == 0 && s.next_group % chunk_of(dtype) == 0;
}

int64_t bytes_of_rows(DType dtype, const Sum& s) {
  if (lies_in_rows(dtype, s)) return 0;
  const int chunk = chunk_of(dtype);
  return s.first_taps() * s.groups * s.channels * round_up(s.most_terms(), chunk) * (16 / chunk);
}

struct Arrangement {
  AxisRule rows, columns;
  int64_t stride[4], next_group;
  Divisor minor, major, groups, first_taps_x, summed;
  bool by_channel;  // neighbouring threads have neighbouring channels, else neighbouring chunks
  int items, pitch, channels;
};

template <class E>
__global__ void __launch_bounds__(kThreads)
    arrange_kernel(const E* weight, E* to, Arrangement a) {
  const int item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= a.items) return;
  const Quotient minor(item, a.minor), major(minor.quotient, a.major);
  const Quotient group(major.quotient, a.groups), tap(group.quotient, a.first_taps_x);
  const int n = a.by_channel ? minor.rest : major.rest;
  const int first = (a.by_channel ? major.rest : minor.rest) * Chunk<E>::kSize;
  const int across = a.columns.taps_from(tap.rest);
  const int terms = a.rows.taps_from(tap.quotient) * across * static_cast<int>(a.summed.by);
  weight += group.rest * a.next_group + n * a.stride[0];
  Chunk<E> chunk;
#pragma unroll
  for (int e = 0; e < Chunk<E>::kSize; ++e) {
    if (first + e >= terms) break;
    const Quotient term(first + e, a.summed);
    const int i = tap.quotient + term.quotient / across * a.rows.apart;
    const int j = tap.rest + term.quotient % across * a.columns.apart;
    chunk.set(e, weight + (term.rest * a.stride[1] + i * a.stride[2] + j * a.stride[3]));
  }
  const int64_t row = static_cast<int64_t>(group.quotient * static_cast<int>(a.groups.by) +
                                           group.rest) * a.channels + n;
  chunk.store(reinterpret_cast<char*>(to + row * a.pitch + first));
}

WeightRows weight_rows(const Conv2dCall& call, const Sum& s) {
  if (lies_in_rows(call.dtype, s)) return {s.weight.data, s.weight.stride[0], s.next_group, 0};
  const int chunk = chunk_of(call.dtype);
  const int64_t pitch = round_up(s.most_terms(), chunk), next_group = s.channels * pitch;
  Arrangement a;
  a.rows = s.rows;
  a.columns = s.columns;
  std::copy(s.weight.stride, s.weight.stride + 4, a.stride);
  a.next_group = s.next_group;
  a.by_channel = s.weight.stride[0] < s.weight.stride[1];
  a.minor = Divisor(std::max<int64_t>(a.by_channel ? s.channels : pitch / chunk, 1));
  a.major = Divisor(std::max<int64_t>(a.by_channel ? pitch / chunk : s.channels, 1));
  a.groups = Divisor(s.groups);
  a.first_taps_x = Divisor(s.columns.first_taps());
  a.summed = Divisor(std::max<int64_t>(s.summed, 1));
  a.pitch = static_cast<int>(pitch);
  a.channels = static_cast<int>(s.channels);
  a.items = static_cast<int>(s.first_taps() * s.groups * s.channels * (pitch / chunk));
  const int64_t blocks = (a.items + kThreads - 1) / kThreads;
  // Elements are only moved.
  if (call.dtype == DType::f32) {
    launch("conv2d", arrange_kernel<uint32_t>, blocks, kThreads, 0, call.stream,
           static_cast<const uint32_t*>(s.weight.data), static_cast<uint32_t*>(call.scratch), a);
  } else {
    launch("conv2d", arrange_kernel<uint16_t>, blocks, kThreads, 0, call.stream,
           static_cast<const uint16_t*>(s.weight.data), static_cast<uint16_t*>(call.scratch), a);
  }
  return {call.scratch, pitch, next_group, s.groups * next_group};
}

// ---- sums over taps

// f(kind) with the type that says how the call's numbers are multiplied.
template <class F>
void dispatch_kind(const Conv2dCall& call, const F& f) {
  if (call.dtype == DType::bf16) return f(Halves<bfloat16>{});
  if (call.dtype == DType::f16) return f(Halves<float16>{});
  if (call.dtype == DType::f64) throw std::runtime_error("pyvit: no CUDA kernel for float64");
  if (call.allow_tf32) return f(Tf32{});
  f(Fused{});
}

void sum(const Conv2dCall& call, const Sum& s, const void* bias) {
  if (is_direct(s.groups, s.channels, s.summed)) {
    const DirectSums direct = {source_shape(s.source, s.height, s.width, s.summed),
                               s.rows,
                               s.columns,
                               s.source.data,
                               s.weight,
                               s.next_group,
                               bias,
                               s.out,
                               static_cast<int>(s.batch),
                               static_cast<int>(s.groups),
                               static_cast<int>(s.channels)};
    return direct_sums(call.dtype, direct, call.stream);
  }
  const WeightRows weight = weight_rows(call, s);
  const int64_t size = static_cast<int64_t>(s.rows.sizes[0].by) * s.columns.sizes[0].by;
  const int64_t most = kMostCounted / counted("conv2d", size, "pixels of an image");
  const int64_t bytes = 16 / chunk_of(call.dtype);
  for (int64_t first = 0; first < s.batch; first += most) {
    TapSums a;
    a.source = source_shape(s.source, s.height, s.width, s.summed);
    a.rows = s.rows;
    a.columns = s.columns;
    a.from = static_cast<const char*>(s.source.data) + first * s.source.stride[0] * bytes;
    a.weights = weight.data;
    a.bias = bias;
    a.out = static_cast<char*>(s.out.data) + first * s.out.stride[0] * bytes;
    std::copy(s.out.stride, s.out.stride + 4, a.out_stride);
    a.pitch = weight.pitch;
    a.next_group = weight.next_group;
    a.next_phase = weight.next_phase;
    a.batch = static_cast<int>(std::min(most, s.batch - first));
    a.groups = static_cast<int>(s.groups);
    a.channels = static_cast<int>(s.channels);
    a.copies = in_chunks(call.dtype, s.source, s.summed);
    a.vectors = in_chunks(call.dtype, s.out, s.channels);
    dispatch_kind(call, [&](auto kind) { sum_over_taps<decltype(kind)>(a, call.stream); });
  }
}

int64_t scratch_of(DType dtype, const Sum& s) {
  return is_direct(s.groups, s.channels, s.summed) ? 0 : bytes_of_rows(dtype, s);
}

// ---- the image's gradient where patches lie side by side

// Each pixel is in one patch then, and every tap is a phase of its own: the product of
// patch_embed.h, whose rows are patches and whose columns are taps and channels, reads the
// gradient once for all of them.
bool is_patches(const Conv2dShape& s) {
  bool side_by_side = s.groups == 1 && s.out_channels > 0 && s.kernel[0] * s.kernel[1] > 1;
  const int64_t size[2] = {s.height, s.width}, grid[2] = {s.out_height, s.out_width};
  for (int axis = 0; axis < 2; ++axis) {
    side_by_side = side_by_side && s.padding[axis] == 0 && s.kernel[axis] == s.stride[axis] &&
                   (s.dilation[axis] == 1 || s.kernel[axis] == 1) &&
                   grid[axis] * s.kernel[axis] == size[axis];
  }
  return side_by_side;
}

PatchEmbedCall patches_of(const Conv2dCall& call) {
  const Conv2dShape& s = call.shape;
  return {call.dtype, false, call.allow_tf32,
          {s.batch, s.in_channels, s.height, s.width, s.out_channels,
           {s.out_height, s.out_width}, {s.kernel[0], s.kernel[1]}, {s.stride[0], s.stride[1]}},
          call.scratch, call.stream};
}

// ---- sums over pixels

constexpr int64_t kPixelsOfPart = 1024;  // at least
constexpr int64_t kMostParts = 256, kBytesOfParts = 64 << 20;
constexpr int64_t kBlocks = 400;  // three for each multiprocessor

struct Parts {
  int64_t count, each;
};

Parts parts_of(const Conv2dShape& s) {
  const int64_t channels = s.out_channels / s.groups;
  const int64_t terms = s.in_channels / s.groups * s.kernel[0] * s.kernel[1];
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const int64_t tile = channels > 64 && terms > 64 ? 128 : 64;
  const int64_t blocks =
      is_direct(s.groups, channels, s.in_channels / s.groups)
          ? s.groups * channels * terms / 32 + 1
          : s.groups * ((channels + tile - 1) / tile) * ((terms + tile - 1) / tile);
  const int64_t fit = kBytesOfParts / (4 * s.out_channels * terms);
  const int64_t wanted = std::min(kMostParts, (kBlocks + blocks - 1) / blocks);
  const int64_t parts = std::max<int64_t>(1, std::min({wanted, pixels / kPixelsOfPart, fit}));
  const int64_t each = round_up(std::max<int64_t>((pixels + parts - 1) / parts, 1), 64);
  return {std::max<int64_t>((pixels + each - 1) / each, 1), each};
}

struct WeightShape {
  int64_t stride[4];
  Divisor terms, channels, columns;
  int64_t total;
  int parts;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* sums, T* out, WeightShape w) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= w.total) return;
  float total = 0.0f;
#pragma unroll 4
  for (int part = 0; part < w.parts; ++part) total += sums[part * w.total + item];
  const Quotient o(static_cast<int>(item), w.terms), tap(o.rest, w.channels);
  const Quotient i(tap.quotient, w.columns);
  out[o.quotient * w.stride[0] + tap.rest * w.stride[1] + i.quotient * w.stride[2] +
      i.rest * w.stride[3]] = narrow<T>(total);
}

void add_parts(const Conv2dCall& call, int64_t parts, View4 dw) {
  const Conv2dShape& s = call.shape;
  const int64_t channels = s.in_channels / s.groups, terms = channels * s.kernel[0] * s.kernel[1];
  WeightShape w;
  std::copy(dw.stride, dw.stride + 4, w.stride);
  w.terms = Divisor(terms);
  w.channels = Divisor(channels);
  w.columns = Divisor(s.kernel[1]);
  w.total = s.out_channels * terms;
  w.parts = static_cast<int>(parts);
  dispatch(call.dtype, [&](auto element) {
    using T = decltype(element);
    launch("conv2d", add_parts_kernel<T>, (w.total + kThreads - 1) / kThreads, kThreads, 0,
           call.stream, static_cast<const float*>(call.scratch), static_cast<T*>(dw.data), w);
  });
}

}  // namespace

int64_t conv2d_scratch(DType dtype, const Conv2dShape& shape, View4 w) {
  return scratch_of(dtype, forward_sum(shape, {}, w, {}));
}

int64_t conv2d_input_grad_scratch(DType dtype, const Conv2dShape& shape, View4 w) {
  const int64_t sums = scratch_of(dtype, gradient_sum(shape, {}, w, {}));
  if (!is_patches(shape)) return sums;
  return std::max(sums, patch_embed_image_grad_scratch(patches_of({dtype, false, shape, {}, {}})));
}

int64_t conv2d_weight_grad_scratch(DType, const Conv2dShape& s) {
  const int64_t terms = s.in_channels / s.groups * s.kernel[0] * s.kernel[1];
  return parts_of(s).count * s.out_channels * terms * 4;
}

void conv2d(const Conv2dCall& call, View4 x, View4 w, const void* bias, View4 y) {
  sum(call, forward_sum(call.shape, x, w, y), bias);
}

void conv2d_input_grad(const Conv2dCall& call, View4 dy, View4 w, View4 dx) {
  const Conv2dShape& s = call.shape;
  const bool in_a_row = s.out_height == 1 || dy.stride[2] == s.out_width * dy.stride[3];
  if (is_patches(s) && in_a_row && s.batch * s.out_height * s.out_width <= kMostCounted) {
    const int64_t next = s.out_width == 1 ? dy.stride[2] : dy.stride[3];
    return patch_embed_image_grad(patches_of(call), {dy.data, {dy.stride[0], next, dy.stride[1]}},
                                  w, nullptr, dx);
  }
  sum(call, gradient_sum(s, dy, w, dx), nullptr);
}

void conv2d_weight_grad(const Conv2dCall& call, View4 dy, View4 x, View4 dw) {
  const Conv2dShape& s = call.shape;
  const Parts parts = parts_of(s);
  const int64_t channels = s.out_channels / s.groups, summed = s.in_channels / s.groups;
  PixelSums a;
  dy = lying(dy, s.batch, s.out_height, s.out_width);
  x = lying(x, s.batch, s.height, s.width);
  a.grad = source_shape(dy, s.out_height, s.out_width, channels);
  a.image = source_shape(x, s.height, s.width, summed);
  a.rows = rule(s, 0, false);
  a.columns = rule(s, 1, false);
  a.of_grad = dy.data;
  a.of_image = x.data;
  a.sums = static_cast<float*>(call.scratch);
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  a.pixels = s.height * s.width > 0 ? counted("conv2d", pixels, "pixels of a batch") : 0;
  a.each = static_cast<int>(parts.each);
  a.parts = static_cast<int>(parts.count);
  a.groups = static_cast<int>(s.groups);
  a.channels = static_cast<int>(channels);
  a.terms = static_cast<int>(summed * s.kernel[0] * s.kernel[1]);
  a.grad_copies = in_chunks(call.dtype, dy, channels);
  a.image_copies = in_chunks(call.dtype, x, summed);
  if (is_direct(s.groups, channels, summed)) {
    direct_pixels(call.dtype, a, call.stream);
  } else {
    dispatch_kind(call, [&](auto kind) { sum_over_pixels<decltype(kind)>(a, call.stream); });
  }
  add_parts(call, parts.count, dw);
}

}  // namespace pyvit::cuda
