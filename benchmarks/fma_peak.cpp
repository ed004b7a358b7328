// Independent fused multiply-adds in registers: the arithmetic ceiling of one core.
// machine.py compiles this with -march=native and calls it from one thread per core.

#if defined(__AVX512F__)
constexpr int kBytes = 64, kChains = 24;
#elif defined(__AVX__)
constexpr int kBytes = 32, kChains = 12;
#else
constexpr int kBytes = 16, kChains = 12;
#endif

typedef float Vector __attribute__((vector_size(kBytes)));

// Returns the floating-point operations done; `sink` keeps the compiler from dropping them.
extern "C" double fma_burst(long rounds, float* sink) {
  Vector chains[kChains];
  for (int c = 0; c < kChains; ++c) chains[c] = Vector{} + static_cast<float>(c);
  const Vector scale = Vector{} + 0.999f, shift = Vector{} + 0.001f;
  for (long r = 0; r < rounds; ++r) {
#pragma GCC unroll 24
    for (int c = 0; c < kChains; ++c) chains[c] = chains[c] * scale + shift;
  }
  Vector sum{};
  for (int c = 0; c < kChains; ++c) sum += chains[c];
  *sink = sum[0];
  return 2.0 * kChains * (kBytes / sizeof(float)) * static_cast<double>(rounds);
}
