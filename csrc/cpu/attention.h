// Attention, dense and with exactly k keys a query, and the gradients. See topk_attention.cpp and
// attention.cpp for the methods; score_tiles.h and select.h for what they share.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace pyvit {

struct AttentionShape {
  int64_t batch, heads, queries, keys, dim, value_dim;
  double scale;  // of q·k
};

// A tensor [batch, head, row, column]; strides in elements, columns lie one element apart.
struct HeadRows {
  void* data;
  int64_t stride[3];
};

// Each query attends to its topk < keys largest scores. `indices` and `weights` (in the compute
// type), both [batch, head, query, topk] and contiguous, may be null.
void topk_attention(DType dtype, const AttentionShape& shape, int64_t topk, HeadRows q,
                    HeadRows k, HeadRows v, HeadRows out, int32_t* indices, void* weights);

// A gradient whose data is null is not computed, and the tensors that only it needs may be null:
// q for dk; k for dq; v for either.
struct SelectedGradients {
  HeadRows grad, q, k, v;
  const int32_t* indices;
  const void* weights;
  HeadRows dq, dk, dv;
};
void topk_attention_backward(DType dtype, const AttentionShape& shape, int64_t topk,
                             const SelectedGradients& tensors);

// What the k-sparse penalty needs to know of each row of weights w, all [batch, head, query]:
// the sum of w² outside the topk largest scores, the Hoyer sparsity of w, and which keys those
// topk are (one bit a key, rows of ceil(keys / 8) bytes; may be null).
struct PenaltyTerms {
  void *tail_energy, *hoyer;  // in the compute type
  uint8_t* selection;
};

// Dense attention; `penalty` may be null.
void attention(DType dtype, const AttentionShape& shape, HeadRows q, HeadRows k, HeadRows v,
               HeadRows out, int64_t topk, const PenaltyTerms* penalty);

// The gradients of dense attention; with the gradients of the penalty's terms where
// `grad_tail` is not null. A gradient whose data is null is not computed; v may be null where
// neither dq nor dk is wanted.
struct DenseGradients {
  HeadRows grad, q, k, v;
  const void *grad_tail, *grad_hoyer;  // in the compute type
  const uint8_t* selection;
  HeadRows dq, dk, dv;
};
void attention_dense_backward(DType dtype, const AttentionShape& shape,
                              const DenseGradients& tensors);

}  // namespace pyvit
