// pairwise_logsumexp on a GPU as Python calls it (module.h says how). Everything is launched on the
// stream; nothing is allocated and nothing waits. Each row of a and b starts on 16 bytes and holds a
// multiple of 16 bytes; statistics are contiguous fp32.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace clipvip {

// Writes row_lse [n], col_lse [m] and positive [n] from a [n, D], b [m, D] and scale [1].
int64_t pairwise_logsumexp_forward_cuda(const Tensor& a, const Tensor& b, const Tensor& scale,
                                        int64_t diagonal, const Tensor& row_lse,
                                        const Tensor& col_lse, const Tensor& positive,
                                        int device, uintptr_t stream, uintptr_t workspace);

// Writes what the gradients of all logits have in common: weights of rows [n] and columns [m], and
// the `unit` [4] in which the gradient of a logit is written: (reference, whether it is shared,
// 1 / unit, unit).
int64_t pairwise_logsumexp_weigh_cuda(const Tensor& row_lse, const Tensor& col_lse,
                                      const Tensor& grad_row_lse, const Tensor& grad_col_lse,
                                      const Tensor& grad_positive, int64_t diagonal, bool exact,
                                      const Tensor& row_weight, const Tensor& col_weight,
                                      const Tensor& unit, int device, uintptr_t stream,
                                      uintptr_t workspace);

// Writes panel [n, m] (rows a multiple of 16 bytes apart, of a's dtype): the gradient of each logit
// in units of `unit`. grad_scale is fp64 numbers, seen as twice as many fp32 ones (any multiple of
// 16); the call adds to them, and their sum is the gradient of scale in the same units. Needs no
// workspace.
int64_t pairwise_logsumexp_panel_cuda(const Tensor& a, const Tensor& b, const Tensor& scale,
                                      int64_t diagonal, const Tensor& row_lse,
                                      const Tensor& col_lse, const Tensor& row_weight,
                                      const Tensor& col_weight, const Tensor& grad_positive,
                                      const Tensor& unit, const Tensor& panel,
                                      const Tensor& grad_scale, int device, uintptr_t stream,
                                      uintptr_t workspace);

}  // namespace clipvip
