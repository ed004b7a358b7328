// Three matrix products whose operands or results are patches of the image where they lie: no patch
// matrix is in memory. The forward pass normalises pixels on their way into shared memory, and adds
// bias, position and class token on the way out. The image's gradient writes each product back as
// the pixels of its patch, and divides by std. The weight's gradient sums over tokens, in parts of
// a number that the sizes alone decide; a second kernel adds the parts up, always in the same order.
//
// A patch's pixels are numbered as they lie in the image: (channel, row, column), or (row, column,
// channel) where channels are innermost. The weight is read where it lies if it has the same order
// and alignment; else it is rearranged first, once a call.
//
// ViT-B/16, 256 images of 3 x 224 x 224, bfloat16: 59 GFLOP a product, 75 µs of an H200's matrix
// units at their measured 790 TFLOP/s (mma.sync reaches some two thirds of that); 154 MB of image
// and tokens, 36 µs. Blocks of one row of tiles, which have the same patches, run side by side: the
// image is read from memory once. Tiles of 128 x 128 read 0.9 GB in all from the second-level cache,
// more than 150 µs at some 5.5 TB/s: by calculation that is what bounds a product. The weight's
// gradient writes 14 parts of 2.4 MB and reads them again.
#include "cuda/patch_embed.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/patch_embed_products.h"

namespace pyvit::cuda {
namespace {

constexpr int64_t kTokensOfAPart = 1024;  // of the weight's gradient, at least
constexpr int64_t kEnoughBlocks = 528;    // two for each place on an H200; more only cost memory
constexpr int64_t kLargestTile = 128;

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
int64_t patches_of(const PatchEmbedShape& s) { return s.grid[0] * s.grid[1]; }
int64_t tokens_of(const PatchEmbedShape& s) { return s.batch * patches_of(s); }
int64_t pixels_of(const PatchEmbedShape& s) { return s.channels * s.kernel[0] * s.kernel[1]; }

// Three dimensions, the outermost first.
struct Nest {
  int64_t size[3], stride[3];

