// Three GEMMs (gemm.h). E = C·kh·kw is a patch's size; its elements are ordered (c, i, j), as a
// weight [D, C, kh, kw] is, whatever the memory order of the image:
//
//   tokens[p, d]  = Σ_e patch[p, e] · w[d, e]      A: patches, B: weights, transposed by blocks
//   dpatch[p, e]  = Σ_d grad[p, d] · w[d, e]       A: tokens,  B: weights, as they lie
//   dw[d, e]      = Σ_p grad[p, d] · patch[p, e]   A: tokens, transposed by blocks, B: patches
//
// Patches are normalised while they are packed. The epilogues add bias and position and write
// the class token, or scatter dpatch as pixels: patches that do not overlap never share one.
#include "patch_embed.h"

#include <cstring>
#include <vector>

#include "gemm.h"
#include "patches.h"
#include "split_sum.h"
#include "transpose.h"

namespace pyvit {
namespace {

// normalised = (pixel - shift) · scale, one value a channel.
template <class T>
struct ChannelTable {
  std::vector<T> shift, scale;

  ChannelTable(int64_t channels, bool bytes, Normalisation normalisation)
      : shift(channels), scale(channels) {
    const T* mean = static_cast<const T*>(normalisation.mean);
    const T* std = static_cast<const T*>(normalisation.std);
    const double unit = bytes ? 255 : 1;
    for (int64_t c = 0; c < channels; ++c) {
      shift[c] = static_cast<T>(mean == nullptr ? 0 : unit * mean[c]);
      scale[c] = static_cast<T>(1 / (std == nullptr ? unit : unit * std[c]));
    }
  }
};

// Pixels of several patches are handled as one line of an image row; a segment of a patch row is
// no longer than a panel, so that a line holds at least one.
constexpr int64_t kLine = 1024;
static_assert(Panel<float>::KC <= kLine && Panel<float>::NB <= kLine);

// A row of a patch, or the part of it in [begin, end) of the elements.
struct Segment {
  int64_t channel, row, column, element, count;
};

template <class F>
void for_each_segment(const int64_t kernel[2], int64_t begin, int64_t end, const F& f) {
  for (int64_t e = begin; e < end;) {
    const int64_t column = e % kernel[1];
    const int64_t count = std::min(kernel[1] - column, end - e);
    f(Segment{e / (kernel[0] * kernel[1]), e / kernel[1] % kernel[0], column, e, count});
    e += count;
  }
}

// The patches of a batch of images, I being the type of a pixel.
template <class T, class I>
struct Patches {
  const I* data;
  int64_t image_stride[4];
  int64_t grid[2], kernel[2], step[2];
  ChannelTable<T> table;

  Patches(const PatchEmbedShape& s, View4 image, Normalisation normalisation)
      : data(static_cast<const I*>(image.data)),
        image_stride{image.stride[0], image.stride[1], image.stride[2], image.stride[3]},
        grid{s.grid[0], s.grid[1]},
        kernel{s.kernel[0], s.kernel[1]},
        step{s.stride[0], s.stride[1]},
        table(s.channels, std::is_same_v<I, uint8_t>, normalisation) {}

  // place(p, e, from, n): elements [e, e + n) of patch first + p are from[0 : n].
  template <class Place>
  void read(int64_t first, int64_t count, int64_t begin, int64_t end, const Place& place) const {
    T line[kLine];
    for_each_run(grid, first, count, [&](const PixelRun& run) {
      for_each_segment(kernel, begin, end, [&](const Segment& s) {
        const I* row = data + run.image * image_stride[0] + s.channel * image_stride[1] +
                       (run.row * step[0] + s.row) * image_stride[2] +
                       (run.column * step[1] + s.column) * image_stride[3];
        // Side by side or overlapping, as many as fit one line; with wide gaps, one by one.
        const int64_t fitting = step[1] < 2 * s.count ? 1 + (kLine - s.count) / step[1] : 1;
        for (int64_t t = 0; t < run.count; t += fitting) {
          const int64_t here = std::min(fitting, run.count - t);
          const int64_t length = (here - 1) * step[1] + s.count;
          normalise(line, row + t * step[1] * image_stride[3], length, s.channel);
          for (int64_t u = 0; u < here; ++u)
            place(run.at + t + u, s.element, line + u * step[1], s.count);
        }
      });
    });
  }

