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
    if constexpr (sizeof(typename Kind::Element) == 2) {
      using T = typename Kind::Element;
      const auto fits = [&](int tiles) { return call.keys <= 8 * tiles; };
      if (fits(16) && attention::resident<T, 16>(kName, call, heads, stream)) return;
      if (fits(26) && attention::resident<T, 26>(kName, call, heads, stream)) return;
      if (fits(32) && attention::resident<T, 32>(kName, call, heads, stream)) return;
    }
    attention::forward<Kind, false>(kName, call, heads, stream);
  });
}

}  // namespace pyvit::cuda
