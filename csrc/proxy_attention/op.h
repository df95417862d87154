// Proxy-guided attention as the Python module calls it. Shapes, dtypes and the values of
// frame_offsets are checked in clipvip/ops/proxy_attention.py.
#pragma once

#include "proxy_attention/params.h"

namespace clipvip {

// Floats of workspace to hand over.
inline int64_t proxy_attention_workspace(int64_t num_proxies, int64_t patches, int64_t heads,
                                         int64_t head_dim, int64_t frames, int threads,
                                         bool backward) {
  return threads * proxy_attention_floats_per_thread(num_proxies + patches, head_dim, backward) +
         proxy_attention_partial_floats(num_proxies, heads, head_dim, frames, backward);
}

// Raises unless the kernels can read all of these.
inline void expect_proxy_attention(const ProxyAttentionParams& p, bool backward) {
  const int64_t tokens = p.qkv.size[0];
  p.qkv.expect_rows(p.qkv.dtype, p.head_dim());
  p.out.expect_rows(p.qkv.dtype, p.head_dim());
  p.frame_offsets.dense<const int32_t>(1);
  p.lse.dense<float>(p.heads() * tokens);
  const int64_t frames = p.frame_offsets.as<const int32_t>()[p.videos()];
  p.workspace.dense<float>(proxy_attention_workspace(p.num_proxies, p.patches, p.heads(),
                                                     p.head_dim(), frames, p.threads, backward));
  if (backward) {
    p.grad_out.expect_rows(p.qkv.dtype, p.head_dim());
    p.grad_qkv.expect_rows(p.qkv.dtype, p.head_dim());
  }
}

inline void proxy_attention_forward_op(const Tensor& qkv, const Tensor& frame_offsets,
                                       int64_t num_proxies, int64_t patches, float scale,
                                       const Tensor& out, const Tensor& lse,
                                       const Tensor& workspace, int threads) {
  ProxyAttentionParams p{qkv, frame_offsets, num_proxies, patches, scale, threads,
                         out, lse,           {},          {},      workspace};
  expect_proxy_attention(p, false);
  proxy_attention_forward(p);
}

inline void proxy_attention_backward_op(const Tensor& grad_out, const Tensor& qkv,
                                        const Tensor& frame_offsets, int64_t num_proxies,
                                        int64_t patches, float scale, const Tensor& out,
                                        const Tensor& lse, const Tensor& grad_qkv,
                                        const Tensor& workspace, int threads) {
  ProxyAttentionParams p{qkv, frame_offsets, num_proxies, patches,  scale,    threads,
                         out, lse,           grad_out,    grad_qkv, workspace};
  expect_proxy_attention(p, true);
  proxy_attention_backward(p);
}

}  // namespace clipvip
