// Counting in 32 bits, and division by a number that the host knows: a multiplication and a shift
// instead of some thirty instructions.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/hardware.h"

namespace pyvit::cuda {

// Blocks may count a little beyond what there is.
constexpr int64_t kMostCounted = (int64_t{1} << 31) - (1 << 16);

inline int counted(const char* op, int64_t size, const char* of_what) {
  if (size > kMostCounted) {
    throw std::runtime_error(std::string("pyvit.") + op + ": " + std::to_string(size) + " " +
                             of_what + ", and a CUDA kernel counts them in 32 bits");
  }
  return static_cast<int>(size);
}

// For n and divisors of 0 <= n < 2^31, 1 <= divisor < 2^31.
struct Divisor {
  uint32_t by, factor, shift;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : by(static_cast<uint32_t>(divisor)), shift(0) {
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, factor) + n) >> shift; }
};

// n = quotient · divisor + rest
struct Quotient {
  int quotient, rest;
  __device__ Quotient(int n, const Divisor& divisor)
      : quotient(static_cast<int>(divisor.quotient(static_cast<uint32_t>(n)))),
        rest(n - quotient * static_cast<int>(divisor.by)) {}
};

}  // namespace pyvit::cuda
