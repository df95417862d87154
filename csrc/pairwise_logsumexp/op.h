// What Python calls: both return the bytes of workspace they need, and do no more than that where
// none is given.
#pragma once

#include <optional>

#include "pairwise_logsumexp/params.h"

namespace clipvip {

using Workspace = std::optional<uintptr_t>;

inline int64_t pairwise_logsumexp_forward_op(const Tensor& a, const Tensor& b, const Tensor& scale,
                                             int64_t diagonal, const Tensor& row_lse,
                                             const Tensor& col_lse, const Tensor& positive,
                                             int threads, Workspace workspace) {
  int64_t bytes = 0;
  PairwiseLogsumexpParams params{a, b, scale.as<const float>(), diagonal};
  params.row_lse = row_lse.as<float>();
  params.col_lse = col_lse.as<float>();
  params.positive = positive.as<float>();
  params.threads = threads;
  params.workspace = reinterpret_cast<void*>(workspace.value_or(0));
  params.workspace_bytes = &bytes;
  pairwise_logsumexp_forward(params);
  return bytes;
}

inline int64_t pairwise_logsumexp_backward_op(
    const Tensor& a, const Tensor& b, const Tensor& scale, int64_t diagonal, const Tensor& row_lse,
    const Tensor& col_lse, const Tensor& grad_row_lse, const Tensor& grad_col_lse,
    const Tensor& grad_positive, const Tensor& grad_a, const Tensor& grad_b,
    const Tensor& grad_scale, int threads, Workspace workspace) {
  int64_t bytes = 0;
  PairwiseLogsumexpParams params{a, b, scale.as<const float>(), diagonal};
  params.row_lse = row_lse.as<float>();
  params.col_lse = col_lse.as<float>();
  params.grad_row_lse = grad_row_lse.as<const float>();
  params.grad_col_lse = grad_col_lse.as<const float>();
  params.grad_positive = grad_positive.as<const float>();
  params.grad_a = grad_a.as<float>();
  params.grad_b = grad_b.as<float>();
  params.grad_scale = grad_scale.as<float>();
  params.threads = threads;
  params.workspace = reinterpret_cast<void*>(workspace.value_or(0));
  params.workspace_bytes = &bytes;
  pairwise_logsumexp_backward(params);
  return bytes;
}

}  // namespace clipvip
