// dw[o, e] = Σ_p dy[o, p] · patch(x)[e, p]: a GEMM whose long axis is the pixels of the batch.
// Planar images have contiguous pixels, so patch elements are rows of A and dy is transposed into
// B; with channels last, dy is transposed into A and patch elements take the vector side.
#include "conv2d.h"

#include <vector>

#include "conv2d_patches.h"
#include "gemm.h"
#include "pixel_group.h"
#include "split_sum.h"
#include "transpose.h"

namespace pyvit {
namespace {

// Columns of dy as strips: B[pixel, o].
template <class S>
void pack_grad_strips(Compute<S>* dst, const S* dy, const int64_t stride[4], const int64_t grid[2],
                      int64_t k0, int64_t kb, int64_t n0, int64_t nb) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  for (int64_t j = 0; j < nb; j += NR, dst += kb * NR) {
    const int64_t width = std::min<int64_t>(NR, nb - j);
    for_each_run(grid, k0, kb, [&](const PixelRun& run) {
      const S* from = dy + run.image * stride[0] + run.row * stride[2] + run.column * stride[3] +
                      (n0 + j) * stride[1];
      transpose(dst + run.at * NR, NR, from, stride[1], stride[3], width, run.count);
    });
    for (int64_t k = 0; width < NR && k < kb; ++k)
      std::fill(dst + k * NR + width, dst + (k + 1) * NR, T(0));
  }
}

// Rows of dy: A[o, pixel].
template <class S>
void pack_grad_rows(Compute<S>* dst, const S* dy, const int64_t stride[4], const int64_t grid[2],
                    int64_t m0, int64_t mb, int64_t k0, int64_t kb) {
  using T = Compute<S>;
  for_each_run(grid, k0, kb, [&](const PixelRun& run) {
    const S* from = dy + run.image * stride[0] + run.row * stride[2] + run.column * stride[3] +
                    m0 * stride[1];
    transpose(dst + run.at, Panel<T>::lda, from, stride[3], stride[1], run.count, mb);
  });
}

// Elements of the patches of pixels [k0, k0 + kb) as strips: B[pixel, (row tap, column tap, c)].
template <class S>
void pack_patch_element_strips(Compute<S>* dst, const PatchSource<S>& source, int64_t k0,
                               int64_t kb, int64_t n0, int64_t nb) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  T line[Panel<T>::NB];
  const int64_t padded = round_up(nb, NR);
  std::fill(line + nb, line + padded, T(0));
  for_each_run(source.grid, k0, kb, [&](const PixelRun& run) {
    for (int64_t t = 0; t < run.count; ++t) {
      copy_patch(line, source, run.image, run.row, run.column + t, n0, n0 + nb);
      T* row = dst + (run.at + t) * NR;
      for (int64_t j = 0; j < padded; j += NR, row += kb * NR)
        std::copy(line + j, line + j + NR, row);
    }
  });
}

// Patch elements as rows: A[(c, row tap, column tap), pixel].
template <class S>
void pack_patch_element_rows(Compute<S>* dst, const PatchSource<S>& source, int64_t m0, int64_t mb,
                             int64_t k0, int64_t kb) {
  using T = Compute<S>;
  constexpr int NR = Panel<T>::NR;
  static_assert(Panel<T>::KC % NR == 0);  // a whole last group stays inside the row of A
  for (int64_t k = 0; k < kb; k += NR)
    copy_pixel_group(dst + k, Panel<T>::lda, source, m0, mb, k0 + k,
                     std::min<int64_t>(NR, kb - k));
}

template <class S>
void weight_grad(const Conv2dShape& shape, View4 dy, View4 x, View4 dw) {
  using T = Compute<S>;
  const PatchSource<S> whole = forward_patches<S>(shape, x);
  const int64_t G = shape.groups, O = shape.out_channels / G, E = whole.patch_size();
  const int64_t pixels = shape.batch * whole.pixels_per_image();
  const bool last = x.stride[1] == 1 && dy.stride[1] == 1 && x.stride[3] != 1 && O >= 8;
  const SplitSum<T> split(pixels, G * O * E);
  const int64_t parts = split.parts;

  // Where element e of a patch, (c, i, j) when planar and (i, j, c) with channels last, lies in dw.
  std::vector<int64_t> place(E);
  const int64_t C = whole.channels, columns = shape.kernel[1], taps = shape.kernel[0] * columns;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t c = last ? e % C : e / taps, tap = last ? e / C : e % taps;
    place[e] = c * dw.stride[1] + tap / columns * dw.stride[2] + tap % columns * dw.stride[3];
  }
  S* const result = static_cast<S*>(dw.data);
  const BlockGrid<T> grid(last ? O : E, last ? E : O, G * parts);
  const int64_t tasks = grid.tasks();
  parallel_for(tasks * G * parts, [&](int64_t task) {
    const int64_t block = task % tasks, g = task / tasks % G, part = task / tasks / G;
    PatchSource<S> source = whole;
    source.data += g * whole.channels * whole.stride[1];
    const S* grad = static_cast<const S*>(dy.data) + g * O * dy.stride[1];
    auto keep = [&](const T* c, int64_t ldc, int64_t m0, int64_t mb, int64_t n0, int64_t nb) {
      const int64_t o0 = last ? m0 : n0, o_count = last ? mb : nb, o_step = last ? ldc : 1;
      const int64_t e0 = last ? n0 : m0, e_count = last ? nb : mb, e_step = last ? 1 : ldc;
      for (int64_t o = 0; o < o_count; ++o, c += o_step) {
        const int64_t channel = g * O + o0 + o;
        T* sum = parts > 1 ? split.partial(part) + channel * E + e0 : nullptr;
        S* row = result + channel * dw.stride[0];
        for (int64_t e = 0; e < e_count; ++e) {
          if (parts > 1) {
            sum[e] = c[e * e_step];
          } else {
            row[place[e0 + e]] = narrow<S>(c[e * e_step]);
          }
        }
      }
    };
    const int64_t k_begin = split.begin(part), k_end = split.end(part);
    const int64_t m0 = grid.m0(block), mb = grid.height(block);
    const int64_t n0 = grid.n0(block), nb = grid.width(block);
    if (last) {
      gemm_block<T>(
          m0, mb, n0, nb, k_begin, k_end,
          [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
            pack_grad_rows(a, grad, dy.stride, source.grid, m, rows, k0, kb);
          },
          [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
            pack_patch_element_strips(b, source, k0, kb, n, columns);
          },
          keep);
    } else {
      gemm_block<T>(
          m0, mb, n0, nb, k_begin, k_end,
          [&](T* a, int64_t m, int64_t rows, int64_t k0, int64_t kb) {
            pack_patch_element_rows(a, source, m, rows, k0, kb);
          },
          [&](T* b, int64_t k0, int64_t kb, int64_t n, int64_t columns) {
            pack_grad_strips(b, grad, dy.stride, source.grid, k0, kb, n, columns);
          },
          keep);
    }
  });
  if (parts == 1) return;
  parallel_for(G * O, [&](int64_t row) {
    for (int64_t e = 0; e < E; ++e)
      result[row * dw.stride[0] + place[e]] = narrow<S>(split.sum(row * E + e));
  });
}

}  // namespace

void conv2d_weight_grad(DType dtype, const Conv2dShape& shape, View4 dy, View4 x, View4 dw) {
  dispatch(dtype, [&](auto s) { weight_grad<decltype(s)>(shape, dy, x, dw); });
}

}  // namespace pyvit
