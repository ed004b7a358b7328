// The operands of patch embedding's products where they lie in memory, and how their slabs
// (product.cuh) come into shared memory.
#pragma once

#include <type_traits>

#include "cuda/divide.h"
#include "cuda/dtypes.h"
#include "cuda/product.cuh"

namespace pyvit::cuda {

// Lines of elements: a patch's pixels for each token, a token's features, a feature's weights.
// Line l is (image, row, column), element e is (outer, middle, inner), as the divisors cut them.
struct Operand {
  const void* data;
  int lines, elements;
  Divisor lines_of_image, lines_of_row;
  int64_t line_stride[3];
  Divisor elements_of_outer, elements_of_middle;
  int64_t element_stride[3];
  // How many elements, counted from any multiple of it, lie side by side in memory, aligned to
  // their size: a chunk of 16 bytes in shared memory, 4 bytes (of 16-bit elements two), or one.
  // Where they are only copied, the last ones of a line may be fewer; else they are of one outer
  // index, which is the channel unless that is inside.
  int unit;
  // (x · scale - mean) / std; the element's outer or inner index is the channel.
  const float* mean;  // or null
  const float* std;   // or null
  float scale;
  bool channel_inside;

  __device__ int64_t line(int l) const {
    const Quotient image(l, lines_of_image), row(image.rest, lines_of_row);
    return image.quotient * line_stride[0] + row.quotient * line_stride[1] +
           row.rest * line_stride[2];
  }
  __device__ int64_t element(int e) const {
    const Quotient outer(e, elements_of_outer), middle(outer.rest, elements_of_middle);
    return outer.quotient * element_stride[0] + middle.quotient * element_stride[1] +
           middle.rest * element_stride[2];
  }
  __device__ int channel(int e) const {
    const Quotient outer(e, elements_of_outer);
    return channel_inside ? Quotient(outer.rest, elements_of_middle).rest : outer.quotient;
  }
};

// x · scale - mean, divided by std, of one channel.
struct Normal {
  float scale, shift, factor;

  __device__ Normal(float scale, float shift, float factor)
      : scale(scale), shift(shift), factor(factor) {}
  __device__ Normal(const Operand& operand, int channel)
      : scale(operand.scale), shift(operand.mean ? -operand.mean[channel] : 0.0f),
        factor(operand.std ? 1.0f / operand.std[channel] : 1.0f) {}
  __device__ float operator()(float x) const { return fmaf(x, scale, shift) * factor; }
};

// f(std::integral_constant) of a unit of elements that become E.
template <class E, class F>
__device__ void with_unit(int unit, const F& f) {
  constexpr int kChunk = 16 / sizeof(E), kPair = 4 / sizeof(E);
  if (unit == kChunk) {
    f(std::integral_constant<int, kChunk>{});
  } else if (kPair > 1 && unit == kPair) {
    f(std::integral_constant<int, kPair>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Brings a tile's slabs, one after another along the sum: of a deep slab the next elements of the
// same lines, of a wide one the next lines. A thread has one chunk of kPasses lines in each.
template <class S, class E, int kThreads>
struct Share {
  static constexpr int kSpan = kThreads / S::kChunks, kPasses = S::kLines / kSpan;
  static_assert(kSpan * S::kChunks == kThreads && kPasses * kSpan == S::kLines, "equal shares");

  const Operand& operand;
  int last_line;  // one past it
  int first_line, element;
  int64_t offset[kPasses];  // of its lines; -1 past the last

  __device__ Share(const Operand& from, int line, int end, int first_element)
      : operand(from), last_line(min(end, from.lines)),
        first_line(line + static_cast<int>(threadIdx.x) / S::kChunks),
        element(first_element + chunk() * S::kChunk) {
    if (S::kDeep) find_lines(first_line);
  }
  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % S::kChunks; }

  __device__ void find_lines(int first) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int l = first + pass * kSpan;
      offset[pass] = l < last_line ? operand.line(l) : -1;
    }
  }
  // Moves to a slab; returns the first element of the chunk.
  __device__ int move_to(int slab) {
    if (!S::kDeep) find_lines(first_line + slab * S::kLines);
    return S::kDeep ? element + slab * S::kAcross : element;
  }
  __device__ static char* place(const S& to, int pass) {
    return to.chunk(static_cast<int>(threadIdx.x) / S::kChunks + pass * kSpan, chunk());
  }
};

// Elements as they are: by asynchronous copies of a chunk or of 4 bytes; else one by one.
template <class S, class E, int kThreads>
class Copy {
 public:
  __device__ Copy(const Operand& from, int line, int end, int first_element)
      : share_(from, line, end, first_element) {}

