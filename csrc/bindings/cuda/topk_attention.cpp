#include "cuda/topk_attention.h"

#include <tuple>

#include "bindings/cuda/device.h"

namespace pyvit {
namespace {

using cuda::AttentionShape;
using cuda::HeadRows;

// [batch, head, row, column] in the memory order batch, row, head, column where heads_last.
Tensor empty_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
                  bool heads_last) {
  if (!heads_last) return empty_like_options(like, {batch, heads, rows, columns});
  return torch::stable::transpose(empty_like_options(like, {batch, rows, heads, columns}), 1, 2);
}

HeadRows head_rows(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(sizes[3] <= 1 || strides[3] == 1,
                  "pyvit: an attention kernel was given columns that are not contiguous");
  return {const_cast<void*>(tensor.const_data_ptr()), {strides[0], strides[1], strides[2]}};
}
HeadRows head_rows(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? head_rows(*tensor) : HeadRows{};
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return {q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3), scale};
}

float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }
const float* floats(const std::optional<Tensor>& tensor) {
  return static_cast<const float*>(data_or_null(tensor));
}

// Which keys were kept is saved as one bit a key, where some were not.
std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, int64_t topk,
                                           double scale, bool save, bool allow_tf32) {
  const AttentionShape s = shape_of(q, k, v, scale);
  const bool chosen = save && topk < s.keys;
  Tensor out = empty_rows(q, s.batch, s.heads, s.queries, s.value_dim, true);
  Tensor selection = empty_of(q, {s.batch, s.heads, s.queries, chosen ? (s.keys + 7) / 8 : 0},
                              ScalarType::Byte);
  Tensor softmax = empty_of(q, {s.batch, s.heads, s.queries, save ? 2 : 0}, ScalarType::Float);
  if (out.numel() > 0) {
    const cuda::SavedRows saved{
        chosen ? static_cast<uint8_t*>(selection.mutable_data_ptr()) : nullptr,
        save ? floats(softmax) : nullptr, nullptr, nullptr};
    cuda::topk_attention(dtype_of(q), allow_tf32, s, topk, head_rows(q), head_rows(k),
                         head_rows(v), head_rows(out), saved, stream_of(q));
  }
  return {out, selection, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with_penalty(Tensor q, Tensor k, Tensor v,
                                                                int64_t topk, double scale,
                                                                bool save, bool allow_tf32) {
  const AttentionShape s = shape_of(q, k, v, scale);
  Tensor out = empty_rows(q, s.batch, s.heads, s.queries, s.value_dim, true);
  Tensor tail = empty_of(q, {s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor hoyer = empty_of(q, {s.batch, s.heads, s.queries}, ScalarType::Float);
  Tensor selection = empty_of(q, {s.batch, s.heads, s.queries, save ? (s.keys + 7) / 8 : 0},
                              ScalarType::Byte);
  if (out.numel() > 0) {
    const cuda::SavedRows saved{
        save ? static_cast<uint8_t*>(selection.mutable_data_ptr()) : nullptr, nullptr,
        floats(tail), floats(hoyer)};
    cuda::attention_with_penalty(dtype_of(q), allow_tf32, s, topk, head_rows(q), head_rows(k),
                                 head_rows(v), head_rows(out), saved, stream_of(q));
  }
  return {out, tail, hoyer, selection};
}

// The wanted gradients; the others are empty.
struct Gradients {
  Tensor dq, dk, dv;

  Gradients(const Tensor& like, const AttentionShape& s, bool heads_last, bool needs_q,
            bool needs_k, bool needs_v)
      : dq(make(like, s, s.queries, s.dim, heads_last, needs_q)),
        dk(make(like, s, s.keys, s.dim, heads_last, needs_k)),
        dv(make(like, s, s.keys, s.value_dim, heads_last, needs_v)) {}

  static Tensor make(const Tensor& like, const AttentionShape& s, int64_t rows, int64_t columns,
                     bool heads_last, bool wanted) {
    return wanted ? empty_rows(like, s.batch, s.heads, rows, columns, heads_last)
                  : empty_like_options(like, {0});
  }
  static HeadRows rows(const Tensor& tensor) {
    return tensor.numel() > 0 ? head_rows(tensor) : HeadRows{};
  }
  bool any() const { return dq.numel() + dk.numel() + dv.numel() > 0; }
};

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> out,
                                            std::optional<Tensor> q, std::optional<Tensor> k,
                                            std::optional<Tensor> v, Tensor selection,
                                            Tensor softmax, int64_t topk, int64_t keys,
                                            double scale, bool heads_last, bool needs_q,
                                            bool needs_k, bool needs_v, bool allow_tf32) {
  const AttentionShape s{grad.size(0), grad.size(1),  grad.size(2), keys,
                         q->size(3),   grad.size(3), scale};
  const Gradients g(grad, s, heads_last, needs_q, needs_k, needs_v);
  if (!g.any()) return {g.dq, g.dk, g.dv};
  Tensor delta = empty_of(grad, {s.batch, s.heads, s.queries}, ScalarType::Float);
  if (needs_q || needs_k) {
    cuda::attention_delta(dtype_of(grad), s, head_rows(grad), head_rows(out), floats(delta),
                          stream_of(grad));
  }
  cuda::attention_gradients(
      dtype_of(grad), allow_tf32, s,
      {head_rows(grad), head_rows(q), head_rows(k), head_rows(v),
       static_cast<const float*>(softmax.const_data_ptr()), floats(delta), nullptr, nullptr,
       selection.numel() > 0 ? static_cast<const uint8_t*>(selection.const_data_ptr()) : nullptr,
       topk == 1 || keys == 1, Gradients::rows(g.dq), Gradients::rows(g.dk),
       Gradients::rows(g.dv)},
      stream_of(grad));
  return {g.dq, g.dk, g.dv};
}

std::tuple<Tensor, Tensor, Tensor> dense_backward(
    Tensor grad, Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> grad_tail,
    std::optional<Tensor> grad_hoyer, std::optional<Tensor> selection, double scale,
    bool heads_last, bool needs_q, bool needs_k, bool needs_v, bool allow_tf32) {
  const AttentionShape s = shape_of(q, k, grad, scale);
  const Gradients g(grad, s, heads_last, needs_q, needs_k, needs_v);
  if (!g.any()) return {g.dq, g.dk, g.dv};
  const bool wants_scores = needs_q || needs_k, penalty = wants_scores && grad_tail.has_value();
  const std::vector<int64_t> rows = {s.batch, s.heads, s.queries};
  Tensor softmax = empty_of(grad, {s.batch, s.heads, s.queries, 2}, ScalarType::Float);
  Tensor delta = empty_of(grad, rows, ScalarType::Float);
  Tensor norm = empty_of(grad, penalty ? rows : Ints{0}, ScalarType::Float);
  const auto* bits = penalty ? static_cast<const uint8_t*>(data_or_null(selection)) : nullptr;
  const float* of_tail = penalty ? floats(grad_tail) : nullptr;
  cuda::attention_terms(dtype_of(grad), allow_tf32, s, head_rows(q), head_rows(k), head_rows(v),
                        head_rows(grad),
                        {of_tail, penalty ? floats(grad_hoyer) : nullptr, bits, floats(softmax),
                         wants_scores ? floats(delta) : nullptr, penalty ? floats(norm) : nullptr},
                        stream_of(grad));
  cuda::attention_gradients(dtype_of(grad), allow_tf32, s,
                            {head_rows(grad), head_rows(q), head_rows(k), head_rows(v),
                             floats(softmax), floats(delta), penalty ? floats(norm) : nullptr,
                             of_tail, bits, s.keys == 1, Gradients::rows(g.dq),
                             Gradients::rows(g.dk), Gradients::rows(g.dv)},
                            stream_of(grad));
  return {g.dq, g.dk, g.dv};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit_cuda, PYVIT_CUDA_KEY, m) {
  m.impl("topk_attention", TORCH_BOX(&pyvit::forward));
  m.impl("topk_attention_backward", TORCH_BOX(&pyvit::backward));
  m.impl("attention_with_penalty", TORCH_BOX(&pyvit::forward_with_penalty));
  m.impl("attention_dense_backward", TORCH_BOX(&pyvit::dense_backward));
}