 private:
  void normalise(T* line, const I* row, int64_t n, int64_t channel) const {
    const int64_t stride = image_stride[3];
    if (stride == 1) {
      widen_run(line, row, n);
    } else {
      for (int64_t i = 0; i < n; ++i) line[i] = widen(row[i * stride]);
    }
    const T shift = table.shift[channel], scale = table.scale[channel];
    for (int64_t i = 0; i < n; ++i) line[i] = (line[i] - shift) * scale;
  }
};

// A[p, e]
template <class T, class I>
void pack_patch_rows(T* dst, const Patches<T, I>& patches, int64_t m0, int64_t mb, int64_t k0,
                     int64_t kb) {
  patches.read(m0, mb, k0, k0 + kb, [&](int64_t p, int64_t e, const T* from, int64_t n) {
    widen_run(dst + p * Panel<T>::lda + (e - k0), from, n);
  });
}

// B[p, e], in strips of NR elements
template <class T, class I>
void pack_patch_strips(T* dst, const Patches<T, I>& patches, int64_t k0, int64_t kb, int64_t n0,
                       int64_t nb) {
  constexpr int64_t NR = Panel<T>::NR;
  patches.read(k0, kb, n0, n0 + nb, [&](int64_t p, int64_t e, const T* from, int64_t n) {
    for (int64_t j = e - n0, last = j + n; j < last;) {
      const int64_t count = std::min(NR - j % NR, last - j);
      widen_run(dst + j / NR * kb * NR + p * NR + j % NR, from, count);
      from += count;
      j += count;
    }
  });
  if (nb % NR == 0) return;
  T* last = dst + nb / NR * kb * NR;
  for (int64_t k = 0; k < kb; ++k) std::fill(last + k * NR + nb % NR, last + (k + 1) * NR, T(0));
}

template <class S>
struct Weight {
  const S* data;
  int64_t stride[4];
  int64_t kernel[2];
  bool rows_contiguous;

  Weight(const PatchEmbedShape& s, View4 w)
      : data(static_cast<const S*>(w.data)),
        stride{w.stride[0], w.stride[1], w.stride[2], w.stride[3]},
        kernel{s.kernel[0], s.kernel[1]},
        rows_contiguous(w.stride[3] == 1 && w.stride[2] == s.kernel[1] &&
                        w.stride[1] == s.kernel[0] * s.kernel[1]) {}

  int64_t offset(int64_t e) const {
    return e / (kernel[0] * kernel[1]) * stride[1] + e / kernel[1] % kernel[0] * stride[2] +
           e % kernel[1] * stride[3];
  }
};

// B[e, d] = w[d, e]
template <class S>
void pack_weight_columns(Compute<S>* dst, const Weight<S>& w, int64_t k0, int64_t kb, int64_t n0,
                         int64_t nb) {
  constexpr int64_t NR = Panel<Compute<S>>::NR;
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR) {
    const int64_t width = std::min(NR, nb - j);
    const S* from = w.data + (n0 + j) * w.stride[0];
    if (w.rows_contiguous) {
      transpose(dst, NR, from + k0, w.stride[0], 1, width, kb);
    } else {
      for (int64_t k = 0; k < kb; ++k) {
        const S* element = from + w.offset(k0 + k);
        for (int64_t i = 0; i < width; ++i) dst[k * NR + i] = widen(element[i * w.stride[0]]);
      }
    }
    if (width < NR)
      for (int64_t k = 0; k < kb; ++k)
        std::fill(dst + k * NR + width, dst + (k + 1) * NR, Compute<S>(0));
  }
}

// B[d, e] = w[d, e]
template <class S>
void pack_weight_rows(Compute<S>* dst, const Weight<S>& w, int64_t k0, int64_t kb, int64_t n0,
                      int64_t nb) {
  using T = Compute<S>;
  constexpr int64_t NR = Panel<T>::NR;
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR) {
    const int64_t width = std::min(NR, nb - j);
    int64_t offset[NR];
    for (int64_t i = 0; i < width; ++i) offset[i] = w.offset(n0 + j + i);
    for (int64_t k = 0; k < kb; ++k) {
      const S* from = w.data + (k0 + k) * w.stride[0];
      T* row = dst + k * NR;
      if (w.rows_contiguous) {
        widen_run(row, from + offset[0], width);
      } else {
        for (int64_t i = 0; i < width; ++i) row[i] = widen(from[offset[i]]);
      }
      std::fill(row + width, row + NR, T(0));
    }
  }
}

