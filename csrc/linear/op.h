// The products of a layer as Python calls them (module.h says how). clipvip/ops/linear.py checks
// shapes and dtypes.
#pragma once

#include <cstdint>
#include <optional>

#include "linear/params.h"

namespace clipvip {

using OptionalTensor = std::optional<Tensor>;

inline LinearParams linear_params(int input, int64_t tokens, int64_t width,
                                  const OptionalTensor& norm_weight,
                                  const OptionalTensor& norm_bias, const OptionalTensor& mean,
                                  const OptionalTensor& rstd, bool bfloat16, int threads,
                                  uintptr_t workspace) {
  const auto floats = [](const OptionalTensor& tensor, int64_t count) {
    return tensor ? tensor->dense<float>(count) : nullptr;
  };
  LinearParams p;
  p.input = static_cast<LinearInput>(input);
  p.norm_weight = floats(norm_weight, width), p.norm_bias = floats(norm_bias, width);
  p.mean = floats(mean, tokens), p.rstd = floats(rstd, tokens);
  p.operands = bfloat16 ? DType::bfloat16 : DType::float32;
  p.threads = threads;
  p.workspace = reinterpret_cast<void*>(workspace);
  return p;
}

inline int64_t linear_forward_op(int input, const Tensor& x, const Tensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& residual,
                                 float alpha, float beta, const OptionalTensor& norm_weight,
                                 const OptionalTensor& norm_bias, float eps,
                                 const OptionalTensor& mean, const OptionalTensor& rstd,
                                 bool bfloat16, const Tensor& out, int threads,
                                 uintptr_t workspace) {
  LinearParams p = linear_params(input, x.size[0], x.size[1], norm_weight, norm_bias, mean, rstd,
                                 bfloat16, threads, workspace);
  p.x = x, p.weight = weight, p.out = out;
  if (residual) p.residual = *residual;
  if (bias) p.bias = bias->dense<const float>(weight.size[0]);
  p.alpha = alpha, p.beta = beta, p.eps = eps;
  return linear_forward(p);
}

inline int64_t linear_grad_input_op(const Tensor& grad, const Tensor& weight,
                                    const OptionalTensor& before, bool bfloat16, const Tensor& out,
                                    int threads, uintptr_t workspace) {
  LinearParams p = linear_params(0, 0, 0, {}, {}, {}, {}, bfloat16, threads, workspace);
  p.grad = grad, p.weight = weight, p.out = out;
  if (before) p.before = *before;
  return linear_grad_input(p);
}

inline int64_t linear_grad_weight_op(int input, const Tensor& grad, const Tensor& x, float alpha,
                                     const OptionalTensor& norm_weight,
                                     const OptionalTensor& norm_bias, const OptionalTensor& mean,
                                     const OptionalTensor& rstd, bool bfloat16,
                                     const Tensor& grad_weight, const OptionalTensor& grad_bias,
                                     int threads, uintptr_t workspace) {
  LinearParams p = linear_params(input, x.size[0], x.size[1], norm_weight, norm_bias, mean, rstd,
                                 bfloat16, threads, workspace);
  p.grad = grad, p.x = x, p.alpha = alpha;
  p.grad_weight = grad_weight.dense<float>(grad.size[1] * x.size[1]);
  if (grad_bias) p.grad_bias = grad_bias->dense<float>(grad.size[1]);
  return linear_grad_weight(p);
}

}  // namespace clipvip
