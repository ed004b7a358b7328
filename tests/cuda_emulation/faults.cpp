// Kernels with one planted fault each, and the same without it: what the emulation must see. A
// program of its own, built by tests/test_cuda_emulation.py with AddressSanitizer:
//
//   faults NAME ORDER SEED    prints what the kernel left in its result, or why it was stopped
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/hardware.h"

using namespace pyvit::cuda;

namespace {

constexpr int kThreads = 128;
constexpr unsigned kAll = 0xffffffffu;

// Each thread leaves its number in shared memory and reads its neighbour's.
template <bool kBarrier>
__global__ void neighbours(int* result) {
  int* numbers = dynamic_shared<int>();
  numbers[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncthreads();
  result[threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads];
}

// The same twice: the second round must not write what the first one still reads.
template <bool kBarrier>
__global__ void rounds(int* result) {
  int* numbers = dynamic_shared<int>();
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    numbers[threadIdx.x] = threadIdx.x + 1000 * round;
    __syncthreads();
    sum += numbers[(threadIdx.x + 1) % kThreads];
    if (kBarrier) __syncthreads();
  }
  result[threadIdx.x] = sum;
}

// A warp's lanes speak through shared memory without __syncwarp.
template <bool kBarrier>
__global__ void lanes(int* result) {
  int* numbers = dynamic_shared<int>();
  numbers[threadIdx.x] = threadIdx.x;
  if (kBarrier) __syncwarp();
  result[threadIdx.x] = numbers[threadIdx.x ^ 1];
}

template <int kBeyond>
__global__ void shared_end(int* result) {
  dynamic_shared<int>()[threadIdx.x + kBeyond] = 1;
  result[threadIdx.x] = 1;
}

template <int kBeyond>
__global__ void global_end(int* result) {
  result[threadIdx.x + kBeyond] = 1;
}

// The sum over the lower half of a warp.
__global__ void masked(int* result, unsigned mask, bool upper_too) {
  const int lane = threadIdx.x % 32;
  int sum = lane;
  if (lane < 16 || upper_too) {
    for (int by = 8; by > 0; by /= 2) sum += __shfl_xor_sync(mask, sum, by);
  }
  result[threadIdx.x] = sum;
}

__global__ void unmasked_source(int* result) {
  const int lane = threadIdx.x % 32;
  result[threadIdx.x] = lane < 16 ? __shfl_sync(0x0000ffffu, lane, 20) : 0;
}

__global__ void early_return(int* result) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  result[threadIdx.x] = 1;
}

__global__ void half_at_barrier(int* result) {
  if (threadIdx.x % 32 == 0) {
    __syncthreads();
  } else {
    result[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  }
}

// Asynchronous copies, read with or without waiting for them.
template <bool kWait>
__global__ void copies(int* result) {
  int* numbers = dynamic_shared<int>();
  copy_async4(numbers + threadIdx.x, result + threadIdx.x, 4);
  copy_async_commit();
  if (kWait) copy_async_wait<0>();
  __syncthreads();
  result[threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads] + 1;
}

// Then other numbers into the same place: not to be asked for while the first ones are read.
template <bool kBarrier>
__global__ void copies_again(int* result) {
  int* numbers = dynamic_shared<int>();
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    const int from = round == 0 ? threadIdx.x : kThreads - 1 - threadIdx.x;
    copy_async4(numbers + threadIdx.x, result + from, 4);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    sum += numbers[(threadIdx.x + 1) % kThreads];
    if (kBarrier) __syncthreads();
  }
  result[threadIdx.x] = sum;
}

__global__ void misaligned_rows(int* result) {
  uint32_t r[4];
  load_matrix(r, dynamic_shared<char>() + 4);
  result[threadIdx.x] = static_cast<int>(r[0]);
}

