// What the kernels use of the hardware beyond CUDA C++ itself, one thin function each, and how they
// are launched. tests/cuda_emulation has the same header in plain C++: there a block's threads run
// on the host, and kernels are tested where there is no GPU. Kernels include this one alone.
//
// Rules that the emulation holds them to: all shared memory is dynamic; no float atomics; every
// collective names its lanes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyvit::cuda {

// ---- numbers of 16 bits

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(uint8_t x) { return static_cast<float>(x); }
__device__ inline float widen(bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(float16 x) { return __half2float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline float16 narrow<float16>(float x) {
  return __float2half_rn(x);
}

// Two numbers in a register, the first in its low half: as they lie in memory.
template <class T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bfloat16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ inline uint32_t pack<float16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T>
__device__ float2 unpack(uint32_t pair);
template <>
__device__ inline float2 unpack<bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<float16>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// Ten bits of fraction, as TF32 products take them.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}

// 2^x within 2 ulp; 0 for -inf.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// To an address aligned to 16 bytes, at once: the compiler takes some of such stores apart.
__device__ inline void store16(void* global, uint4 x) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

// ---- shared memory

// All of a block's: its size is said at the launch. Aligned to 128 bytes.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies of 16 bytes that pass no registers; `bytes` of them are read, the others become zeros.
__device__ inline void copy_async16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void copy_async4(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}
// Ends a group of copies; wait until all but the last kPending groups have arrived. A barrier must
// follow before other threads read what came.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrix fragments; g and t name a lane's place in all of them: g = lane / 4, t = lane % 4

// Four 8 x 8 matrices of 16 bits. Lane i says where row i % 8 of matrix i / 8 is; register j becomes
// elements (g, 2t) and (g, 2t + 1) of matrix j; of its transpose in the second function.
__device__ inline void load_matrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b for a of 16 x 16 and b of 16 x 8: registers of a hold rows g, g + 8 (of columns 2t,
// 2t + 1), again rows g, g + 8 (of columns 2t + 8, 2t + 9); of b column g and rows 2t, 2t + 1, then
// 2t + 8, 2t + 9; of d (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). Volatile: a warp's lanes
// multiply together, so the compiler must not move it to where d is used, which may be a branch.
template <class T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                              const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<float16>(float (&d)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with 8 terms of TF32: a holds (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4), b holds
// (t, g), (t + 4, g).
__device__ inline void multiply_add_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- launches

inline void check(const char* name, cudaError_t status) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // else the next launch would find this error again
    throw std::runtime_error(std::string("pyvit.") + name + ": the CUDA kernel could not be " +
                             "launched: " + cudaGetErrorString(status));
  }
}

// The most shared memory that a block may have on the present GPU: 163 KB on sm_80, 227 on sm_90.
inline size_t most_shared_memory() {
  int device = 0, bytes = 0;
  check("device", cudaGetDevice(&device));
  check("device",
        cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
}

template <class... P>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads,
            size_t shared_bytes, void* stream, P... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) {
    throw std::runtime_error(std::string("pyvit.") + name + ": a grid of " +
                             std::to_string(blocks) + " blocks, more than a launch can have");
  }
  if (shared_bytes > 48 * 1024) {
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(name, cudaGetLastError());
}

}  // namespace pyvit::cuda
