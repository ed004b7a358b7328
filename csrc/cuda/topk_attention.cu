// Attention with exactly k keys a query, in one kernel, in one of four ways:
//
// - resident (attention_resident.cuh): up to 256 keys of 16 bits, as vision transformers have them.
//   A warp's scores never leave its registers.
// - kept (attention_scores.cuh, attention_forward.cuh): scores are made once and kept in shared
//   memory, each by the lane that made it, so that rounds of the cut load 16 bytes a lane with no
//   conflict and no barrier.
// - candidates (attention_candidates.cuh): few chosen keys among more than that. Scores are made
//   once, and those above a rising threshold go to lists in shared memory.
// - again (the same): many chosen keys among many. Scores are made anew in each round.
//
// In all of them a warp has sixteen queries, and scores have the layout of mma's results: four
// lanes share a row, so that its counts meet by two shuffles (and, where warps share rows, once in
// shared memory). A round of the cut (select.cuh: five or six are the rule) costs two instructions
// a score; products of weights and values are dense, with the weights of dropped keys at zero, but
// for candidates, whose values are gathered. The same scores come out of all four, bit for bit.
//
// Floors on an H200 in bfloat16, from what it is said to do (4.3 TB/s copied; about 500 TFLOP/s by
// mma.sync; 28 T simple instructions/s); nothing here was timed yet:
// - (64, 12, 197, 64): 78 MB or 18 us; two products, 15 GFLOP or 30 us on 208 keys; the cut, 31 M
//   scores at about 16 instructions, 20 us, which other warps' products hide: twelve share a
//   multiprocessor, 168 registers each. K and V come four times a head, out of the L2 cache.
// - (4, 12, 4096, 64), k = 64: one product, 103 GFLOP or 0.2 ms; 4 instructions a score, 0.12 ms;
//   some six cuts of lists, 0.2 ms; gathering 64 values a query, 1.6 GB out of the L2 cache, 0.3 ms.
//   Making scores again would take the product seven times.
// float32 by fused multiply-adds: 60 TFLOP/s, 65 us and 3.5 ms for the scores alone.
#include "cuda/attention_candidates.cuh"
#include "cuda/attention_forward.cuh"
#include "cuda/attention_resident.cuh"

#include <cmath>

namespace pyvit::cuda {

namespace {
constexpr char kName[] = "topk_attention";
}

// By bisection of the normal distribution function.
double attention::normal_place(int64_t k, int64_t n) {
  const double above = (k - 0.5) / n;
  double low = -9.0, high = 9.0;
  for (int i = 0; i < 40; ++i) {
    const double middle = 0.5 * (low + high);
    (0.5 * std::erfc(middle * 0.70710678118654752) > above ? low : high) = middle;
  }
  return low;
}

void topk_attention(DType dtype, bool tf32, const AttentionShape& shape, int64_t topk, HeadRows q,
                    HeadRows k, HeadRows v, HeadRows out, const SavedRows& saved, void* stream) {
  attention::dispatch_kind(dtype, tf32, [&](auto kind) {
    using Kind = decltype(kind);
    const attention::ForwardCall call =
        attention::forward_call<Kind>(shape, topk, q, k, v, out, saved);
    const int64_t heads = shape.batch * shape.heads;
    const int most_bytes = attention::most_bytes_of_block();
    if constexpr (sizeof(typename Kind::Element) == 2) {
      using T = typename Kind::Element;
      const auto fits = [&](int tiles) { return call.keys <= 8 * tiles; };
      if (fits(16) && attention::resident<T, 16>(kName, call, heads, most_bytes, stream)) return;
      if (fits(26) && attention::resident<T, 26>(kName, call, heads, most_bytes, stream)) return;
      if (fits(32) && attention::resident<T, 32>(kName, call, heads, most_bytes, stream)) return;
    }
    // Two blocks of a third of the larger GPUs' shared memory each hide each other's waiting.
    const auto kept = [&](int bytes) {
      return attention::forward_kept<Kind, false>(kName, call, heads, bytes, stream);
    };
    if (kept(most_bytes * 2 / 3)) return;
    if (call.selects && attention::candidates<Kind>(kName, call, heads, most_bytes, stream)) return;
    if (kept(most_bytes)) return;
    attention::forward_again<Kind, false>(kName, call, heads, most_bytes, stream);
  });
}

}  // namespace pyvit::cuda
