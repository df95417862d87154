// Products of a transformer layer's activations with its weights, and what stands next to them:
//
//   forward      out = alpha·f(x)·Wᵀ + beta·bias + residual      f: nothing, LayerNorm, or SiLU
//   grad_input   out = (grad·W) ∘ SiLU'(before)
//   grad_weight  grad_weight = alpha·gradᵀ·f(x),  grad_bias = Σ grad
//
// Where f, its derivative, the casts, the bias and the residual would each be a pass over memory of
// their own, here they happen while rows are on their way into or out of the product.
#pragma once

#include "common/cpu_features.h"
#include "common/tensor.h"

namespace clipvip {

// Inner and outer widths, K and N, must be multiples of this.
constexpr int64_t kLinearUnit = 64;

enum class LinearInput : int { plain = 0, normed = 1, silu = 2 };

struct LinearParams {
  // Rows may lie apart, elements of a row not. float32 or bfloat16, each as it likes.
  Tensor x;         // [T, K]; forward, grad_weight
  Tensor weight;    // [N, K]; forward, grad_input
  Tensor residual;  // [T, N], or no data; forward
  Tensor grad;      // [T, N]; grad_input, grad_weight
  Tensor before;    // [T, K], or no data: no derivative; grad_input
  Tensor out;       // [T, N] in forward, [T, K] in grad_input
  // bfloat16: what operands of the product are rounded to where the processor multiplies such (else
  // they stay float32). Statistics and sums are float32 throughout.
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
  void* workspace = nullptr;  // where there is none, only its size is computed
  int64_t* workspace_bytes = nullptr;
};

CLIPVIP_CPU_KERNEL(linear_forward, LinearParams)
CLIPVIP_CPU_KERNEL(linear_grad_input, LinearParams)
CLIPVIP_CPU_KERNEL(linear_grad_weight, LinearParams)

}  // namespace clipvip
