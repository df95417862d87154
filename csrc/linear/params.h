// Products of a transformer layer's activations with its weights, fused with adjacent operations:
//
//   forward      out = alpha·f(x)·Wᵀ + beta·bias + residual      f: nothing, LayerNorm, or SiLU
//   grad_input   out = (grad·W) ∘ SiLU'(before)
//   grad_weight  grad_weight = alpha·gradᵀ·f(x),  grad_bias = Σ grad
//
// f, its derivative, casts, bias and residual are applied while rows enter or leave the product;
// each would otherwise be a pass over memory.
#pragma once

#include "common/cpu_features.h"
#include "common/tensor.h"

namespace clipvip {

// Inner and outer widths, K and N, must be multiples of this.
constexpr int64_t kLinearUnit = 64;

enum class LinearInput : int { plain = 0, normed = 1, silu = 2 };

struct LinearParams {
  // Each is float32 or bfloat16; rows are contiguous, with gaps between them allowed.
  Tensor x;         // [T, K]; forward, grad_weight
  Tensor weight;    // [N, K]; forward, grad_input
  Tensor residual;  // [T, N], or null data; forward
  Tensor grad;      // [T, N]; grad_input, grad_weight
  Tensor before;    // [T, K], or null data for no derivative; grad_input
  Tensor out;       // [T, N] in forward, [T, K] in grad_input
  // bfloat16: operands of the product are rounded to it where the processor multiplies it, and stay
  // float32 elsewhere. Statistics and sums are always float32.
  DType operands = DType::float32;
  LinearInput input = LinearInput::plain;
  float alpha = 1, beta = 1;
  // float32, contiguous.
  const float* bias = nullptr;         // [N]
  const float* norm_weight = nullptr;  // [K]
  const float* norm_bias = nullptr;    // [K]
  float eps = 0;
  float* mean = nullptr;         // [T]; forward writes, grad_weight reads
  float* rstd = nullptr;         // [T]
  float* grad_weight = nullptr;  // [N, K]
  float* grad_bias = nullptr;    // [N]
  int threads = 1;
  void* workspace = nullptr;
};

CLIPVIP_CPU_KERNEL(linear_forward, LinearParams)
CLIPVIP_CPU_KERNEL(linear_grad_input, LinearParams)
CLIPVIP_CPU_KERNEL(linear_grad_weight, LinearParams)

}  // namespace clipvip
