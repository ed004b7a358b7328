// csrc/cuda/hardware.h for the emulation: the same functions, in C++. Found in its stead because
// this folder's parent stands first among the include directories.
#pragma once

#include <cstdint>
#include <cstring>

#include "../language.h"

namespace pyvit::cuda {

// ---- numbers of 16 bits

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline float widen(uint8_t x) { return static_cast<float>(x); }
inline float widen(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float16 x) { return static_cast<float>(emulated_bits<_Float16>(x.bits)); }

template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bfloat16 narrow<bfloat16>(float x) {  // round to nearest, ties to even
  const uint32_t u = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
template <>
inline float16 narrow<float16>(float x) {
  return {emulated_bits<uint16_t>(static_cast<_Float16>(x))};
}

template <class T>
uint32_t pack(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}
template <class T>
float2 unpack(uint32_t pair) {
  return {widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})};
}

// Ten bits of fraction, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t u = __float_as_uint(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & 0xffffe000u;
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void store16(void* global, uint4 x) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    emulation::present().fail("a store of 16 bytes to an address that is not aligned");
  }
  std::memcpy(global, &x, 16);
}

// ---- shared memory

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::present().shared());
}

template <int kSize>
void emulated_copy(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % kSize != 0 ||
      reinterpret_cast<uintptr_t>(global) % kSize != 0) {
    emulation::present().fail("cp.async of " + std::to_string(kSize) +
                              " bytes between addresses that are not aligned");
  }
  emulation::present().copy({shared, global, static_cast<size_t>(bytes), kSize, 0});
}
inline void copy_async16(void* shared, const void* global, int bytes) {
  emulated_copy<16>(shared, global, bytes);
}
inline void copy_async4(void* shared, const void* global, int bytes) {
  emulated_copy<4>(shared, global, bytes);
}
inline void copy_async_commit() { emulation::present().end_group(); }
template <int kPending>
void copy_async_wait() {
  emulation::present().wait_for_groups(kPending);
}

// ---- matrix fragments; g and t name a lane's place in all of them: g = lane / 4, t = lane % 4

struct EmulatedMatrixLoad {
  const void* row;
  uint32_t* result;
};

template <bool kTransposed>
void emulated_load_matrix(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    emulation::present().fail("ldmatrix of a row that is not aligned to 16 bytes");
  }
  EmulatedMatrixLoad mine{row, r};
  emulation::present().meet("ldmatrix", 0xffffffffu, &mine, [](void* const* lanes, uint32_t) {
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const void* from = static_cast<EmulatedMatrixLoad*>(lanes[lane])->row;
      std::memcpy(matrix[lane / 8][lane % 8], from, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = kTransposed ? matrix[j][2 * t][g] : matrix[j][g][2 * t];
        const uint32_t high = kTransposed ? matrix[j][2 * t + 1][g] : matrix[j][g][2 * t + 1];
        static_cast<EmulatedMatrixLoad*>(lanes[lane])->result[j] = low | high << 16;
      }
    }
  });
}
inline void load_matrix(uint32_t (&r)[4], const void* row) { emulated_load_matrix<false>(r, row); }
inline void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
  emulated_load_matrix<true>(r, row);
}

struct EmulatedProduct {
  float* d;
  const uint32_t *a, *b;
};

// d += a b, 16 x 8 and kDepth terms, which take(register, half) reads from a lane's registers.
// Summed in double and rounded once: the hardware's own rounding is not documented.
template <int kDepth, class Element>
void emulated_product(void* const* lanes) {
  constexpr int kPair = kDepth / 8;  // elements in a register: 2 of 16 bits, 1 of 32
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* from = static_cast<EmulatedProduct*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kPair; ++half) {
      for (int j = 0; j < 4; ++j) {
        a[g + j % 2 * 8][(t + j / 2 * 4) * kPair + half] = Element{}(from->a[j], half);
      }
      for (int j = 0; j < 2; ++j) b[(t + j * 4) * kPair + half][g] = Element{}(from->b[j], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; ++j) {
      float& d = static_cast<EmulatedProduct*>(lanes[lane])->d[j];
      double sum = d;
      for (int k = 0; k < kDepth; ++k) {
        sum += double{a[g + j / 2 * 8][k]} * b[k][2 * t + j % 2];
      }
      d = static_cast<float>(sum);
    }
  }
}

template <class T>
struct EmulatedHalf {
  float operator()(uint32_t pair, int half) const {
    return widen(T{static_cast<uint16_t>(pair >> (16 * half))});
  }
};
struct EmulatedTf32 {
  float operator()(uint32_t x, int) const { return __uint_as_float(x & 0xffffe000u); }
};

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  EmulatedProduct mine{d, a, b};
  emulation::present().meet(
      "mma", 0xffffffffu, &mine,
      [](void* const* lanes, uint32_t) { emulated_product<16, EmulatedHalf<T>>(lanes); });
}
inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  EmulatedProduct mine{d, a, b};
  emulation::present().meet(
      "mma.tf32", 0xffffffffu, &mine,
      [](void* const* lanes, uint32_t) { emulated_product<8, EmulatedTf32>(lanes); });
}

// ---- launches

inline size_t most_shared_memory() { return emulation::most_shared_memory(); }

template <class... P>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads,
            size_t shared_bytes, void* /*stream*/, P... arguments) {
  if (blocks == 0) return;
  emulation::run_grid(name, reinterpret_cast<const void*>(kernel),
                      {static_cast<unsigned>(blocks), 1, 1}, static_cast<unsigned>(threads),
                      shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace pyvit::cuda
