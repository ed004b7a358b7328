// How the numbers of a product are multiplied, for all kernels that have products: of 16 bits by
// mma; float32 by TF32 mma where that is allowed, else by fused multiply-adds, which round once
// each. Sums are float32 in all of them.
#pragma once

#include "cuda/hardware.h"

namespace pyvit::cuda {

template <class T>
struct Halves {  // bfloat16 or float16
  using Element = T;
};
struct Tf32 {
  using Element = float;
};
struct Fused {
  using Element = float;
};
template <class Kind>
constexpr bool kIsFused = false;
template <>
inline constexpr bool kIsFused<Fused> = true;
template <class Kind>
constexpr bool kIsTf32 = false;
template <>
inline constexpr bool kIsTf32<Tf32> = true;

// ---- of those that mma multiplies

// What ldmatrix, or plain loads, brought: to the bits that the product takes.
template <class Kind, int kCount>
__device__ void round_fragment(uint32_t (&r)[kCount]) {
  if constexpr (kIsTf32<Kind>) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) r[j] = to_tf32(__uint_as_float(r[j]));
  }
}

template <class Kind>
__device__ void multiply_step(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kIsTf32<Kind>) {
    multiply_add_tf32(d, a, b);
  } else {
    multiply_add<typename Kind::Element>(d, a, b);
  }
}

}  // namespace pyvit::cuda