  int64_t total() const { return size[0] * size[1] * size[2]; }
};

// A patch's pixels, or a feature's weights; strides of channel, row and column.
Nest pixels_in(const PatchEmbedShape& s, const int64_t* stride, bool channel_inside) {
  if (channel_inside) {
    return {{s.kernel[0], s.kernel[1], s.channels}, {stride[1], stride[2], stride[0]}};
  }
  return {{s.channels, s.kernel[0], s.kernel[1]}, {stride[0], stride[1], stride[2]}};
}
bool is_channel_inside(const PatchEmbedShape& s, const View4& image) {
  return s.channels > 1 && image.stride[1] == 1;
}

// Whether `unit` elements lie side by side, aligned: see Operand.
bool lie_in_units(const Nest& lines, const Nest& elements, const void* data, int64_t unit,
                  int64_t element_bytes, bool is_copied) {
  int64_t run = 1;
  int axis = 2;
  for (; axis >= (is_copied ? 0 : 1); --axis) {
    if (elements.size[axis] == 1) continue;
    if (elements.stride[axis] != run) break;
    run *= elements.size[axis];
  }
  bool fits = run % unit == 0 || (is_copied && run == elements.total());
  auto apart = [&](const Nest& nest, int i) {
    fits = fits && (nest.size[i] == 1 || nest.stride[i] % unit == 0);
  };
  for (; axis >= 0; --axis) apart(elements, axis);
  for (int i = 0; i < 3; ++i) apart(lines, i);
  return fits && reinterpret_cast<uintptr_t>(data) % (unit * element_bytes) == 0;
}

// `chunk`: elements in 16 bytes of shared memory, where they are made to numbers of `dtype`.
Operand operand_of(DType dtype, const void* data, const Nest& lines, const Nest& elements,
                   int64_t element_bytes, bool is_copied) {
  if (std::max(lines.total(), elements.total()) > INT32_MAX - kLargestTile) {
    throw std::runtime_error("pyvit.patch_embed: the CUDA kernels take fewer than 2^31 patches");
  }
  Operand operand{};
  operand.data = data;
  operand.lines = static_cast<int>(lines.total());
  operand.elements = static_cast<int>(elements.total());
  operand.lines_of_image = Divisor(lines.size[1] * lines.size[2]);
  operand.lines_of_row = Divisor(lines.size[2]);
  operand.elements_of_outer = Divisor(elements.size[1] * elements.size[2]);
  operand.elements_of_middle = Divisor(elements.size[2]);
  std::copy(lines.stride, lines.stride + 3, operand.line_stride);
  std::copy(elements.stride, elements.stride + 3, operand.element_stride);
  operand.unit = 1;
  for (const int64_t unit : {4 / size_of(dtype), 16 / size_of(dtype)}) {
    if (lie_in_units(lines, elements, data, unit, element_bytes, is_copied)) {
      operand.unit = static_cast<int>(unit);
    }
  }
  operand.scale = 1.0f;
  return operand;
}

Nest lines_of_patches(const PatchEmbedShape& s, const View4& image) {
  return {{s.batch, s.grid[0], s.grid[1]},
          {image.stride[0], s.stride[0] * image.stride[2], s.stride[1] * image.stride[3]}};
}

Pixels kind_of(const PatchEmbedCall& call, const Normalisation& normalisation) {
  if (call.bytes) return Pixels::made_of_bytes;
  return normalisation.mean || normalisation.std ? Pixels::made : Pixels::copied;
}

Operand patches_in(const PatchEmbedCall& call, const View4& image,
                   const Normalisation& normalisation) {
  const bool inside = is_channel_inside(call.shape, image);
  Operand operand = operand_of(call.dtype, image.data, lines_of_patches(call.shape, image),
                               pixels_in(call.shape, image.stride + 1, inside),
                               call.bytes ? 1 : size_of(call.dtype),
                               kind_of(call, normalisation) == Pixels::copied);
  operand.mean = static_cast<const float*>(normalisation.mean);
  operand.std = static_cast<const float*>(normalisation.std);
  operand.scale = call.bytes ? 1.0f / 255.0f : 1.0f;
  operand.channel_inside = inside;
  return operand;
}

Operand grads_in(const PatchEmbedCall& call, const TokenView& grad) {
  const PatchEmbedShape& s = call.shape;
  return operand_of(call.dtype, grad.data,
                    {{s.batch, 1, patches_of(s)}, {grad.stride[0], 0, grad.stride[1]}},
                    {{1, 1, s.embed_dim}, {0, 0, grad.stride[2]}}, size_of(call.dtype), true);
}

// ---- the weight in the order of the image's pixels

constexpr int kThreads = 256;

template <class E>
__global__ void __launch_bounds__(kThreads)
    rearrange_kernel(Operand from, E* to, int pitch, Divisor blocks) {
  const Quotient place(static_cast<int>(blockIdx.x), blocks);
  const int e = place.rest * kThreads + static_cast<int>(threadIdx.x);
  if (e >= from.elements) return;
  to[int64_t{place.quotient} * pitch + e] =
      static_cast<const E*>(from.data)[from.line(place.quotient) + from.element(e)];
}

int64_t pitch_of(const PatchEmbedCall& call) {
  const int64_t chunk = 16 / size_of(call.dtype);
  return (pixels_of(call.shape) + chunk - 1) / chunk * chunk;
}

Operand weights_in(const PatchEmbedCall& call, const View4& weight, bool channel_inside) {
  const PatchEmbedShape& s = call.shape;
  const int64_t bytes = size_of(call.dtype);
  const Operand lying =
      operand_of(call.dtype, weight.data, {{s.embed_dim, 1, 1}, {weight.stride[0], 0, 0}},
                 pixels_in(s, weight.stride + 1, channel_inside), bytes, true);
  if (lying.unit * bytes == 16) return lying;
  const int64_t pitch = pitch_of(call);
  const int64_t blocks = (lying.elements + kThreads - 1) / kThreads;
  auto rearrange = [&](auto element) {
    using E = decltype(element);
    launch("patch_embed", rearrange_kernel<E>, s.embed_dim * blocks, kThreads, 0, call.stream,
           lying, static_cast<E*>(call.scratch), static_cast<int>(pitch), Divisor(blocks));
  };
  bytes == 4 ? rearrange(uint32_t{}) : rearrange(uint16_t{});
  return operand_of(call.dtype, call.scratch, {{s.embed_dim, 1, 1}, {pitch, 0, 0}},
                    {{1, 1, pixels_of(s)}, {0, 0, 1}}, bytes, true);
}

int64_t rearranged_bytes(const PatchEmbedCall& call) {
  return call.shape.embed_dim * pitch_of(call) * size_of(call.dtype);
}

// ---- the weight's gradient from its parts

// `to` has the elements of the weight's gradient; numbered as in the sums.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const float* sums, Operand to, int parts, Divisor blocks) {
  const Quotient place(static_cast<int>(blockIdx.x), blocks);
  const int e = place.rest * kThreads + static_cast<int>(threadIdx.x);
  if (e >= to.elements) return;
  const int64_t all = int64_t{to.lines} * to.elements;
  sums += int64_t{place.quotient} * to.elements + e;
  float total = 0.0f;
  for (int part = 0; part < parts; ++part) total += sums[part * all];
  T* out = static_cast<T*>(const_cast<void*>(to.data));
  out[to.line(place.quotient) + to.element(e)] = narrow<T>(total);
}

int64_t parts_of(const PatchEmbedShape& s) {
  auto tiles = [](int64_t size) { return (size + kLargestTile - 1) / kLargestTile; };
  const int64_t most = kEnoughBlocks / (tiles(s.embed_dim) * tiles(pixels_of(s)));
  return std::max<int64_t>(1, std::min(tokens_of(s) / kTokensOfAPart, most));
}

// f(Kind{}) with the kind of multiplication that a call's dtype asks for.
template <class F>
void with_kind(const PatchEmbedCall& call, const F& f) {
  dispatch(call.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) == 2) {
      f(Halves<E>{});
    } else {
      call.allow_tf32 ? f(Tf32{}) : f(Fused{});
    }
  });
}

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

