// Where the terms of a convolution's sums lie, and how they come into shared memory.
//
// The result and the image's gradient are the same sum over taps (i, j) and channels c,
//
//     out[p, n] = Σ_{i, j, c} source[row(p) + i·step, column(p) + j·step, c] · weight[n, i, j, c]
//
// with other numbers for each phase of the pixels. Terms k are numbered in that order, (i, j, c).
#pragma once

#include <numeric>

#include "cuda/divide.h"
#include "cuda/hardware.h"

namespace pyvit::cuda {

// One axis of a sum. Result t, of `size`, lies at first + t·every; tap i, of `taps`, is the
// kernel's tap + i·tap_step and reads the source at t·factor + offset + i·step.
struct Axis {
  int size, first, every, taps, tap, tap_step, factor, offset, step;
};

// An axis of the forward pass; or of the image's gradient, which has a phase for every residue of
// the stride: its pixels are reached by every `apart`-th tap, or by none. The first of a phase's
// taps is no other phase's.
struct AxisRule {
  int size, taps, stride, padding, dilation, apart, step, phases;
  bool gradient;
  Divisor sizes[2];  // of the phases that have one more, and of the others

  AxisRule() = default;
  AxisRule(bool of_gradient, int64_t results, int64_t kernel, int64_t every, int64_t margin,
           int64_t between)
      : size(static_cast<int>(results)), taps(static_cast<int>(kernel)),
        stride(static_cast<int>(every < (1 << 30) ? every : 1 << 30)),
        padding(static_cast<int>(margin)), dilation(taps > 1 ? static_cast<int>(between) : 1),
        apart(1), step(dilation), phases(1), gradient(of_gradient),
        sizes{Divisor(size > 0 ? size : 1), Divisor(size > 0 ? size : 1)} {
    if (gradient) {
      apart = stride / std::gcd(stride, dilation);
      step = -static_cast<int>(static_cast<int64_t>(apart) * dilation / stride);
      phases = stride < size ? stride : size;
      sizes[0] = Divisor((size + stride - 1) / stride);
      sizes[1] = Divisor(size / stride > 0 ? size / stride : 1);
    }
  }
  __host__ __device__ Axis axis(int phase) const {
    if (!gradient) return {size, 0, 1, taps, 0, 1, stride, -padding, step};
    int tap = dilation == 1 ? (phase + padding) % stride : 0;
    while (tap < first_taps() && (phase + padding - tap * dilation) % stride != 0) ++tap;
    const int reaching = tap < first_taps() ? taps_from(tap) : 0;
    if (reaching == 0) tap = 0;
    const int offset = (phase + padding - tap * dilation) / stride;
    return {(size - phase + stride - 1) / stride, phase, stride, reaching, tap, apart, 1, offset,
            step};
  }
  __host__ __device__ int first_taps() const { return apart < taps ? apart : taps; }
  __host__ __device__ int taps_from(int first) const { return (taps - first + apart - 1) / apart; }
  __device__ Divisor size_of(const Axis& axis) const {
    return sizes[axis.size == static_cast<int>(sizes[0].by) ? 0 : 1];
  }
};

constexpr int kOutside = -(1 << 30);  // far enough from any image

struct Line {  // a pixel of the result: where its first tap reads
  int y, x;
  int64_t at;
};
struct alignas(16) Term {  // (i, j, c), from there
  int y, x;
  uint32_t at_low, at_high;  // four words, which are read at once

  __device__ int64_t at() const {
    return static_cast<int64_t>(at_low | static_cast<uint64_t>(at_high) << 32);
  }
};

struct SourceShape {
  int64_t stride[4];  // batch, channel, row, column
  int height, width, channels;  // channels of a group
  Divisor of_channels;
};

// Pixels p < end of one phase, and the terms of their sums.
struct Source {
  SourceShape shape;
  Axis rows, columns;
  Divisor of_rows, of_columns;
  int end, terms;

