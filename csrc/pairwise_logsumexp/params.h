// The parameters of one call of pairwise_logsumexp. All arrays are contiguous, except for gaps
// between the rows of a and b; statistics and gradients are fp32; nothing may overlap.
#pragma once

#include <cstdint>

#include "common/cpu_features.h"
#include "common/tensor.h"

namespace clipvip {

struct PairwiseLogsumexpParams {
  Tensor a;                // [n, D] fp32, bf16 or fp16, unit stride along D
  Tensor b;                // [m, D], of a's dtype
  const float* scale;      // [1]
  int64_t diagonal;        // positive[i] = logits[i, i + diagonal]
  float* row_lse = nullptr;   // [n], written by forward, read by backward
  float* col_lse = nullptr;   // [m], likewise
  float* positive = nullptr;  // [n], written by forward
  const float* grad_row_lse = nullptr;
  const float* grad_col_lse = nullptr;
  const float* grad_positive = nullptr;
  float* grad_a = nullptr;      // [n, D], zeros, added to
  float* grad_b = nullptr;      // [m, D], likewise
  float* grad_scale = nullptr;  // [1]
  int threads = 1;
  void* workspace = nullptr;
};

CLIPVIP_CPU_KERNEL(pairwise_logsumexp_forward, PairwiseLogsumexpParams)
CLIPVIP_CPU_KERNEL(pairwise_logsumexp_backward, PairwiseLogsumexpParams)

}  // namespace clipvip
