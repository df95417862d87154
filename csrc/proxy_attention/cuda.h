// Proxy-guided attention on CUDA GPUs: what the Python module calls. Shapes, dtypes and strides
// are checked in clipvip/ops/proxy_attention.py; frame_offsets lies on the GPU and is not read
// here.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace clipvip {

// Floats of workspace to hand over.
int64_t proxy_attention_workspace_cuda(int64_t num_proxies, int64_t patches, int64_t heads,
                                       int64_t head_dim, int64_t frames, bool backward);

void proxy_attention_forward_cuda(const Tensor& qkv, const Tensor& frame_offsets,
                                  int64_t num_proxies, int64_t patches, float scale,
                                  const Tensor& out, const Tensor& lse, const Tensor& workspace,
                                  int device, uintptr_t stream);

void proxy_attention_backward_cuda(const Tensor& grad_out, const Tensor& qkv,
                                   const Tensor& frame_offsets, int64_t num_proxies,
                                   int64_t patches, float scale, const Tensor& out,
                                   const Tensor& lse, const Tensor& grad_qkv,
                                   const Tensor& workspace, int device, uintptr_t stream);

}  // namespace clipvip