// 16 x kDepth times kDepth x 8 by one warp, with fragments as PTX documents them: `a` by rows,
// `b` by columns. Small whole numbers, so that every sum is exact.
template <class T>
__global__ void product(const T* a, const T* b, float* d) {
  T* shared = dynamic_shared<T>();  // a, then b's columns
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * 16; i += 32) shared[i] = a[i];
  for (int i = lane; i < 8 * 16; i += 32) shared[16 * 16 + i] = b[i];
  __syncwarp();
  uint32_t rows[4], columns[4];
  // Matrices of a: the upper left, lower left, upper right and lower right 8 x 8.
  load_matrix(rows, shared + (lane % 16) * 16 + lane / 16 * 8);
  // b's columns are rows of the matrices: two of them, and again.
  load_matrix(columns, shared + 16 * 16 + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sums[4] = {};
  multiply_add<T>(sums, rows, {columns[0], columns[1]});
  // The same with a's fragment taken from its transpose, which lies where a was.
  __syncwarp();
  for (int i = lane; i < 16 * 16; i += 32) shared[i % 16 * 16 + i / 16] = a[i];
  __syncwarp();
  load_matrix_transposed(rows, shared + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
  multiply_add<T>(sums, rows, {columns[0], columns[1]});
  for (int j = 0; j < 4; ++j) d[(g + j / 2 * 8) * 8 + 2 * t + j % 2] = sums[j] / 2;
}

__global__ void product_tf32(const float* a, const float* b, float* d) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  float sums[4] = {};
  for (int first = 0; first < 16; first += 8) {
    uint32_t rows[4], columns[2];
    for (int j = 0; j < 4; ++j) rows[j] = to_tf32(a[(g + j % 2 * 8) * 16 + first + t + j / 2 * 4]);
    for (int j = 0; j < 2; ++j) columns[j] = to_tf32(b[g * 16 + first + t + j * 4]);
    multiply_add_tf32(sums, rows, columns);
  }
  for (int j = 0; j < 4; ++j) d[(g + j / 2 * 8) * 8 + 2 * t + j % 2] = sums[j];
}

template <class T, class Kernel>
void compare_product(Kernel kernel) {
  std::vector<T> a(16 * 16), b(8 * 16);
  for (int i = 0; i < 16 * 16; ++i) a[i] = narrow<T>(static_cast<float>(i * 7 % 19 - 9));
  for (int i = 0; i < 8 * 16; ++i) b[i] = narrow<T>(static_cast<float>(i * 5 % 23 - 11));
  std::vector<float> d(16 * 8);
  launch("product", kernel, 1, 32, (16 + 8) * 16 * sizeof(T), nullptr,
         static_cast<const T*>(a.data()), static_cast<const T*>(b.data()), d.data());
  bool equal = true;
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += widen(a[row * 16 + k]) * widen(b[column * 16 + k]);
      equal = equal && sum == d[row * 8 + column];
    }
  }
  std::printf(equal ? "equal" : "different");
  std::exit(0);
}

void run(const std::string& name, int* result) {
  const int bytes = kThreads * 4;
  auto start = [&](auto kernel) { launch(name.c_str(), kernel, 1, kThreads, bytes, nullptr, result); };
  auto masked_by = [&](unsigned mask, bool upper_too) {
    launch(name.c_str(), masked, 1, kThreads, 0, nullptr, result, mask, upper_too);
  };
  if (name == "neighbours") return start(neighbours<true>);
  if (name == "neighbours without barrier") return start(neighbours<false>);
  if (name == "rounds") return start(rounds<true>);
  if (name == "rounds without barrier") return start(rounds<false>);
  if (name == "lanes") return start(lanes<true>);
  if (name == "lanes without barrier") return start(lanes<false>);
  if (name == "shared end") return start(shared_end<0>);
  if (name == "beyond shared end") return start(shared_end<1>);
  if (name == "global end") return start(global_end<0>);
  if (name == "beyond global end") return start(global_end<1>);
  if (name == "masked") return masked_by(0x0000ffffu, false);
  if (name == "mask of lanes that do not come") return masked_by(kAll, false);
  if (name == "mask without own lane") return masked_by(0x0000ffffu, true);
  if (name == "source outside mask") return start(unmasked_source);
  if (name == "early return") return start(early_return);
  if (name == "half at barrier") return start(half_at_barrier);
  if (name == "copies") return start(copies<true>);
  if (name == "copies without waiting") return start(copies<false>);
  if (name == "copies again") return start(copies_again<true>);
  if (name == "copies again without barrier") return start(copies_again<false>);
  if (name == "misaligned rows") return start(misaligned_rows);
  if (name == "product bf16") return compare_product<bfloat16>(product<bfloat16>);
  if (name == "product f16") return compare_product<float16>(product<float16>);
  if (name == "product tf32") return compare_product<float>(product_tf32);
  throw std::invalid_argument("no kernel is called " + name);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  emulation::schedule() = {static_cast<emulation::Schedule::Order>(std::atoi(argv[2])),
                           std::strtoull(argv[3], nullptr, 10)};
  std::vector<int> result(kThreads);
  for (int i = 0; i < kThreads; ++i) result[i] = i;
  try {
    run(argv[1], result.data());
  } catch (const std::runtime_error& error) {
    std::printf("stopped: %s\n", error.what());
    return 3;
  }
  for (const int value : result) std::printf("%d ", value);
  return 0;
}
