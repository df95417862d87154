// What Python calls: all return the bytes of workspace they need, and do no more than that where
// none is given. Shapes and dtypes are checked in clipvip/ops/linear.py.
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
                                  std::optional<uintptr_t> workspace, int64_t* bytes) {
  const auto floats = [](const OptionalTensor& tensor, int64_t count) {
    return tensor ? tensor->dense<float>(count) : nullptr;
  };
  LinearParams p;
  p.input = static_cast<LinearInput>(input);
  p.norm_weight = floats(norm_weight, width), p.norm_bias = floats(norm_bias, width);
  p.mean = floats(mean, tokens), p.rstd = floats(rstd, tokens);
  p.operands = bfloat16 ? DType::bfloat16 : DType::float32;
  p.threads = threads;
  p.workspace = reinterpret_cast<void*>(workspace.value_or(0)), p.workspace_bytes = bytes;
  return p;
}

inline int64_t linear_forward_op(int input, const Tensor& x, const Tensor& weight,
                                 const OptionalTensor& bias, const OptionalTensor& residual,
                                 float alpha, float beta, const OptionalTensor& norm_weight,
                                 const OptionalTensor& norm_bias, float eps,
                                 const OptionalTensor& mean, const OptionalTensor& rstd,
                                 bool bfloat16, const Tensor& out, int threads,
                                 std::optional<uintptr_t> workspace) {
  int64_t bytes = 0;
  LinearParams p = linear_params(input, x.size[0], x.size[1], norm_weight, norm_bias, mean, rstd,
                                 bfloat16, threads, workspace, &bytes);
  p.x = x, p.weight = weight, p.out = out;
  if (residual) p.residual = *residual;
  if (bias) p.bias = bias->dense<const float>(weight.size[0]);
  p.alpha = alpha, p.beta = beta, p.eps = eps;
  linear_forward(p);
  return bytes;
}

inline int64_t linear_grad_input_op(const Tensor& grad, const Tensor& weight,
                                    const OptionalTensor& before, bool bfloat16, const Tensor& out,
                                    int threads, std::optional<uintptr_t> workspace) {
  int64_t bytes = 0;
  LinearParams p = linear_params(0, 0, 0, {}, {}, {}, {}, bfloat16, threads, workspace, &bytes);
  p.grad = grad, p.weight = weight, p.out = out;
  if (before) p.before = *before;
  linear_grad_input(p);
  return bytes;
}

inline int64_t linear_grad_weight_op(int input, const Tensor& grad, const Tensor& x, float alpha,
                                     const OptionalTensor& norm_weight,
                                     const OptionalTensor& norm_bias, const OptionalTensor& mean,
                                     const OptionalTensor& rstd, bool bfloat16,
                                     const Tensor& grad_weight, const OptionalTensor& grad_bias,
                                     int threads, std::optional<uintptr_t> workspace) {
  int64_t bytes = 0;
  LinearParams p = linear_params(input, x.size[0], x.size[1], norm_weight, norm_bias, mean, rstd,
                                 bfloat16, threads, workspace, &bytes);
  p.grad = grad, p.x = x, p.alpha = alpha;
  p.grad_weight = grad_weight.dense<float>(grad.size[1] * x.size[1]);
  if (grad_bias) p.grad_bias = grad_bias->dense<float>(grad.size[1]);
  linear_grad_weight(p);
  return bytes;
}

}  // namespace clipvip
