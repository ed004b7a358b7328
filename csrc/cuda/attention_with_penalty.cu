// Dense attention and its rows' penalty terms: the passes of topk_attention.cu, in which no weight
// is dropped and the threshold says alone which of them are of the tail.
#include "cuda/attention_forward.cuh"

namespace pyvit::cuda {
namespace {
constexpr char kName[] = "attention_with_penalty";
}

void attention_with_penalty(DType dtype, bool tf32, const AttentionShape& shape, int64_t topk,
                            HeadRows q, HeadRows k, HeadRows v, HeadRows out,
                            const SavedRows& saved, void* stream) {
  attention::dispatch_kind(dtype, tf32, [&](auto kind) {
    using Kind = decltype(kind);
    const attention::ForwardCall call =
        attention::forward_call<Kind>(shape, topk, q, k, v, out, saved);
    const int64_t heads = shape.batch * shape.heads;
    const int most_bytes = attention::most_bytes_of_block();
    if (!attention::forward_kept<Kind, true>(kName, call, heads, most_bytes, stream)) {
      attention::forward_again<Kind, true>(kName, call, heads, most_bytes, stream);
    }
  });
}

}  // namespace pyvit::cuda