int64_t patch_embed_scratch(const PatchEmbedCall& call) { return rearranged_bytes(call); }

void patch_embed(const PatchEmbedCall& call, View4 image, Normalisation normalisation,
                 View4 weight, TokenTerms terms, void* tokens) {
  const bool inside = is_channel_inside(call.shape, image);
  const TokenSums sums{patches_in(call, image, normalisation),
                       weights_in(call, weight, inside),
                       kind_of(call, normalisation),
                       terms.bias,
                       terms.position,
                       terms.class_token,
                       tokens,
                       call.shape.embed_dim * size_of(call.dtype) % 16 == 0 &&
                           is_aligned(terms.bias) && is_aligned(terms.position) &&
                           is_aligned(terms.class_token) && is_aligned(tokens)};
  with_kind(call, [&](auto kind) { sum_tokens<decltype(kind)>(sums, call.stream); });
}

int64_t patch_embed_image_grad_scratch(const PatchEmbedCall& call) {
  return rearranged_bytes(call);
}

void patch_embed_image_grad(const PatchEmbedCall& call, TokenView grad, View4 weight,
                            const void* std, View4 dimage) {
  const bool inside = is_channel_inside(call.shape, dimage);
  Operand image = operand_of(call.dtype, dimage.data, lines_of_patches(call.shape, dimage),
                             pixels_in(call.shape, dimage.stride + 1, inside),
                             size_of(call.dtype), false);
  image.std = static_cast<const float*>(std);
  image.channel_inside = inside;
  const ImageSums sums{grads_in(call, grad), weights_in(call, weight, inside), image};
  with_kind(call, [&](auto kind) { sum_image<decltype(kind)>(sums, call.stream); });
}

int64_t patch_embed_weight_grad_scratch(const PatchEmbedCall& call) {
  const PatchEmbedShape& s = call.shape;
  return parts_of(s) * s.embed_dim * pixels_of(s) * static_cast<int64_t>(sizeof(float));
}

void patch_embed_weight_grad(const PatchEmbedCall& call, TokenView grad, View4 image,
                             Normalisation normalisation, View4 dweight) {
  const PatchEmbedShape& s = call.shape;
  const int64_t parts = parts_of(s), each = (tokens_of(s) + parts - 1) / parts;
  auto* partial = static_cast<float*>(call.scratch);
  const WeightSums sums{grads_in(call, grad),
                        patches_in(call, image, normalisation),
                        kind_of(call, normalisation),
                        partial,
                        static_cast<int>(each),
                        static_cast<int>(parts)};
  with_kind(call, [&](auto kind) { sum_weights<decltype(kind)>(sums, call.stream); });
  const Operand to = operand_of(
      call.dtype, dweight.data, {{s.embed_dim, 1, 1}, {dweight.stride[0], 0, 0}},
      pixels_in(s, dweight.stride + 1, is_channel_inside(s, image)), size_of(call.dtype), true);
  const int64_t blocks = (to.elements + kThreads - 1) / kThreads;
  dispatch(call.dtype, [&](auto element) {
    launch("patch_embed_weight_grad", add_parts_kernel<decltype(element)>, s.embed_dim * blocks,
           kThreads, 0, call.stream, static_cast<const float*>(partial), to,
           static_cast<int>(parts), Divisor(blocks));
  });
}

}  // namespace pyvit::cuda
