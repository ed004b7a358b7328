#include <tuple>

#include "bindings/tensors.h"
#include "cpu/attention.h"

namespace pyvit {
namespace {

// [batch, head, row, column] in the memory order batch, row, head, column where heads_last.
Tensor empty_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t columns,
                  bool heads_last) {
  if (!heads_last) return empty_like_options(like, {batch, heads, rows, columns});
  return torch::stable::transpose(empty_like_options(like, {batch, rows, heads, columns}), 1, 2);
}

ScalarType compute_type(const Tensor& like) {
  return like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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

// Indices and weights are saved where `save`, and have no columns where every key is kept.
std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, int64_t topk,
                                           double scale, bool save) {
  const AttentionShape s = shape_of(q, k, v, scale);
  const bool dense = topk >= s.keys;
  const std::vector<int64_t> chosen = {s.batch, s.heads, s.queries, save && !dense ? topk : 0};
  Tensor out = empty_rows(q, s.batch, s.heads, s.queries, s.value_dim, true);
  Tensor indices = empty_of(q, chosen, ScalarType::Int);
  Tensor weights = empty_of(q, chosen, compute_type(q));
  if (out.numel() > 0 && dense) {
    attention(dtype_of(q), s, head_rows(q), head_rows(k), head_rows(v), head_rows(out), topk,
              nullptr);
  } else if (out.numel() > 0) {
    topk_attention(dtype_of(q), s, topk, head_rows(q), head_rows(k), head_rows(v), head_rows(out),
                   save ? static_cast<int32_t*>(indices.mutable_data_ptr()) : nullptr,
                   save ? weights.mutable_data_ptr() : nullptr);
  }
  return {out, indices, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_with_penalty(Tensor q, Tensor k, Tensor v,
                                                                int64_t topk, double scale,
                                                                bool save) {
  const AttentionShape s = shape_of(q, k, v, scale);
  Tensor out = empty_rows(q, s.batch, s.heads, s.queries, s.value_dim, true);
  Tensor tail = empty_of(q, {s.batch, s.heads, s.queries}, compute_type(q));
  Tensor hoyer = empty_of(q, {s.batch, s.heads, s.queries}, compute_type(q));
  Tensor selection = empty_of(q, {s.batch, s.heads, s.queries, save ? (s.keys + 7) / 8 : 0},
                              ScalarType::Byte);
  if (out.numel() > 0) {
    const PenaltyTerms terms{tail.mutable_data_ptr(), hoyer.mutable_data_ptr(),
                             save ? static_cast<uint8_t*>(selection.mutable_data_ptr()) : nullptr};
    attention(dtype_of(q), s, head_rows(q), head_rows(k), head_rows(v), head_rows(out), topk,
              &terms);
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

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, std::optional<Tensor> /* out */,
                                            std::optional<Tensor> q, std::optional<Tensor> k,
                                            std::optional<Tensor> v, Tensor indices,
                                            Tensor weights, int64_t topk, int64_t keys,
                                            double scale, bool heads_last, bool needs_q,
                                            bool needs_k, bool needs_v) {
  const int64_t dim = k.has_value() ? k->size(3) : q.has_value() ? q->size(3) : 0;
  const AttentionShape s{grad.size(0), grad.size(1), grad.size(2), keys, dim, grad.size(3), scale};
  const Gradients g(grad, s, heads_last, needs_q, needs_k, needs_v);
  if (g.any())
    topk_attention_backward(
        dtype_of(grad), s, topk,
        {head_rows(grad), head_rows(q), head_rows(k), head_rows(v),
         static_cast<const int32_t*>(indices.const_data_ptr()), weights.const_data_ptr(),
         Gradients::rows(g.dq), Gradients::rows(g.dk), Gradients::rows(g.dv)});
  return {g.dq, g.dk, g.dv};
}

std::tuple<Tensor, Tensor, Tensor> dense_backward(
    Tensor grad, Tensor q, Tensor k, std::optional<Tensor> v, std::optional<Tensor> grad_tail,
    std::optional<Tensor> grad_hoyer, std::optional<Tensor> selection, double scale,
    bool heads_last, bool needs_q, bool needs_k, bool needs_v) {
  const AttentionShape s = shape_of(q, k, grad, scale);
  const Gradients g(grad, s, heads_last, needs_q, needs_k, needs_v);
  if (g.any())
    attention_dense_backward(
        dtype_of(grad), s,
        {head_rows(grad), head_rows(q), head_rows(k), head_rows(v), data_or_null(grad_tail),
         data_or_null(grad_hoyer), static_cast<const uint8_t*>(data_or_null(selection)),
         Gradients::rows(g.dq), Gradients::rows(g.dk), Gradients::rows(g.dv)});
  return {g.dq, g.dk, g.dv};
}

}  // namespace
}  // namespace pyvit

STABLE_TORCH_LIBRARY_IMPL(pyvit, CPU, m) {
  m.impl("topk_attention", TORCH_BOX(&pyvit::forward));
  m.impl("topk_attention_backward", TORCH_BOX(&pyvit::backward));
  m.impl("attention_with_penalty", TORCH_BOX(&pyvit::forward_with_penalty));
  m.impl("attention_dense_backward", TORCH_BOX(&pyvit::dense_backward));
}
