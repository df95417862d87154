// Proxy-guided attention: the parameters of a CPU kernel, and the kernels' declarations.
//
// Video b holds M proxies and then frames of L patches each; it starts at token
// b·M + frame_offsets[b]·L. A proxy sees every token of its video, a patch sees the proxies and
// the patches of its own frame.
#pragma once

#include "common/cpu_features.h"
#include "common/tensor.h"

namespace clipvip {

struct ProxyAttentionParams {
  Tensor qkv;            // [T, 3, H, D]; float32, bfloat16 or float16, last dimension contiguous
  Tensor frame_offsets;  // [B + 1] int32, contiguous, checked by the caller
  int64_t num_proxies;
  int64_t patches;
  float scale;
  int threads;
  Tensor out;        // [T, H, D]
  Tensor lse;        // [H, T] float32 contiguous: log2 of the sum of 2^(scaled logit · log2 e)
  Tensor grad_out = {};  // [T, H, D]; backward only
  Tensor grad_qkv = {};  // [T, 3, H, D]; backward only
  float* workspace = nullptr;  // proxy_attention_workspace_bytes, or null

  int64_t heads() const { return qkv.size[2]; }
  int64_t head_dim() const { return qkv.size[3]; }  // a multiple of 8 up to 128
  int64_t videos() const { return frame_offsets.size[0] - 1; }
  int64_t frames() const { return frame_offsets.as<const int32_t>()[videos()]; }
};

// The kernels split the queries of a frame into equal blocks of at most kMaxRows, so that a block's
// scores stay in the second level of cache. Micro-kernels work on up to kPaddedRows.
constexpr int64_t kProxyAttentionMaxRows = 72, kProxyAttentionPaddedRows = 72;

static inline int64_t proxy_attention_block_rows(int64_t keys) {
  const int64_t blocks = (keys + kProxyAttentionMaxRows - 1) / kProxyAttentionMaxRows;
  return ((keys + blocks - 1) / blocks + 7) / 8 * 8;
}

// Floats of a head's row in the workspace: whole vectors of every instruction set.
static inline int64_t proxy_attention_padded_dim(int64_t head_dim) {
  return (head_dim + 15) / 16 * 16;
}

// Floats of workspace that one thread needs, whichever instruction set runs.
static inline int64_t proxy_attention_floats_per_thread(int64_t keys, int64_t head_dim,
                                                        bool backward) {
  const int64_t padded_keys = (keys + 23) / 24 * 24 + 16;
  const int64_t rows = (proxy_attention_block_rows(keys) + 23) / 24 * 24;
  const int64_t D = proxy_attention_padded_dim(head_dim);
  return backward ? padded_keys * (5 * D + 2 * rows) + rows * (5 * D + 32)
                  : padded_keys * (2 * D + rows) + rows * (2 * D + 32);
}

// Bytes of workspace: what each thread needs, then the proxies' partial results of each frame and
// head.
static inline int64_t proxy_attention_workspace_bytes(const ProxyAttentionParams& p,
                                                      bool backward) {
  const int64_t keys = p.num_proxies + p.patches;
  const int64_t D = proxy_attention_padded_dim(p.head_dim());
  return (p.threads * proxy_attention_floats_per_thread(keys, D, backward) +
          p.frames() * p.heads() * p.num_proxies * (backward ? 3 * D : D + 2)) *
         int64_t(sizeof(float));
}

CLIPVIP_CPU_KERNEL(proxy_attention_forward, ProxyAttentionParams)
CLIPVIP_CPU_KERNEL(proxy_attention_backward, ProxyAttentionParams)

}  // namespace clipvip
