// Three products (panel_product.h), E = C·kh·kw being a patch's size:
//
//   tokens[p, d]  = Σ_e patch[p, e] · w[d, e]      A: patches, B: weights, transposed by blocks
//   dpatch[p, e]  = Σ_d grad[p, d] · w[d, e]       A: tokens,  B: weights, as they lie
//   dw[d, e]      = Σ_p grad[p, d] · patch[p, e]   A: tokens, transposed by blocks, B: patches
//
// Patches are normalised while they are packed (patch_embed_panels.h). Tokens start as bias and
// position, and sums are added to them where they lie; dpatch is scattered as pixels: patches that
// do not overlap never share one.
#include "patch_embed.h"

#include <cstring>

#include "panel_product.h"
#include "patch_embed_panels.h"
#include "split_sum.h"

namespace pyvit {
namespace {

// ---- forward ------------------------------------------------------------------------------

template <class S, class I>
struct Forward {
  using T = Compute<S>;
  const Patches<T, I>& patches;
  const Weight<const S>& w;
  S* tokens;
  int64_t embed_dim, per_image;
  const S *bias, *position, *class_token;
  int64_t k_begin, k_end;

  int64_t skipped() const { return class_token != nullptr; }
  S* row(int64_t image, int64_t token) const {
    return tokens + (image * (per_image + skipped()) + token) * embed_dim;
  }

  void pack_a(T* to, int64_t pitch, int64_t m0, int64_t mb, int64_t k0, int64_t kb) const {
    patches.read(m0, mb, k0, k0 + kb, RowTarget<T>{to, pitch, k0});
  }
  void pack_b(const Strips<T>& to, int64_t n0, int64_t k0) const {
    pack_weight_columns<S>(to, w, patches.layout, n0, k0);
  }

  template <class F>
  void for_each_piece(int64_t m0, int64_t mb, int64_t n0, const F& f) const {
    for_each_image(per_image, m0, mb, [&](int64_t image, int64_t patch, int64_t at, int64_t count) {
      // In place only where S is T.
      f(at, count, reinterpret_cast<T*>(row(image, patch + skipped())) + n0, embed_dim);
    });
  }

  // c = bias + position; whoever computes an image's first patch writes its class token too.
  void start(T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) const {
    T first[ProductPlan<T>::kColumns] = {};
    if (bias != nullptr) widen_run(first, bias + n0, nb);
    for_each_image(per_image, m0, mb, [&](int64_t image, int64_t patch, int64_t at, int64_t count) {
      for (int64_t t = 0; t < count; ++t)
        add_position(c + (at + t) * ldc, first, patch + t + skipped(), n0, nb);
      if (patch == 0 && class_token != nullptr) write_class_token(image, n0, nb);
    });
  }
  void write_class_token(int64_t image, int64_t n0, int64_t nb) const {
    T line[ProductPlan<T>::kColumns];
    widen_run(line, class_token + n0, nb);
    add_position(line, line, 0, n0, nb);
    narrow_run(row(image, 0) + n0, line, nb);
  }
  void add_position(T* to, const T* from, int64_t token, int64_t n0, int64_t nb) const {
    if (position == nullptr) return widen_run(to, from, nb);
    const S* add = position + token * embed_dim + n0;
    for (int64_t j = 0; j < nb; ++j) to[j] = from[j] + widen(add[j]);
  }

  void finish(const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) const {
    for_each_image(per_image, m0, mb, [&](int64_t image, int64_t patch, int64_t at, int64_t count) {
      for (int64_t t = 0; t < count; ++t)
        narrow_run(row(image, patch + t + skipped()) + n0, c + (at + t) * ldc, nb);
    });
  }
};

template <class S, class I>
void forward(const PatchEmbedShape& s, View4 image, Normalisation normalisation, View4 weight,
             TokenTerms terms, void* tokens) {
  using T = Compute<S>;
  const Patches<T, I> patches(s, image, normalisation);
  const Weight<const S> w(s, weight, patches.layout);
  const int64_t per_image = s.grid[0] * s.grid[1], E = s.channels * s.kernel[0] * s.kernel[1];
  // A tile in place ends where an image does: with few patches in one it would be nearly empty.
  const bool in_place = std::is_same_v<S, T> && s.embed_dim % kLanes<T> == 0 &&
                        per_image >= 2 * RowTile<T>::pixels;
  run_product(ProductPlan<T>(s.batch * per_image, s.embed_dim, E, in_place),
              Forward<S, I>{patches,
                            w,
                            static_cast<S*>(tokens),
                            s.embed_dim,
                            per_image,
                            static_cast<const S*>(terms.bias),
                            static_cast<const S*>(terms.position),
                            static_cast<const S*>(terms.class_token),
                            0,
                            E});
}

// ---- image gradient -----------------------------------------------------------------------

template <class S>
struct ImageGrad {
  using T = Compute<S>;
  TokenView grad;
  const Weight<const S>& w;
  S* pixels;
  const PatchLayout& layout;
  const ChannelTable<T>& table;
  int64_t k_begin, k_end;

  void pack_a(T* to, int64_t pitch, int64_t m0, int64_t mb, int64_t k0, int64_t kb) const {
    pack_token_rows<S>(to, pitch, grad, layout.grid[0] * layout.grid[1], m0, mb, k0, kb);
  }
  void pack_b(const Strips<T>& to, int64_t n0, int64_t k0) const {
    pack_weight_rows<S>(to, w, n0, k0);
  }
  void start(T* c, int64_t ldc, int64_t, int64_t mb, int64_t, int64_t) const {
    std::fill(c, c + mb * ldc, T(0));
  }
  template <class F>
  void for_each_piece(int64_t, int64_t, int64_t, const F&) const {}  // never in place

