// Sums over the threads of a warp or a block. Their order is fixed by the number of threads alone,
// so that sums of floats are the same bits every time; every thread gets the result.
//
// Blocks are whole warps. `shared` has room for kMostWarps values; the functions may be called one
// after another with the same.
#pragma once

#include "cuda/hardware.h"

namespace pyvit::cuda {

constexpr int kWarp = 32;
constexpr int kMostWarps = 32;

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Largest {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// Lanes in pairs, pairs of pairs: a commutative operation gives every lane the same bits.
template <class T, class Operation = Sum>
__device__ T warp_reduce(T value, Operation operation = {}) {
#pragma unroll
  for (int with = kWarp / 2; with > 0; with /= 2) {
    value = operation(value, __shfl_xor_sync(0xffffffffu, value, with));
  }
  return value;
}

// `none`: what changes no result.
template <class T, class Operation = Sum>
__device__ T block_reduce(T value, T* shared, Operation operation = {}, T none = T{}) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  value = warp_reduce(value, operation);
  __syncthreads();  // others may still read the values of the call before
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? shared[lane] : none, operation);
}

// The sum over the threads before this one, and that over all.
struct Prefix {
  int before, all;
};
__device__ inline Prefix block_prefix(int value, int* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  auto inclusive = [&](int sum) {  // of the lanes up to this one
#pragma unroll
    for (int by = 1; by < kWarp; by *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, by);
      if (lane >= by) sum += other;
    }
    return sum;
  };
  const int within = inclusive(value);
  __syncthreads();
  if (lane == kWarp - 1) shared[warp] = within;
  __syncthreads();
  const int of_warps = inclusive(lane < warps ? shared[lane] : 0);
  const int warps_before = __shfl_sync(0xffffffffu, of_warps, max(warp - 1, 0));
  const int all = __shfl_sync(0xffffffffu, of_warps, kWarp - 1);
  return {(warp == 0 ? 0 : warps_before) + within - value, all};
}

}  // namespace pyvit::cuda