// ---- forward ------------------------------------------------------------------------------

template <class S>
struct TokenWriter {
  S* data;
  int64_t embed_dim, grid[2];
  const S* bias;
  const S* position;
  const S* class_token;

  // Columns [n0, n0 + nb) of the row: value + bias + position.
  void write(int64_t image, int64_t token, const Compute<S>* value, const Compute<S>* bias_line,
             int64_t n0, int64_t nb) const {
    using T = Compute<S>;
    const int64_t tokens = grid[0] * grid[1] + (class_token != nullptr);
    T line[Panel<T>::NB];
    for (int64_t j = 0; j < nb; ++j) line[j] = value[j] + bias_line[j];
    if (position != nullptr) {
      T add[Panel<T>::NB];
      widen_run(add, position + token * embed_dim + n0, nb);
      for (int64_t j = 0; j < nb; ++j) line[j] += add[j];
    }
    narrow_run(data + (image * tokens + token) * embed_dim + n0, line, nb);
  }

  void operator()(const Compute<S>* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0,
                  int64_t nb) const {
    using T = Compute<S>;
    T bias_line[Panel<T>::NB] = {}, class_line[Panel<T>::NB] = {};
    const T none[Panel<T>::NB] = {};
    if (bias != nullptr) widen_run(bias_line, bias + n0, nb);
    if (class_token != nullptr) widen_run(class_line, class_token + n0, nb);
    for_each_run(grid, m0, mb, [&](const PixelRun& run) {
      const int64_t first = run.row * grid[1] + run.column + (class_token != nullptr);
      // Whoever writes an image's first patch writes its class token.
      if (class_token != nullptr && first == 1) write(run.image, 0, class_line, none, n0, nb);
      for (int64_t t = 0; t < run.count; ++t)
        write(run.image, first + t, c + (run.at + t) * ldc, bias_line, n0, nb);
    });
  }
};

template <class S, class I>
void forward(const PatchEmbedShape& s, View4 image, Normalisation normalisation, View4 weight,
             TokenTerms terms, void* tokens) {
  using T = Compute<S>;
  const Patches<T, I> patches(s, image, normalisation);
  const Weight<S> w(s, weight);
  const TokenWriter<S> writer{static_cast<S*>(tokens),
                              s.embed_dim,
                              {s.grid[0], s.grid[1]},
                              static_cast<const S*>(terms.bias),
                              static_cast<const S*>(terms.position),
                              static_cast<const S*>(terms.class_token)};
  const int64_t K = s.channels * s.kernel[0] * s.kernel[1];
  const BlockGrid<T> blocks(s.batch * s.grid[0] * s.grid[1], s.embed_dim);
  parallel_for(blocks.tasks(), [&](int64_t task) {
    gemm_block<T>(
        blocks.m0(task), blocks.height(task), blocks.n0(task), blocks.width(task), 0, K,
        [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
          pack_patch_rows(a, patches, m, rows, k0, kb);
        },
        [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
          pack_weight_columns(b, w, k0, kb, n, columns);
        },
        writer);
  });
}

// ---- image gradient -----------------------------------------------------------------------

template <class S>
struct PixelWriter {
  S* data;
  int64_t stride[4];
  int64_t grid[2], kernel[2], step[2];
  const Compute<S>* scale;