  void finish(const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) const {
    const int64_t step = layout.step[1] * layout.image_stride[3];
    for_each_run(layout.grid, m0, mb, [&](const PixelRun& run) {
      layout.for_each_segment(n0, n0 + nb, [&](const Segment& s) {
        S* to = pixels + layout.offset(run, s);
        const int64_t at = s.element - n0;
        for (int64_t t = 0; t < run.count; ++t)
          rescale_run(to + t * step, layout.image_stride[3], c + (run.at + t) * ldc + at, s.count,
                      table.at(s));
      });
    });
  }
};

template <class S>
void image_grad(const PatchEmbedShape& s, TokenView grad, View4 weight, const void* std,
                View4 dimage) {
  using T = Compute<S>;
  S* const pixels = static_cast<S*>(dimage.data);
  const PatchLayout layout(s, dimage);
  const ChannelTable<T> table(layout, s.channels, false, {nullptr, std});
  const bool covered = s.stride[0] == s.kernel[0] && s.stride[1] == s.kernel[1] &&
                       s.grid[0] * s.kernel[0] == s.height && s.grid[1] * s.kernel[1] == s.width;
  const int64_t image_size = s.channels * s.height * s.width;
  if (!covered)
    parallel_for(s.batch, [&](int64_t image) {
      std::memset(static_cast<void*>(pixels + image * image_size), 0, image_size * sizeof(S));
    });
  const Weight<const S> w(s, weight, layout);
  run_product(ProductPlan<T>(s.batch * s.grid[0] * s.grid[1],
                             s.channels * s.kernel[0] * s.kernel[1], s.embed_dim, false),
              ImageGrad<S>{grad, w, pixels, layout, table, 0, s.embed_dim});
}

// ---- weight gradient ----------------------------------------------------------------------

template <class S>
void store_weights(const Weight<S>& dw, int64_t d, int64_t e, const Compute<S>* from, int64_t n) {
  S* row = dw.data + d * dw.stride[0];
  if (dw.contiguous) return narrow_run(row + e, from, n);
  for (int64_t j = 0; j < n; ++j) row[dw.offset(e + j)] = narrow<S>(from[j]);
}

template <class S, class I>
struct WeightGrad {
  using T = Compute<S>;
  TokenView grad;
  const Patches<T, I>& patches;
  const Weight<S>& dw;
  T* sums;  // rows of sums that lie in place, so far apart
  int64_t pitch;
  int64_t k_begin, k_end;

  void pack_a(T* to, int64_t to_pitch, int64_t m0, int64_t mb, int64_t k0, int64_t kb) const {
    const int64_t* grid = patches.layout.grid;
    pack_token_columns<S>(to, to_pitch, grad, grid[0] * grid[1], m0, mb, k0, kb);
  }
  void pack_b(const Strips<T>& to, int64_t n0, int64_t k0) const {
    patches.read(k0, to.rows, n0, n0 + to.width, StripTarget<T>{to, n0});
    clear_last_lanes(to);
  }
  void start(T* c, int64_t ldc, int64_t, int64_t mb, int64_t, int64_t nb) const {
    for (int64_t i = 0; i < mb; ++i) std::fill(c + i * ldc, c + i * ldc + nb, T(0));
  }
  template <class F>
  void for_each_piece(int64_t m0, int64_t mb, int64_t n0, const F& f) const {
    f(0, mb, sums + m0 * pitch + n0, pitch);
  }
  void finish(const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) const {
    for (int64_t i = 0; i < mb; ++i, c += ldc) {
      if (sums != nullptr) {
        widen_run(sums + (m0 + i) * pitch + n0, c, nb);
      } else {
        store_weights(dw, m0 + i, n0, c, nb);
      }
    }
  }
};

template <class S, class I>
void weight_grad(const PatchEmbedShape& s, TokenView grad, View4 image,
                 Normalisation normalisation, View4 dweight) {
  using T = Compute<S>;
  const Patches<T, I> patches(s, image, normalisation);
  const int64_t D = s.embed_dim, E = s.channels * s.kernel[0] * s.kernel[1];
  const Weight<S> dw(s, dweight, patches.layout);
  const SplitSum<T> split(s.batch * s.grid[0] * s.grid[1], D * E);
  const bool straight = split.parts == 1 && std::is_same_v<S, T> && dw.contiguous;
  const bool in_place = (straight || split.parts > 1) && E % kLanes<T> == 0;
  int64_t longest = 0;
  for (int64_t part = 0; part < split.parts; ++part)
    longest = std::max(longest, split.end(part) - split.begin(part));
  run_products(ProductPlan<T>(D, E, longest, in_place, split.parts), split.parts,
               [&](int64_t part) {
                 T* sums = split.parts > 1 ? split.partial(part)
                           : straight      ? reinterpret_cast<T*>(dw.data)
                                           : nullptr;
                 return WeightGrad<S, I>{grad, patches, dw, sums, straight ? dw.stride[0] : E,
                                         split.begin(part), split.end(part)};
               });
  if (split.parts == 1) return;
  parallel_for(D, [&](int64_t d) {
    split.sum_run(d * E, E, [&](int64_t e, const T* sums, int64_t count) {
      store_weights(dw, d, e, sums, count);
    });
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
