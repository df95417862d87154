// pairwise_logsumexp as Python calls it (module.h says how).
#pragma once

#include <cstdint>

#include "pairwise_logsumexp/params.h"

namespace clipvip {

// Arguments of both directions.
inline PairwiseLogsumexpParams pairwise_logsumexp_params(const Tensor& a, const Tensor& b,
                                                         const Tensor& scale, int64_t diagonal,
                                                         int threads, uintptr_t workspace) {
  a.expect_rows(a.dtype, b.size[1]);
  b.expect_rows(a.dtype, a.size[1]);
  // Any further out there is no positive either, and nothing overflows.
  const int64_t least = -a.size[0], most = b.size[0];
  PairwiseLogsumexpParams params{a, b, scale.dense<const float>(1),
                                 diagonal < least ? least : diagonal > most ? most : diagonal};
  params.threads = threads;
  params.workspace = reinterpret_cast<void*>(workspace);
  return params;
}

inline int64_t pairwise_logsumexp_forward_op(const Tensor& a, const Tensor& b, const Tensor& scale,
                                             int64_t diagonal, const Tensor& row_lse,
                                             const Tensor& col_lse, const Tensor& positive,
                                             int threads, uintptr_t workspace) {
  PairwiseLogsumexpParams params =
      pairwise_logsumexp_params(a, b, scale, diagonal, threads, workspace);
  params.row_lse = row_lse.dense<float>(a.size[0]);
  params.col_lse = col_lse.dense<float>(b.size[0]);
  params.positive = positive.dense<float>(a.size[0]);
  return pairwise_logsumexp_forward(params);
}

inline int64_t pairwise_logsumexp_backward_op(
    const Tensor& a, const Tensor& b, const Tensor& scale, int64_t diagonal, const Tensor& row_lse,
    const Tensor& col_lse, const Tensor& grad_row_lse, const Tensor& grad_col_lse,
    const Tensor& grad_positive, const Tensor& grad_a, const Tensor& grad_b,
    const Tensor& grad_scale, int threads, uintptr_t workspace) {
  PairwiseLogsumexpParams params =
      pairwise_logsumexp_params(a, b, scale, diagonal, threads, workspace);
  params.row_lse = row_lse.dense<float>(a.size[0]);
  params.col_lse = col_lse.dense<float>(b.size[0]);
  params.grad_row_lse = grad_row_lse.dense<const float>(a.size[0]);
  params.grad_col_lse = grad_col_lse.dense<const float>(b.size[0]);
  params.grad_positive = grad_positive.dense<const float>(a.size[0]);
  params.grad_a = grad_a.dense<float>(a.size[0] * a.size[1]);
  params.grad_b = grad_b.dense<float>(b.size[0] * b.size[1]);
  params.grad_scale = grad_scale.dense<float>(1);
  return pairwise_logsumexp_backward(params);
}

}  // namespace clipvip
