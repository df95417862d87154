// Proxy-guided attention as Python calls it (module.h says how). clipvip/ops/proxy_attention.py
// checks shapes, dtypes and the values of frame_offsets.
#pragma once

#include <cstdint>

#include "proxy_attention/params.h"

namespace clipvip {

// Raises unless the kernels can read what both directions have.
inline void expect_readable(const ProxyAttentionParams& p) {
  p.qkv.expect_rows(p.qkv.dtype, p.head_dim());
  p.out.expect_rows(p.qkv.dtype, p.head_dim());
  p.frame_offsets.dense<const int32_t>(1);
  p.lse.dense<float>(p.heads() * p.qkv.size[0]);
}

inline int64_t proxy_attention_forward_op(const Tensor& qkv, const Tensor& frame_offsets,
                                          int64_t num_proxies, int64_t patches, float scale,
                                          const Tensor& out, const Tensor& lse, int threads,
                                          uintptr_t workspace) {
  ProxyAttentionParams p{qkv, frame_offsets, num_proxies, patches, scale, threads, out, lse};
  p.workspace = reinterpret_cast<float*>(workspace);
  expect_readable(p);
  return proxy_attention_forward(p);
}

inline int64_t proxy_attention_backward_op(const Tensor& grad_out, const Tensor& qkv,
                                           const Tensor& frame_offsets, int64_t num_proxies,
                                           int64_t patches, float scale, const Tensor& out,
                                           const Tensor& lse, const Tensor& grad_qkv, int threads,
                                           uintptr_t workspace) {
  ProxyAttentionParams p{qkv, frame_offsets, num_proxies, patches, scale, threads, out, lse};
  p.grad_out = grad_out, p.grad_qkv = grad_qkv;
  p.workspace = reinterpret_cast<float*>(workspace);
  expect_readable(p);
  p.grad_out.expect_rows(p.qkv.dtype, p.head_dim());
  p.grad_qkv.expect_rows(p.qkv.dtype, p.head_dim());
  return proxy_attention_backward(p);
}

}  // namespace clipvip
