// The work between a layer's matrix products, on a GPU, as Python calls it (module.h says how).
// Everything is launched on the stream; nothing is allocated and nothing waits. Matrices are
// contiguous, start on 16 bytes and have a multiple of 8 columns, at most 2048 where rows are
// normalized; vectors are contiguous fp32, and biases and LayerNorm's weight start on 16 bytes. All
// rows of a call have one dtype, except that those of the residual, its sum and their gradient may
// be fp32 beside 16-bit others. Arithmetic is fp32. A null pointer is None.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace clipvip {

// sum = residual + (product + bias), and normed = LayerNorm(sum) · weight + norm_bias, with the
// statistics mean [T] and rstd [T]. Without a product the sum is the residual and is not written.
int64_t elementwise_add_norm_cuda(const Tensor& residual, const Tensor* product,
                                  const Tensor* bias, const Tensor& weight,
                                  const Tensor& norm_bias, float eps, const Tensor* sum,
                                  const Tensor& normed, const Tensor& mean, const Tensor& rstd,
                                  int device, uintptr_t stream, uintptr_t workspace);

// grad = grad_sum + the gradient of sum through LayerNorm; copy is the same in its own dtype;
// normed is LayerNorm(sum) again; column_sums [3, C] are the gradients of weight and norm_bias, and
// the sum of grad's rows.
int64_t elementwise_add_norm_backward_cuda(const Tensor& grad_normed, const Tensor* grad_sum,
                                           const Tensor& sum, const Tensor& mean,
                                           const Tensor& rstd, const Tensor& weight,
                                           const Tensor& norm_bias, const Tensor& grad,
                                           const Tensor* copy, const Tensor& normed,
                                           const Tensor& column_sums, int device,
                                           uintptr_t stream, uintptr_t workspace);

// sum = residual + (product + bias).
int64_t elementwise_add_cuda(const Tensor& residual, const Tensor& product, const Tensor* bias,
                             const Tensor& sum, int device, uintptr_t stream,
                             uintptr_t workspace);

// copy = grad in its own dtype; column_sums [K] = the sum of grad's rows.
int64_t elementwise_cast_and_sum_cuda(const Tensor& grad, const Tensor* copy,
                                      const Tensor& column_sums, int device, uintptr_t stream,
                                      uintptr_t workspace);

// out = QuickGELU(x + bias).
int64_t elementwise_quick_gelu_cuda(const Tensor& x, const Tensor& bias, const Tensor& out,
                                    int device, uintptr_t stream, uintptr_t workspace);

// grad_x = the gradient of x, which may lie where grad does; out = QuickGELU(x + bias) again;
// column_sums [K] = the sum of the rows of grad_x.
int64_t elementwise_quick_gelu_backward_cuda(const Tensor& grad, const Tensor& x,
                                             const Tensor& bias, const Tensor& grad_x,
                                             const Tensor& out, const Tensor& column_sums,
                                             int device, uintptr_t stream, uintptr_t workspace);

}  // namespace clipvip
