// Attention with exactly k keys a query and the gradients of attention, on a GPU: see
// topk_attention.cu, attention_gradients.cu.
#pragma once

#include "shapes.h"

namespace pyvit::cuda {

struct AttentionShape {
  int64_t batch, heads, queries, keys, dim, value_dim;
  double scale;  // of q·k
};

// A tensor [batch, head, row, column]; strides in elements, columns lie one element apart.
struct HeadRows {
  void* data;
  int64_t stride[3];
};

// What is written for each row of weights, contiguous; any may be null. `selection` has one bit a
// key, rows of ceil(keys / 8) bytes; `softmax` the largest score and the sum of exponentials.
struct SavedRows {
  uint8_t* selection;
  float* softmax;
  float *tail_energy, *hoyer;  // both of them or none
};

// Without `saved.hoyer`, of the topk largest scores alone; with it, of all.
void topk_attention(DType dtype, bool tf32, const AttentionShape& shape, int64_t topk, HeadRows q,
                    HeadRows k, HeadRows v, HeadRows out, const SavedRows& saved, void* stream);
void attention_with_penalty(DType dtype, bool tf32, const AttentionShape& shape, int64_t topk,
                            HeadRows q, HeadRows k, HeadRows v, HeadRows out,
                            const SavedRows& saved, void* stream);

// A gradient whose data is null is not computed. Terms of each row, [batch, head, query]:
// softmax, delta = Σ w · dW; and of the penalty, norm and grad_tail.
struct GradientRows {
  HeadRows grad, q, k, v;  // v may be null where neither dq nor dk is wanted
  const float *softmax, *delta, *norm, *grad_tail;  // the last two null without the penalty
  const uint8_t* selection;  // null, or with the penalty the keys outside the tail, else the kept
  bool one;                  // one key is kept: its weight is 1, and its score has no gradient
  HeadRows dq, dk, dv;
};
void attention_gradients(DType dtype, bool tf32, const AttentionShape& shape,
                         const GradientRows& tensors, void* stream);

// delta = grad · out of each row.
void attention_delta(DType dtype, const AttentionShape& shape, HeadRows grad, HeadRows out,
                     float* delta, void* stream);

// softmax, and where `delta` is not null, the terms that dense attention's gradients need;
// `grad_tail`, `grad_hoyer`, `selection` and `norm` are null without the penalty.
struct DenseTerms {
  const float *grad_tail, *grad_hoyer;
  const uint8_t* selection;
  float *softmax, *delta, *norm;
};
void attention_terms(DType dtype, bool tf32, const AttentionShape& shape, HeadRows q, HeadRows k,
                     HeadRows v, HeadRows grad, const DenseTerms& terms, void* stream);

}  // namespace pyvit::cuda
