// Proxy-guided attention on a GPU as Python calls it (module.h says how).
// clipvip/ops/proxy_attention.py checks shapes, dtypes and strides; frame_offsets lies on the GPU and
// is not read here.
#pragma once

#include <cstdint>

#include "common/tensor.h"

namespace clipvip {

int64_t proxy_attention_forward_cuda(const Tensor& qkv, const Tensor& frame_offsets,
                                     int64_t num_proxies, int64_t patches, float scale,
                                     const Tensor& out, const Tensor& lse, int device,
                                     uintptr_t stream, uintptr_t workspace);

int64_t proxy_attention_backward_cuda(const Tensor& grad_out, const Tensor& qkv,
                                      const Tensor& frame_offsets, int64_t num_proxies,
                                      int64_t patches, float scale, const Tensor& out,
                                      const Tensor& lse, const Tensor& grad_qkv, int device,
                                      uintptr_t stream, uintptr_t workspace);

}  // namespace clipvip