  void operator()(const Compute<S>* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0,
                  int64_t nb) const {
    for_each_run(grid, m0, mb, [&](const PixelRun& run) {
      for_each_segment(kernel, n0, n0 + nb, [&](const Segment& s) {
        S* row = data + run.image * stride[0] + s.channel * stride[1] +
                 (run.row * step[0] + s.row) * stride[2] +
                 (run.column * step[1] + s.column) * stride[3];
        const Compute<S>* from = c + run.at * ldc + (s.element - n0);
        // Whole rows of touching patches make one line; other pieces are written one by one.
        const int64_t fitting = s.count == step[1] ? kLine / s.count : 1;
        for (int64_t t = 0; t < run.count; t += fitting)
          write(row + t * step[1] * stride[3], from + t * ldc, ldc,
                std::min(fitting, run.count - t), s.count, scale[s.channel]);
      });
    });
  }

 private:
  void write(S* to, const Compute<S>* from, int64_t ldc, int64_t patches, int64_t count,
             Compute<S> by) const {
    Compute<S> line[kLine];
    for (int64_t u = 0; u < patches; ++u)
      for (int64_t i = 0; i < count; ++i) line[u * count + i] = from[u * ldc + i] * by;
    const int64_t n = patches * count;
    if (stride[3] == 1) {
      narrow_run(to, line, n);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride[3]] = narrow<S>(line[i]);
    }
  }
};

// A[p, d]
template <class S>
void pack_token_rows(Compute<S>* dst, TokenView grad, const int64_t grid[2], int64_t m0,
                     int64_t mb, int64_t k0, int64_t kb) {
  const int64_t* stride = grad.stride;
  for (int64_t m = 0; m < mb; ++m, dst += Panel<Compute<S>>::lda) {
    const int64_t image = (m0 + m) / (grid[0] * grid[1]), token = (m0 + m) % (grid[0] * grid[1]);
    const S* from = static_cast<const S*>(grad.data) + image * stride[0] + token * stride[1] +
                    k0 * stride[2];
    if (stride[2] == 1) {
      widen_run(dst, from, kb);
    } else {
      for (int64_t k = 0; k < kb; ++k) dst[k] = widen(from[k * stride[2]]);
    }
  }
}

template <class S>
void image_grad(const PatchEmbedShape& s, TokenView grad, View4 weight, const void* std,
                View4 dimage) {
  using T = Compute<S>;
  const ChannelTable<T> table(s.channels, false, {nullptr, std});
  const PixelWriter<S> writer{
      static_cast<S*>(dimage.data),
      {dimage.stride[0], dimage.stride[1], dimage.stride[2], dimage.stride[3]},
      {s.grid[0], s.grid[1]},
      {s.kernel[0], s.kernel[1]},
      {s.stride[0], s.stride[1]},
      table.scale.data()};
  const bool covered = s.stride[0] == s.kernel[0] && s.stride[1] == s.kernel[1] &&
                       s.grid[0] * s.kernel[0] == s.height && s.grid[1] * s.kernel[1] == s.width;
  const int64_t image_size = s.channels * s.height * s.width;
  if (!covered)
    parallel_for(s.batch, [&](int64_t image) {
      std::memset(static_cast<void*>(writer.data + image * image_size), 0,
                  image_size * sizeof(S));
    });
  const Weight<S> w(s, weight);
  const BlockGrid<T> blocks(s.batch * s.grid[0] * s.grid[1],
                            s.channels * s.kernel[0] * s.kernel[1]);
  parallel_for(blocks.tasks(), [&](int64_t task) {
    gemm_block<T>(
        blocks.m0(task), blocks.height(task), blocks.n0(task), blocks.width(task), 0, s.embed_dim,
        [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
          pack_token_rows<S>(a, grad, s.grid, m, rows, k0, kb);
        },
        [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
          pack_weight_rows(b, w, k0, kb, n, columns);
        },
        writer);
  });
}

// ---- weight gradient ----------------------------------------------------------------------

