// What CUDA C++ adds to C++, for the host's compiler: as much of it as csrc/cuda uses.
//
// Left out on purpose, so that a kernel which uses them does not compile: __shared__ variables (all
// shared memory is asked for at the launch, where the emulation can watch its end), atomic sums of
// floats (their order changes from run to run), and collectives without a mask.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// ---- where a thread is

struct EmulatedThreadIndex {
  struct Axis {
    operator unsigned() const { return static_cast<unsigned>(emulation::present().thread()); }
  };
  Axis x;
};
struct EmulatedBlockSize {
  struct Axis {
    operator unsigned() const { return static_cast<unsigned>(emulation::present().threads()); }
  };
  Axis x;
};
inline constexpr EmulatedThreadIndex threadIdx{};
inline constexpr EmulatedBlockSize blockDim{};
#define blockIdx (emulation::present().block())
#define gridDim (emulation::present().grid())

// ---- vectors

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- bits and numbers

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32);
}
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class To, class From>
To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "another size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }

inline int min(int a, int b) { return b < a ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline long min(long a, long b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long max(long a, long b) { return a < b ? b : a; }

// ---- memory

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// One thread runs at a time. Of integers alone: the order of such sums does not matter.
inline int atomicAdd(int* p, int value) { return std::exchange(*p, *p + value); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return std::exchange(*p, *p + value); }
inline int atomicMax(int* p, int value) { return std::exchange(*p, std::max(*p, value)); }
inline int atomicMin(int* p, int value) { return std::exchange(*p, std::min(*p, value)); }
inline unsigned atomicOr(unsigned* p, unsigned value) { return std::exchange(*p, *p | value); }

// ---- barriers

inline void __syncthreads() { emulation::present().barrier(0); }
inline int __syncthreads_count(int predicate) {
  return emulation::present().barrier(predicate != 0);
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) {
  return __syncthreads_count(predicate) == emulation::present().threads();
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::present().meet("__syncwarp", mask, nullptr, [](void* const*, uint32_t) {});
}

// ---- shuffles: every lane takes the value of one, which must be in the mask

template <class T>
struct EmulatedShuffle {
  T value;
  int source;
  T result;
};

template <class T>
T emulated_shuffle(const char* what, unsigned mask, T value, int source) {
  EmulatedShuffle<T> mine{value, source, value};
  emulation::present().meet(what, mask, &mine, [](void* const* lanes, uint32_t) {
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      auto* to = static_cast<EmulatedShuffle<T>*>(lanes[lane]);
      if (to == nullptr || to->source == lane) continue;
      const auto* from = static_cast<EmulatedShuffle<T>*>(lanes[to->source]);
      if (from == nullptr) {
        emulation::present().fail("a shuffle takes the value of lane " +
                                  std::to_string(to->source) + ", which is not in its mask");
      }
      to->result = from->value;
    }
  });
  return mine.result;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = emulation::kWarp) {
  const int lane = emulation::present().lane();
  return emulated_shuffle("__shfl_sync", mask, value,
                          (lane & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = emulation::kWarp) {
  const int lane = emulation::present().lane(), source = lane ^ with;
  return emulated_shuffle("__shfl_xor_sync", mask, value,
                          source / width <= lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = emulation::kWarp) {
  const int lane = emulation::present().lane(), source = lane - static_cast<int>(by);
  return emulated_shuffle("__shfl_up_sync", mask, value,
                          source >= (lane & -width) ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = emulation::kWarp) {
  const int lane = emulation::present().lane(), source = lane + static_cast<int>(by);
  return emulated_shuffle("__shfl_down_sync", mask, value,
                          source <= (lane | (width - 1)) ? source : lane);
}

// ---- votes and sums of integers

struct EmulatedVote {
  int value;
  int result;
};

template <class Reduce>
int emulated_vote(const char* what, unsigned mask, int value, Reduce) {
  EmulatedVote mine{value, 0};
  emulation::present().meet(what, mask, &mine, [](void* const* lanes, uint32_t all) {
    const int result = Reduce{}(lanes, all);
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      if (lanes[lane] != nullptr) static_cast<EmulatedVote*>(lanes[lane])->result = result;
    }
  });
  return mine.result;
}

struct EmulatedBallot {
  int operator()(void* const* lanes, uint32_t) const {
    unsigned result = 0;
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const auto* vote = static_cast<const EmulatedVote*>(lanes[lane]);
      if (vote != nullptr && vote->value != 0) result |= 1u << lane;
    }
    return static_cast<int>(result);
  }
};
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(emulated_vote("__ballot_sync", mask, predicate, EmulatedBallot{}));
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulated_vote("__any_sync", mask, predicate, EmulatedBallot{}) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
             emulated_vote("__all_sync", mask, predicate, EmulatedBallot{})) == mask;
}

template <class Operation>
struct EmulatedFold {
  int operator()(void* const* lanes, uint32_t mask) const {
    const int first = __builtin_ctz(mask);
    int result = static_cast<const EmulatedVote*>(lanes[first])->value;
    for (int lane = first + 1; lane < emulation::kWarp; ++lane) {
      const auto* vote = static_cast<const EmulatedVote*>(lanes[lane]);
      if (vote != nullptr) result = Operation{}(result, vote->value);
    }
    return result;
  }
};
struct EmulatedSum {
  int operator()(int a, int b) const { return a + b; }
};
struct EmulatedLeast {
  int operator()(int a, int b) const { return std::min(a, b); }
};
struct EmulatedLargest {
  int operator()(int a, int b) const { return std::max(a, b); }
};
inline int __reduce_add_sync(unsigned mask, int value) {
  return emulated_vote("__reduce_add_sync", mask, value, EmulatedFold<EmulatedSum>{});
}
inline int __reduce_min_sync(unsigned mask, int value) {
  return emulated_vote("__reduce_min_sync", mask, value, EmulatedFold<EmulatedLeast>{});
}
inline int __reduce_max_sync(unsigned mask, int value) {
  return emulated_vote("__reduce_max_sync", mask, value, EmulatedFold<EmulatedLargest>{});
}
