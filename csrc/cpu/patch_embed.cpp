// Three GEMMs (gemm.h), E = C·kh·kw being a patch's size:
//
//   tokens[p, d]  = Σ_e patch[p, e] · w[d, e]      A: patches, B: weights, transposed by blocks
//   dpatch[p, e]  = Σ_d grad[p, d] · w[d, e]       A: tokens,  B: weights, as they lie
//   dw[d, e]      = Σ_p grad[p, d] · patch[p, e]   A: tokens, transposed by blocks, B: patches
//
// Patches are normalised while they are packed (patch_embed_panels.h). The epilogues add bias and
// position and write the class token, or scatter dpatch as pixels: patches that do not overlap
// never share one.
#include "patch_embed.h"

#include <cstring>

#include "patch_embed_panels.h"
#include "split_sum.h"

namespace pyvit {
namespace {

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
  const Weight<const S> w(s, weight, patches.layout);
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
          pack_weight_columns<S>(b, w, patches.layout, k0, kb, n, columns);
        },
        writer);
  });
}

// ---- image gradient -----------------------------------------------------------------------

template <class S>
struct PixelWriter {
  S* data;
  PatchLayout layout;
  ChannelTable<Compute<S>> table;

  void operator()(const Compute<S>* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0,
                  int64_t nb) const {
    const int64_t step = layout.step[1], stride = layout.image_stride[3];
    for_each_run(layout.grid, m0, mb, [&](const PixelRun& run) {
      layout.for_each_segment(n0, n0 + nb, [&](const Segment& s) {
        S* row = data + layout.offset(run, s);
        const Compute<S>* from = c + run.at * ldc + (s.element - n0);
        // Whole rows of touching patches make one line; other pieces are written one by one.
        const int64_t fitting = s.count == step ? kLine / s.count : 1;
        for (int64_t t = 0; t < run.count; t += fitting)
          write(row + t * step * stride, from + t * ldc, ldc, std::min(fitting, run.count - t), s);
      });
    });
  }

 private:
  void write(S* to, const Compute<S>* from, int64_t ldc, int64_t patches, const Segment& s) const {
    Compute<S> line[kLine];
    for (int64_t u = 0; u < patches; ++u) widen_run(line + u * s.count, from + u * ldc, s.count);
    const int64_t n = patches * s.count, stride = layout.image_stride[3];
    table.rescale(line, n, s);
    if (stride == 1) {
      narrow_run(to, line, n);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = narrow<S>(line[i]);
    }
  }
};

template <class S>
void image_grad(const PatchEmbedShape& s, TokenView grad, View4 weight, const void* std,
                View4 dimage) {
  using T = Compute<S>;
  const PatchLayout layout(s, dimage);
  const PixelWriter<S> writer{static_cast<S*>(dimage.data), layout,
                              {s.channels, layout.interleaved, false, {nullptr, std}}};
  const bool covered = s.stride[0] == s.kernel[0] && s.stride[1] == s.kernel[1] &&
                       s.grid[0] * s.kernel[0] == s.height && s.grid[1] * s.kernel[1] == s.width;
  const int64_t image_size = s.channels * s.height * s.width;
  if (!covered)
    parallel_for(s.batch, [&](int64_t image) {
      std::memset(static_cast<void*>(writer.data + image * image_size), 0,
                  image_size * sizeof(S));
    });
  const Weight<const S> w(s, weight, layout);
  const BlockGrid<T> blocks(s.batch * s.grid[0] * s.grid[1],
                            s.channels * s.kernel[0] * s.kernel[1]);
  parallel_for(blocks.tasks(), [&](int64_t task) {
    gemm_block<T>(
        blocks.m0(task), blocks.height(task), blocks.n0(task), blocks.width(task), 0, s.embed_dim,
        [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
          pack_token_rows<S>(a, grad, s.grid, m, rows, k0, kb);
        },
        [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
          pack_weight_rows<S>(b, w, k0, kb, n, columns);
        },
        writer);
  });
}

// ---- weight gradient ----------------------------------------------------------------------

template <class S>
void store_weights(const Weight<S>& dw, int64_t d, int64_t e, const Compute<S>* from, int64_t n) {
  S* row = dw.data + d * dw.stride[0];
  if (dw.contiguous) return narrow_run(row + e, from, n);
  for (int64_t j = 0; j < n; ++j) row[dw.offset(e + j)] = narrow<S>(from[j]);
}

template <class S, class I>
void weight_grad(const PatchEmbedShape& s, TokenView grad, View4 image,
                 Normalisation normalisation, View4 dweight) {
  using T = Compute<S>;
  const Patches<T, I> patches(s, image, normalisation);
  const int64_t D = s.embed_dim, E = s.channels * s.kernel[0] * s.kernel[1];
  const Weight<S> dw(s, dweight, patches.layout);
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
          for (int64_t i = 0; i < mb; ++i, c += ldc) {
            if (split.parts > 1) {
              widen_run(split.partial(part) + (m0 + i) * E + n0, c, nb);
            } else {
              store_weights(dw, m0 + i, n0, c, nb);
            }
          }
        });
  });
  if (split.parts == 1) return;
  parallel_for(D, [&](int64_t d) {
    for (int64_t e = 0; e < E; ++e) {
      const T sum = split.sum(d * E + e);
      store_weights(dw, d, e, &sum, 1);
    }
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