// A[d, p] = grad[p, d]
template <class S>
void pack_token_columns(Compute<S>* dst, TokenView grad, const int64_t grid[2], int64_t m0,
                        int64_t mb, int64_t k0, int64_t kb) {
  const int64_t per_image = grid[0] * grid[1];
  for (int64_t k = 0; k < kb;) {
    const int64_t image = (k0 + k) / per_image, token = (k0 + k) % per_image;
    const int64_t count = std::min(per_image - token, kb - k);
    const S* from = static_cast<const S*>(grad.data) + image * grad.stride[0] +
                    token * grad.stride[1] + m0 * grad.stride[2];
    transpose(dst + k, Panel<Compute<S>>::lda, from, grad.stride[1], grad.stride[2], count, mb);
    k += count;
  }
}

template <class S, class I>
void weight_grad(const PatchEmbedShape& s, TokenView grad, View4 image,
                 Normalisation normalisation, View4 dweight) {
  using T = Compute<S>;
  const Patches<T, I> patches(s, image, normalisation);
  const int64_t D = s.embed_dim, E = s.channels * s.kernel[0] * s.kernel[1];
  const Weight<S> destination(s, dweight);
  S* dw = static_cast<S*>(dweight.data);
  const SplitSum<T> split(s.batch * s.grid[0] * s.grid[1], D * E);
  const BlockGrid<T> blocks(D, E, split.parts);
  const int64_t tasks = blocks.tasks();
  parallel_for(tasks * split.parts, [&](int64_t task) {
    const int64_t block = task % tasks, part = task / tasks;
    gemm_block<T>(
        blocks.m0(block), blocks.height(block), blocks.n0(block), blocks.width(block),
        split.begin(part), split.end(part),
        [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
          pack_token_columns<S>(a, grad, s.grid, m, rows, k0, kb);
        },
        [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
          pack_patch_strips(b, patches, k0, kb, n, columns);
        },
        [&](const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) {
          for (int64_t i = 0; i < mb; ++i)
            for (int64_t j = 0; j < nb; ++j) {
              const int64_t d = m0 + i, e = n0 + j;
              if (split.parts > 1) {
                split.partial(part)[d * E + e] = c[i * ldc + j];
              } else {
                dw[d * destination.stride[0] + destination.offset(e)] = narrow<S>(c[i * ldc + j]);
              }
            }
        });
  });
  if (split.parts == 1) return;
  parallel_for(D, [&](int64_t d) {
    for (int64_t e = 0; e < E; ++e)
      dw[d * destination.stride[0] + destination.offset(e)] = narrow<S>(split.sum(d * E + e));
  });
}

// f(S{}, I{}) with the storage types of weights and pixels.
template <class F>
void dispatch_pixels(DType dtype, bool bytes, const F& f) {
  dispatch(dtype, [&](auto s) {
    if (bytes) {
      f(s, uint8_t{});
    } else {
      f(s, s);
    }
  });
}

}  // namespace

void patch_embed(DType dtype, bool bytes, const PatchEmbedShape& shape, View4 image,
                 Normalisation normalisation, View4 weight, TokenTerms terms, void* tokens) {
  dispatch_pixels(dtype, bytes, [&](auto s, auto pixel) {
    forward<decltype(s), decltype(pixel)>(shape, image, normalisation, weight, terms, tokens);
  });
}

void patch_embed_image_grad(DType dtype, const PatchEmbedShape& shape, TokenView grad,
                            View4 weight, const void* std, View4 dimage) {
  dispatch(dtype, [&](auto s) { image_grad<decltype(s)>(shape, grad, weight, std, dimage); });
}

void patch_embed_weight_grad(DType dtype, bool bytes, const PatchEmbedShape& shape,
                             TokenView grad, View4 image, Normalisation normalisation,
                             View4 dweight) {
  dispatch_pixels(dtype, bytes, [&](auto s, auto pixel) {
    weight_grad<decltype(s), decltype(pixel)>(shape, grad, image, normalisation, dweight);
  });
}

}  // namespace pyvit