  __device__ void start(int slab, const S& to) {
    const Operand& operand = share_.operand;
    const int first = share_.move_to(slab), left = operand.elements - first;
    const E* data = static_cast<const E*>(operand.data);
    constexpr int kSize = sizeof(E), kPair = 4 / kSize;
    if (operand.unit == S::kChunk) {
      const int bytes = min(max(left, 0), S::kChunk) * kSize;
      const int64_t at = left > 0 ? operand.element(first) : 0;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int64_t line = share_.offset[pass];
        copy_async16(share_.place(to, pass), line < 0 ? data : data + line + at,
                     line < 0 ? 0 : bytes);
      }
    } else if (operand.unit == kPair) {
#pragma unroll
      for (int pair = 0; pair < S::kChunk / kPair; ++pair) {
        const int bytes = min(max(left - pair * kPair, 0), kPair) * kSize;
        const int64_t at = bytes > 0 ? operand.element(first + pair * kPair) : 0;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          const int64_t line = share_.offset[pass];
          copy_async4(share_.place(to, pass) + 4 * pair, line < 0 ? data : data + line + at,
                      line < 0 ? 0 : bytes);
        }
      }
    } else {
#pragma unroll 2
      for (int i = 0; i < S::kChunk; ++i) {
        const int64_t at = i < left ? operand.element(first + i) : 0;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          const int64_t line = share_.offset[pass];
          const bool there = line >= 0 && i < left;
          reinterpret_cast<E*>(share_.place(to, pass))[i] =
              there ? data[line + at] : narrow<E>(0.0f);
        }
      }
    }
  }
  __device__ void finish(const S&) {}

 private:
  static constexpr int kPasses = Share<S, E, kThreads>::kPasses;
  Share<S, E, kThreads> share_;
};

// Pixels that are normalised on their way: they are loaded into registers, a unit at a time, while
// products are made, and leave for shared memory afterwards.
template <class S, class E, class From, int kThreads>
class Normalise {
 public:
  __device__ Normalise(const Operand& from, int line, int end, int first_element)
      : share_(from, line, end, first_element) {}

  __device__ void start(int slab, const S&) {
    first_ = share_.move_to(slab);
    with_unit<E>(share_.operand.unit, [&](auto unit) { load<unit.value>(); });
  }
  __device__ void finish(const S& to) {
    const Operand& operand = share_.operand;
    with_unit<E>(operand.channel_inside ? 1 : operand.unit,
                 [&](auto unit) { write<unit.value>(to); });
  }

 private:
  static constexpr int kPasses = Share<S, E, kThreads>::kPasses;
  // A chunk as it is loaded: unpacked when it is needed, it takes fewer registers until then.
  struct alignas(sizeof(From) * S::kChunk) Words {
    uint32_t values[sizeof(From) * S::kChunk / 4];
  };

  template <int kUnit>
  __device__ void load() {
    const Operand& operand = share_.operand;
    const From* data = static_cast<const From*>(operand.data);
#pragma unroll
    for (int i = 0; i < S::kChunk; i += kUnit) {
      const bool inside = first_ + i < operand.elements;
      const int64_t at = inside ? operand.element(first_ + i) : 0;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int64_t line = share_.offset[pass];
        if (line >= 0 && inside) put<kUnit>(chunks_[pass], i, data + line + at);
      }
    }
  }
  // Elements i … i + kUnit - 1 of a chunk; those before them are there.
  template <int kUnit>
  __device__ static void put(Words& chunk, int i, const From* from) {
    constexpr int kBytes = kUnit * static_cast<int>(sizeof(From));
    const int at = i * static_cast<int>(sizeof(From));
    if constexpr (kUnit == S::kChunk) {
      chunk = *reinterpret_cast<const Words*>(from);
    } else if constexpr (kBytes == 4) {
      chunk.values[at / 4] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      using Part = std::conditional_t<kBytes == 2, uint16_t, uint8_t>;
      const uint32_t part = *reinterpret_cast<const Part*>(from);
      uint32_t& word = chunk.values[at / 4];
      word = at % 4 == 0 ? part : word | part << (8 * (at % 4));
    }
  }

  // kUnit elements have one channel.
  template <int kUnit>
  __device__ void write(const S& to) const {
    const Operand& operand = share_.operand;
    float shift[S::kChunk / kUnit], factor[S::kChunk / kUnit];
#pragma unroll
    for (int i = 0; i < S::kChunk / kUnit; ++i) {
      const int e = first_ + i * kUnit;
      const Normal normal(operand, e < operand.elements ? operand.channel(e) : 0);
      shift[i] = normal.shift, factor[i] = normal.factor;
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      alignas(16) E values[S::kChunk];
#pragma unroll
      for (int i = 0; i < S::kChunk; ++i) {
        const bool there = first_ + i / kUnit * kUnit < operand.elements && share_.offset[pass] >= 0;
        const Normal normal{operand.scale, shift[i / kUnit], factor[i / kUnit]};
        values[i] = narrow<E>(there ? normal(pixel(pass, i)) : 0.0f);
      }
      *reinterpret_cast<uint4*>(share_.place(to, pass)) = *reinterpret_cast<uint4*>(values);
    }
  }
  __device__ float pixel(int pass, int i) const {
    constexpr int kOfWord = 4 / sizeof(From);
    const uint32_t word = chunks_[pass].values[i / kOfWord];
    if constexpr (kOfWord == 1) {
      return __uint_as_float(word);
    } else if constexpr (kOfWord == 2) {
      const float2 pair = unpack<From>(word);
      return i % 2 == 0 ? pair.x : pair.y;
    } else {
      return static_cast<float>(word >> (8 * (i % 4)) & 255u);
    }
  }

  Share<S, E, kThreads> share_;
  int first_ = 0;
  Words chunks_[kPasses];
};

}  // namespace pyvit::cuda