  __device__ Source(const SourceShape& of, const Axis& y, const Axis& x, Divisor y_size,
                    Divisor x_size, int last)
      : shape(of), rows(y), columns(x), of_rows(y_size), of_columns(x_size), end(last),
        terms(y.taps * x.taps * of.channels) {}

  __device__ Line line(int p) const {
    if (p >= end) return {kOutside, 0, 0};
    const Quotient above(p, of_columns), image(above.quotient, of_rows);
    const int y = image.rest * rows.factor + rows.offset;
    const int x = above.rest * columns.factor + columns.offset;
    return {y, x, image.quotient * shape.stride[0] + y * shape.stride[2] + x * shape.stride[3]};
  }
  __device__ Term at_tap(int i, int j, int c) const {
    const int y = i * rows.step, x = j * columns.step;
    const int64_t at = y * shape.stride[2] + x * shape.stride[3] + c * shape.stride[1];
    return {y, x, static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32)};
  }
  __device__ Term term(int k) const {
    if (k >= terms) return {0, kOutside, 0, 0};
    const Quotient tap(k, shape.of_channels);
    const int i = tap.quotient / columns.taps;
    return at_tap(i, tap.quotient - i * columns.taps, tap.rest);
  }
  __device__ bool has(const Line& line, const Term& term) const {
    const auto y = static_cast<unsigned>(line.y + term.y);
    const auto x = static_cast<unsigned>(line.x + term.x);
    return (y < static_cast<unsigned>(shape.height)) & (x < static_cast<unsigned>(shape.width));
  }
};

template <int kBytes>
struct BitsOf {
  using type = uint32_t;
};
template <>
struct BitsOf<2> {
  using type = uint16_t;
};

// A chunk's elements, put together in a register each.
template <class E>
struct Chunk {
  static constexpr int kSize = 16 / sizeof(E);
  using Bits = typename BitsOf<sizeof(E)>::type;
  uint32_t words[4] = {0, 0, 0, 0};

  Chunk() = default;
  __device__ explicit Chunk(const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(E) == 4) {
        words[i] = __float_as_uint(values[i]);
      } else {
        words[i] = pack<E>(values[2 * i], values[2 * i + 1]);
      }
    }
  }
  __device__ void set(int e, const E* from, bool there = true) {
    const uint32_t read = *reinterpret_cast<const Bits*>(from), bits = there ? read : 0;
    words[e * sizeof(E) / 4] |= bits << (e * sizeof(E) % 4 * 8);
  }
  __device__ uint4 bits() const { return make_uint4(words[0], words[1], words[2], words[3]); }
  __device__ void store(char* to) const { *reinterpret_cast<uint4*>(to) = bits(); }
};

// A chunk's elements one by one: of one tap, from a term's channel on; or of terms with nothing in
// common. What is not there is read elsewhere and not taken: without branches the loads of several
// chunks are under way at once.
template <class E>
__device__ Chunk<E> gather_channels(const E* data, const Source& source, const Line& line,
                                    const Term& term) {
  const bool there = source.has(line, term);
  const E* from = there ? data + (line.at + term.at()) : data;
  Chunk<E> chunk;
#pragma unroll
  for (int e = 0; e < Chunk<E>::kSize; ++e) chunk.set(e, from + e * source.shape.stride[1], there);
  return chunk;
}

template <class E>
__device__ Chunk<E> gather_terms(const E* data, const Source& source, const Line& line,
                                 const Term* terms) {
  Chunk<E> chunk;
#pragma unroll
  for (int e = 0; e < Chunk<E>::kSize; ++e) {
    const Term term = terms[e];
    const bool there = source.has(line, term);
    const E* from = data + (line.at + term.at());
    chunk.set(e, there ? from : data, there);
  }
  return chunk;
}

