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

inline void proxy_attention_forward_op(const Tensor& qkv, const Tensor& frame_offsets,
                                       int64_t num_proxies, int64_t patches, float scale,
                                       const Tensor& out, const Tensor& lse,
                                       const Tensor& workspace, int threads) {
  ProxyAttentionParams p{qkv, frame_offsets, num_proxies, patches, scale, threads,
                         out, lse,           {},          {},      workspace};
  proxy_attention_forward(p);
}

inline void proxy_attention_backward_op(const Tensor& grad_out, const Tensor& qkv,
                                        const Tensor& frame_offsets, int64_t num_proxies,
                                        int64_t patches, float scale, const Tensor& out,
                                        const Tensor& lse, const Tensor& grad_qkv,
                                        const Tensor& workspace, int threads) {
  ProxyAttentionParams p{qkv, frame_offsets, num_proxies, patches,  scale,    threads,
                         out, lse,           grad_out,    grad_qkv, workspace};
  proxy_attention_backward(p);
}

}  // namespace clipvip