// Brings slabs of an image: a line of shared memory is a pixel, its chunks are terms. Deep slabs
// have the same pixels and go on to other terms, wide ones the same terms and go on to other
// pixels; `first_line` and `first_term` are of the first slab. Asynchronous copies need chunks of
// channels that lie side by side, aligned: neighbouring threads copy neighbouring chunks. Else
// neighbouring threads read neighbouring pixels, a warp the same terms: each of its lanes finds one
// of them and tells it the others by shared memory, a table for each warp.
template <class S, class E, int kThreads, bool kAsync>
struct Bring {
  static constexpr int kSpan = kAsync ? S::kChunks : S::kLines;
  static constexpr int kStep = kThreads / kSpan;
  static constexpr int kPasses = S::kLines * S::kChunks / kThreads;
  static_assert(kThreads % kSpan == 0 && S::kLines * S::kChunks % kThreads == 0, "no remainder");
  static constexpr int kTerms = kPasses * S::kChunk;  // of a warp in a slab
  static constexpr int kTableBytes = kAsync ? 0 : kThreads / 32 * kTerms * sizeof(Term);
  static_assert(kAsync || (kSpan % 32 == 0 && kTerms <= 32), "a warp's terms are its lanes'");

  const E* data;
  const Source& source;
  int first_line, first_term;
  Line lines[S::kDeep && kAsync ? kPasses : 1];
  Term fixed;
  Term* table;
  Chunk<E> held[kAsync ? 1 : kPasses];

  // `tables` has kTableBytes of shared memory.
  __device__ Bring(const E* from, const Source& of, int line, int term, char* tables)
      : data(from), source(of), first_line(line), first_term(term),
        table(reinterpret_cast<Term*>(tables) + threadIdx.x / 32 * kTerms) {
    if constexpr (S::kDeep) {
#pragma unroll
      for (int pass = 0; pass < (kAsync ? kPasses : 1); ++pass) {
        lines[pass] = source.line(first_line + line_of(pass));
      }
    } else if constexpr (kAsync) {
      fixed = source.term(first_term + chunk_of(0) * S::kChunk);
    } else {
      find_terms(first_term);
    }
  }
  __device__ void find_terms(int from) {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // the terms before have been read
    if (lane < kTerms) {
      table[lane] =
          source.term(from + chunk_of(lane / S::kChunk) * S::kChunk + lane % S::kChunk);
    }
    __syncwarp();
  }
  __device__ static int line_of(int pass) {
    return kAsync ? threadIdx.x / kSpan + kStep * pass : threadIdx.x % kSpan;
  }
  __device__ static int chunk_of(int pass) {
    return kAsync ? threadIdx.x % kSpan : threadIdx.x / kSpan + kStep * pass;
  }

  __device__ void start(int slab, const S& to) {
    const int from_line = S::kDeep ? first_line : first_line + slab * S::kTerms;
    const int from_term = S::kDeep ? first_term + slab * S::kTerms : first_term;
    if constexpr (kAsync) {
      const Term term = S::kDeep ? source.term(from_term + chunk_of(0) * S::kChunk) : fixed;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const Line line = S::kDeep ? lines[pass] : source.line(from_line + line_of(pass));
        const bool there = source.has(line, term);
        copy_async16(to.chunk(line_of(pass), chunk_of(pass)),
                     there ? data + (line.at + term.at()) : data, there ? 16 : 0);
      }
    } else {
      const Line line = S::kDeep ? lines[0] : source.line(from_line + line_of(0));
      if constexpr (S::kDeep) find_terms(from_term);
      if (source.shape.channels % S::kChunk == 0) {  // a chunk is channels of one tap
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          held[pass] = gather_channels(data, source, line, table[pass * S::kChunk]);
        }
      } else {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          held[pass] = gather_terms(data, source, line, table + pass * S::kChunk);
          __syncwarp();  // keeps the compiler from more loads at once than registers hold
        }
      }
    }
  }
  __device__ void finish(const S& to) {
    if constexpr (!kAsync) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        held[pass].store(to.chunk(line_of(pass), chunk_of(pass)));
      }
    }
  }
};

}  // namespace pyvit::cuda
