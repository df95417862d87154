// Proxy-guided attention on the CPU, compiled once per instruction set.
//
// The unit of work is one frame of one head. Its queries and its keys are the same tokens: the M
// proxies of the video, then the frame's L patches. The patches' rows are complete. The proxies'
// rows are partial results, which are combined afterwards in frame order, so that results do not
// depend on the number of threads. Proxies attend to proxies in the first frame only. A video of
// one frame or none has nothing to combine and is written directly.
#include "proxy_attention/params.h"

#include "common/gemm.h"
#include "common/parallel.h"

namespace clipvip {
namespace CLIPVIP_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

CLIPVIP_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out pieces of a thread's workspace, all multiples of 16 floats.
struct Arena {
  float* next;

  template <typename Word>
  CLIPVIP_INLINE Word* take(int64_t words) {
    float* piece = next;
    next += round_up(words, 16);
    return reinterpret_cast<Word*>(piece);
  }
};

// One head of the tokens of one frame, proxies first.
struct Unit {
  int64_t frame, head;
  int64_t proxies, patches;  // M, and L or 0
  int64_t proxy_token, patch_token;
  bool first;   // of its video: the proxies' own keys count here
  bool direct;  // the only one of its video: no partial results

  CLIPVIP_INLINE int64_t tokens() const { return proxies + patches; }
  CLIPVIP_INLINE int64_t token(int64_t row) const {
    return row < proxies ? proxy_token + row : patch_token + (row - proxies);
  }
};

CLIPVIP_INLINE Unit make_unit(const ProxyAttentionParams& p, int64_t video, int64_t frame,
                              int64_t head) {
  const int32_t* offsets = p.frame_offsets.as<int32_t>();
  const int64_t begin = offsets[video], end = offsets[video + 1];
  const int64_t start = video * p.num_proxies + begin * p.patches;
  return {frame,
          head,
          p.num_proxies,
          end > begin ? p.patches : 0,
          start,
          start + p.num_proxies + (frame - begin) * p.patches,
          frame == begin,
          end - begin <= 1};
}

// The video that holds `frame`: the last that begins at or before it.
CLIPVIP_INLINE int64_t video_of(const ProxyAttentionParams& p, int64_t frame) {
  const int32_t* offsets = p.frame_offsets.as<int32_t>();
  int64_t low = 0, high = p.videos();
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (offsets[middle] <= frame ? low : high) = middle;
  }
  return low;
}

// Calls body(unit, next, thread) for every frame and head, where `next` is the unit that the same
// thread most likely computes next; then put_together(video, head) for videos of several frames,
// and body for the proxies of videos without frames.
template <typename Body, typename Combine>
CLIPVIP_INLINE void for_each_unit(const ProxyAttentionParams& p, const Body& body,
                                  const Combine& put_together) {
  const int32_t* offsets = p.frame_offsets.as<int32_t>();
  const int64_t heads = p.heads(), units = offsets[p.videos()] * heads;
  const int64_t run = units / (p.threads * 16) + 1;  // neighbours share pages and cache lines
  const auto unit = [&](int64_t u) {
    return make_unit(p, video_of(p, u / heads), u / heads, u % heads);
  };
  parallel_for((units + run - 1) / run, p.threads, [&](int64_t piece, int thread) {
    const int64_t end = smaller((piece + 1) * run, units);
    for (int64_t u = piece * run; u < end; ++u) {
      body(unit(u), unit(smaller(u + 1, units - 1)), thread);
    }
  });
  parallel_for(p.videos() * heads, p.threads, [&](int64_t u, int thread) {
    const int64_t video = u / heads, frames = offsets[video + 1] - offsets[video];
    const Unit empty = make_unit(p, video, offsets[video], u % heads);
    if (frames == 0) body(empty, empty, thread);
    if (frames > 1) put_together(video, u % heads);
  });
}

template <typename T>
struct TokenRows {  // one head of one of q, k, v, out, …: row(token) is its D elements
  T* data;
  int64_t step;

  CLIPVIP_INLINE T* operator()(int64_t token) const { return data + token * step; }
};

// A share of rows [0, count): piece `index` of `pieces`.
struct Share {
  int64_t begin, end;
};
CLIPVIP_INLINE Share share(int64_t count, int64_t index, int64_t pieces) {
  return {count * index / pieces, count * (index + 1) / pieces};
}

template <typename T>
CLIPVIP_INLINE void prefetch_rows(const TokenRows<T>& rows, const Unit& unit, Share range,
                                  int64_t D) {
  for (int64_t i = range.begin; i < smaller(range.end, unit.tokens()); ++i) {
    prefetch(rows(unit.token(i)), D * int64_t(sizeof(T)));
  }
}
template <typename T>
CLIPVIP_INLINE TokenRows<T> part_of(const Tensor& qkv, int part, int64_t head) {
  return {qkv.as<T>() + part * qkv.stride[1] + head * qkv.stride[2], qkv.stride[0]};
}
template <typename T>
CLIPVIP_INLINE TokenRows<T> head_of(const Tensor& x, int64_t head) {
  return {x.as<T>() + head * x.stride[1], x.stride[0]};
}

// Whether `to` is too large to stay in a cache until it is read. Its rows are then written past the
// caches, which saves reading their lines first.
constexpr int64_t kStreamBytes = 4 << 20;
template <typename T>
CLIPVIP_INLINE bool streams(const Tensor& to) {
  return to.size[0] * to.stride[0] * int64_t(sizeof(T)) >= kStreamBytes;
}

// Lanes [0, n) of a vector, n ≥ 1; the last vector of a row need not be whole.
template <typename T>
CLIPVIP_INLINE Vec load_up_to(int64_t n, const T* from) {
  return n >= kLanes ? load(from) : load_first(from, n);
}
template <typename T>
CLIPVIP_INLINE void store_up_to(int64_t n, T* to, Vec a) {
  if (n >= kLanes) {
    store(to, a);
  } else {
    store_first(to, a, n);
  }
}

// `from` is readable up to a whole vector.
template <typename T>
CLIPVIP_INLINE void store_scaled(T* to, const float* from, int64_t n, float factor, bool stream) {
  const Vec scale = broadcast(factor);
  if (stream && n % (2 * kLanes) == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
      stream_two(to + i, mul(load(from + i), scale), mul(load(from + i + kLanes), scale));
    }
  } else {
    for (int64_t i = 0; i < n; i += kLanes) {
      store_up_to(n - i, to + i, mul(load(from + i), scale));
    }
  }
}

// ---- Storage of probabilities: fp32 as they are; bf16 in pairs along the inner dimension of the
// product they enter, which is the keys (by_row) or the queries (by_column).

template <typename Dot>
struct Weights;

template <>
struct Weights<Fp32Dot> {
  static CLIPVIP_INLINE void put(float* row, int64_t i, Vec weight) { store(row + i, weight); }
};

#if defined(__AVX512BF16__)
template <>
struct Weights<Bf16Dot> {
  static CLIPVIP_INLINE void put(float* row, int64_t i, Vec weight) {
    store(reinterpret_cast<bfloat16*>(row) + i, weight);
  }
};
#endif

// Products q·k to logits in base 2.
struct StoreLogits {
  float* logits;
  int64_t step;
  float factor;

  template <int MR, int NV>
  CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) {
        store(logits + (i + r) * step + (v + c) * kLanes, mul(acc[r][c], broadcast(factor)));
      }
    }
  }
};

// Turns a row of logits into weights 2^(logit − highest), in place; padding becomes 0. In a row of
// only -inf all weights are 0 and `highest` is finite, so that other frames' parts still count.
template <typename Dot>
CLIPVIP_INLINE void softmax_row(float* row, int64_t keys, float& highest, float& sum) {
  const Vec least = broadcast(-kInfinity);
  const int64_t whole = keys / kLanes * kLanes, rest = keys - whole;
  Vec max0 = least, max1 = least;
  for (int64_t i = 0; i < whole; i += 2 * kLanes) {
    max0 = max(load(row + i), max0);
    if (i + kLanes < whole) max1 = max(load(row + i + kLanes), max1);
  }
  if (rest) max1 = max(first(rest, load(row + whole), least), max1);
  highest = reduce_max(max(max0, max1));
  if (highest == -kInfinity) highest = -__FLT_MAX__;
  const Vec shift = broadcast(highest);
  Vec total = zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec weight = exp2(sub(load(row + i), shift));
    total = add(total, weight);
    Weights<Dot>::put(row, i, weight);
  }
  if (rest) {
    const Vec weight = first(rest, exp2(sub(load(row + whole), shift)), zero());
    total = add(total, weight);
    Weights<Dot>::put(row, whole, weight);
  }
  sum = reduce_add(total);
}

// ---- Forward

struct ForwardPartials {  // of one frame and head
  float* acc;    // [M, padded D], sums of weights · values
  float* stats;  // [M, 2], max and sum of weights
};

CLIPVIP_INLINE ForwardPartials forward_partials(const ProxyAttentionParams& p, int64_t frame,
                                                int64_t head) {
  float* base = p.workspace +
                p.threads * proxy_attention_floats_per_thread(p.num_proxies + p.patches,
                                                              p.head_dim(), false);
  const int64_t index = (frame * p.heads() + head) * p.num_proxies;
  const int64_t padded = proxy_attention_padded_dim(p.head_dim());
  return {base + index * padded,
          base + p.frames() * p.heads() * p.num_proxies * padded + index * 2};
}

// `next` is the unit that this thread computes after this one; its keys and values are prefetched.
template <typename Dot, typename T>
void forward_unit(const ProxyAttentionParams& p, const Unit& unit, const Unit& next, int thread) {
  using Word = typename Dot::Word;
  const int64_t D = p.head_dim(), d_words = D / Dot::kElements;
  const int64_t width = round_up(D, kLanes), d_vectors = width / kLanes;
  const int64_t keys = unit.tokens(), vectors = (keys + kLanes - 1) / kLanes;
  const int64_t key_words = (keys + Dot::kElements - 1) / Dot::kElements, step = vectors * kLanes;
  const int64_t block = proxy_attention_block_rows(keys);
  const int64_t padded_block = round_up(block, kRowPadding);
  Arena arena{p.workspace +
              thread * proxy_attention_floats_per_thread(p.num_proxies + p.patches, D, false)};
  Word* query = arena.take<Word>(padded_block * d_words);
  float* weights = arena.take<float>(padded_block * step);
  Word* key = arena.take<Word>(packed_words(d_words, vectors));
  Word* value = arena.take<Word>(packed_words(key_words, d_vectors));
  float* result = arena.take<float>(padded_block * width);

  const auto q = part_of<const T>(p.qkv, 0, unit.head), k = part_of<const T>(p.qkv, 1, unit.head),
             v = part_of<const T>(p.qkv, 2, unit.head);
  const auto out = head_of<T>(p.out, unit.head);
  const bool stream = streams<T>(p.out);
  float* lse = p.lse.as<float>() + unit.head * p.lse.stride[0];
  pack_transposed<Dot>(key, [&](int64_t i) { return k(unit.token(i)); }, keys, d_words, vectors);
  pack_rows<Dot>(value, [&](int64_t i) { return v(unit.token(i)); }, keys, D);

  const int64_t blocks = (keys + block - 1) / block;
  for (int64_t start = 0; start < keys; start += block) {
    const int64_t rows = smaller(block, keys - start);
    const Share next_share = share(next.tokens(), start / block, blocks);
    copy_rows<Dot>(query, d_words, [&](int64_t i) { return q(unit.token(start + i)); }, rows,
                   round_up(rows, kRowPadding), d_words);
    prefetch_rows(q, unit, {start + block, start + 2 * block}, D);
    if (start + block >= keys) {
      prefetch_rows(part_of<const T>(p.qkv, 0, next.head), next, {0, block}, D);
    }
    gemm<Dot>(rows, vectors, d_words, Operand<Dot>{query, d_words, 1}, key,
              StoreLogits{weights, step, p.scale * kLog2E});
    prefetch_rows(part_of<const T>(p.qkv, 1, next.head), next, next_share, D);
    float highest[kProxyAttentionPaddedRows], sum[kProxyAttentionPaddedRows];
    for (int64_t i = 0; i < rows; ++i) {
      float* row = weights + i * step;
      if (start + i < unit.proxies && !unit.first) {
        for (int64_t j = 0; j < unit.proxies; ++j) row[j] = -kInfinity;
      }
      softmax_row<Dot>(row, keys, highest[i], sum[i]);
    }
    prefetch_rows(part_of<const T>(p.qkv, 2, next.head), next, next_share, D);
    gemm<Dot>(rows, d_vectors, key_words,
              Operand<Dot>{reinterpret_cast<const Word*>(weights), step, 1}, value,
              StoreTile{result, width});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = start + i, token = unit.token(row);
      if (row < unit.proxies && !unit.direct) {
        const ForwardPartials partials = forward_partials(p, unit.frame, unit.head);
        store_scaled(partials.acc + row * proxy_attention_padded_dim(D), result + i * width, width,
                     1.f, false);
        partials.stats[row * 2] = highest[i];
        partials.stats[row * 2 + 1] = sum[i];
      } else {
        store_scaled(out(token), result + i * width, D, 1.f / sum[i], stream);
        lse[token] = highest[i] + ::log2f(sum[i]);
      }
    }
  }
  stream_fence();
}

// The proxies of one video and head from their partial results over frames.
template <typename T>
void combine_forward(const ProxyAttentionParams& p, int64_t video, int64_t head) {
  const int32_t* offsets = p.frame_offsets.as<int32_t>();
  const int64_t begin = offsets[video], end = offsets[video + 1];
  const int64_t D = p.head_dim(), d_vectors = (D + kLanes - 1) / kLanes;
  const auto out = head_of<T>(p.out, head);
  for (int64_t m = 0; m < p.num_proxies; ++m) {
    float highest = -kInfinity, sum = 0;
    for (int64_t f = begin; f < end; ++f) {
      const float each = forward_partials(p, f, head).stats[m * 2];
      highest = each > highest || each != each ? each : highest;
    }
    Vec total[128 / kLanes];
    for (int64_t d = 0; d < d_vectors; ++d) total[d] = zero();
    for (int64_t f = begin; f < end; ++f) {
      const ForwardPartials partials = forward_partials(p, f, head);
      const float* acc = partials.acc + m * proxy_attention_padded_dim(D);
      const float weight = ::exp2f(partials.stats[m * 2] - highest);
      sum += weight * partials.stats[m * 2 + 1];
      for (int64_t d = 0; d < d_vectors; ++d) {
        total[d] = fma(broadcast(weight), load(acc + d * kLanes), total[d]);
      }
    }
    const int64_t token = video * p.num_proxies + begin * p.patches + m;
    for (int64_t d = 0; d < d_vectors; ++d) {
      store_up_to(D - d * kLanes, out(token) + d * kLanes,
                  mul(total[d], broadcast(1.f / sum)));
    }
    p.lse.as<float>()[head * p.lse.stride[0] + token] = highest + ::log2f(sum);
  }
}

template <typename Dot, typename T>
int64_t forward(const ProxyAttentionParams& p) {
  if (!p.workspace) return proxy_attention_workspace_bytes(p, false);
  for_each_unit(
      p,
      [&](const Unit& unit, const Unit& next, int thread) {
        forward_unit<Dot, T>(p, unit, next, thread);
      },
      [&](int64_t video, int64_t head) { combine_forward<T>(p, video, head); });
  return 0;
}

// ---- Backward. With P the weights, recomputed from the saved log-sum-exp:
//   dV = Pᵀ·dO   dP = dO·Vᵀ   dS = P ∘ (dP − rowsum(O ∘ dO))   dQ = scale·dS·K   dK = scale·dSᵀ·Q
// P and dS enter products both by rows (dQ) and by columns (dV, dK).

template <typename Dot>
struct Scores;

template <>
struct Scores<Fp32Dot> {
  float *p, *ds;  // [rows, step]
  int64_t step;

  CLIPVIP_INLINE Scores(Arena& arena, int64_t rows, int64_t step)
      : p(arena.take<float>(rows * step)), ds(arena.take<float>(rows * step)), step(step) {}
  CLIPVIP_INLINE Operand<Fp32Dot> p_columns() const { return {p, 1, step}; }
  CLIPVIP_INLINE Operand<Fp32Dot> ds_columns() const { return {ds, 1, step}; }
  CLIPVIP_INLINE Operand<Fp32Dot> ds_rows() const { return {ds, step, 1}; }
  CLIPVIP_INLINE void clear_p(int64_t i, int64_t j) { p[i * step + j] = 0; }
  CLIPVIP_INLINE void clear_ds(int64_t i, int64_t j) { ds[i * step + j] = 0; }

  struct PutP {
    const Scores& to;
    const float* lse;
    float factor;

    template <int MR, int NV>
    CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        const Vec shift = broadcast(-lse[i + r]);
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) {
          store(to.p + (i + r) * to.step + (v + c) * kLanes,
                exp2(fma(acc[r][c], broadcast(factor), shift)));
        }
      }
    }
  };
  struct PutDs {
    const Scores& to;
    const float* delta;

    template <int MR, int NV>
    CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        const Vec shift = broadcast(delta[i + r]);
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) {
          const int64_t at = (i + r) * to.step + (v + c) * kLanes;
          store(to.ds + at, mul(load(to.p + at), sub(acc[r][c], shift)));
        }
      }
    }
  };
};

#if defined(__AVX512BF16__)
template <>
struct Scores<Bf16Dot> {
  uint32_t *p, *ds;   // [rows / 2, step], words of two rows
  uint32_t* ds_wide;  // [rows, step / 2], words of two keys
  int64_t step;

  CLIPVIP_INLINE Scores(Arena& arena, int64_t rows, int64_t step)
      : p(arena.take<uint32_t>(rows / 2 * step)),
        ds(arena.take<uint32_t>(rows / 2 * step)),
        ds_wide(arena.take<uint32_t>(rows * step / 2)),
        step(step) {}
  CLIPVIP_INLINE Operand<Bf16Dot> p_columns() const { return {p, 1, step}; }
  CLIPVIP_INLINE Operand<Bf16Dot> ds_columns() const { return {ds, 1, step}; }
  CLIPVIP_INLINE Operand<Bf16Dot> ds_rows() const { return {ds_wide, step / 2, 1}; }
  CLIPVIP_INLINE void clear_p(int64_t i, int64_t j) {
    p[i / 2 * step + j] &= i % 2 ? 0x0000ffffu : 0xffff0000u;
  }
  CLIPVIP_INLINE void clear_ds(int64_t i, int64_t j) {
    ds_wide[i * step / 2 + j / 2] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
  }

  // Words of two rows: bf16 of `low` in the low halves, of `high` in the high halves.
  static CLIPVIP_INLINE __m512i pair(Vec low, Vec high) {
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
        19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }

  struct PutP {
    const Scores& to;
    const float* lse;
    float factor;

    template <int MR, int NV>
    CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
#pragma GCC unroll 12
      for (int r = 0; r < MR; r += 2) {
        const Vec shift0 = broadcast(-lse[i + r]), shift1 = broadcast(-lse[i + r + 1]);
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) {
          const Vec p0 = exp2(fma(acc[r][c], broadcast(factor), shift0));
          const Vec p1 = exp2(fma(acc[r + 1][c], broadcast(factor), shift1));
          _mm512_storeu_si512(to.p + (i + r) / 2 * to.step + (v + c) * kLanes, pair(p0, p1));
        }
      }
    }
  };
  struct PutDs {
    const Scores& to;
    const float* delta;

    template <int MR, int NV>
    CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
#pragma GCC unroll 12
      for (int r = 0; r < MR; r += 2) {
        const Vec shift0 = broadcast(delta[i + r]), shift1 = broadcast(delta[i + r + 1]);
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) {
          const int64_t at = (i + r) / 2 * to.step + (v + c) * kLanes;
          const __m512i p = _mm512_loadu_si512(to.p + at);
          const Vec p0 = _mm512_castsi512_ps(_mm512_slli_epi32(p, 16));
          const Vec p1 = _mm512_castsi512_ps(_mm512_and_si512(p, _mm512_set1_epi32(0xffff0000)));
          const Vec ds0 = mul(p0, sub(acc[r][c], shift0)), ds1 = mul(p1, sub(acc[r + 1][c], shift1));
          _mm512_storeu_si512(to.ds + at, pair(ds0, ds1));
          bfloat16* wide = reinterpret_cast<bfloat16*>(to.ds_wide) + (v + c) * kLanes;
          store(wide + (i + r) * to.step, ds0);
          store(wide + (i + r + 1) * to.step, ds1);
        }
      }
    }
  };
};
#endif

// [3, M, padded D] of one frame and head: the proxies' gradients of query, key and value.
CLIPVIP_INLINE float* backward_partials(const ProxyAttentionParams& p, int64_t frame,
                                        int64_t head) {
  return p.workspace +
         p.threads * proxy_attention_floats_per_thread(p.num_proxies + p.patches, p.head_dim(),
                                                       true) +
         (frame * p.heads() + head) * 3 * p.num_proxies *
             proxy_attention_padded_dim(p.head_dim());
}

template <typename T>
CLIPVIP_INLINE float dot_product(const T* a, const T* b, int64_t n) {
  Vec sum = zero();
  for (int64_t i = 0; i < n; i += kLanes) {
    sum = fma(load_up_to(n - i, a + i), load_up_to(n - i, b + i), sum);
  }
  return reduce_add(sum);
}

template <typename Dot, typename T>
void backward_unit(const ProxyAttentionParams& p, const Unit& unit, const Unit& next, int thread) {
  using Word = typename Dot::Word;
  const int64_t D = p.head_dim(), d_words = D / Dot::kElements;
  const int64_t width = round_up(D, kLanes), d_vectors = width / kLanes;
  const int64_t keys = unit.tokens(), vectors = (keys + kLanes - 1) / kLanes;
  const int64_t key_words = (keys + Dot::kElements - 1) / Dot::kElements, step = vectors * kLanes;
  const int64_t block = proxy_attention_block_rows(keys);
  const int64_t padded_block = round_up(block, kRowPadding);
  Arena arena{p.workspace +
              thread * proxy_attention_floats_per_thread(p.num_proxies + p.patches, D, true)};
  Scores<Dot> scores(arena, padded_block, step);
  Word* query = arena.take<Word>(padded_block * d_words);
  Word* grad_out = arena.take<Word>(padded_block * d_words);
  const bool same = packs_like_copy<Dot>(D);
  const int64_t packed_block = padded_block / Dot::kElements * width;
  Word* query_rows = same ? query : arena.take<Word>(packed_block);
  Word* grad_out_rows = same ? grad_out : arena.take<Word>(packed_block);
  float* grad_query = arena.take<float>(padded_block * width);
  float* grad_key = arena.take<float>(round_up(keys, kRowPadding) * width);
  float* grad_value = arena.take<float>(round_up(keys, kRowPadding) * width);
  Word* key = arena.take<Word>(packed_words(d_words, vectors));
  Word* value = arena.take<Word>(packed_words(d_words, vectors));
  Word* key_rows = arena.take<Word>(packed_words(key_words, d_vectors));
  float lse[kProxyAttentionPaddedRows], delta[kProxyAttentionPaddedRows];

  const auto q = part_of<const T>(p.qkv, 0, unit.head), k = part_of<const T>(p.qkv, 1, unit.head),
             v = part_of<const T>(p.qkv, 2, unit.head);
  const auto out = head_of<const T>(p.out, unit.head),
             dout = head_of<const T>(p.grad_out, unit.head);
  const float* saved_lse = p.lse.as<float>() + unit.head * p.lse.stride[0];
  const bool stream = streams<T>(p.grad_qkv);
  const auto put = [&](int part, int64_t row, const float* from, float by) {
    if (row < unit.proxies && !unit.direct) {
      float* to = backward_partials(p, unit.frame, unit.head);
      store_scaled(to + (part * unit.proxies + row) * proxy_attention_padded_dim(D), from, width,
                   by, false);
    } else {
      store_scaled(part_of<T>(p.grad_qkv, part, unit.head)(unit.token(row)), from, D, by, stream);
    }
  };
  const auto key_row = [&](int64_t i) { return k(unit.token(i)); };
  pack_transposed<Dot>(key, key_row, keys, d_words, vectors);
  pack_transposed<Dot>(value, [&](int64_t i) { return v(unit.token(i)); }, keys, d_words, vectors);
  pack_rows<Dot>(key_rows, key_row, keys, D);

  // Inputs of the next block or unit are prefetched between the products.
  const int64_t blocks = (keys + block - 1) / block;
  for (int64_t start = 0; start < keys; start += block) {
    const bool last = start + block >= keys;
    const Unit& following = last ? next : unit;
    const int64_t after = last ? 0 : start + block;
    const Share then{after, after + block};
    const Share next_share = share(next.tokens(), start / block, blocks);
    const int64_t rows = smaller(block, keys - start), padded = round_up(rows, kRowPadding);
    const int64_t row_words = (rows + Dot::kElements - 1) / Dot::kElements;
    const auto query_row = [&](int64_t i) { return q(unit.token(start + i)); };
    const auto grad_row = [&](int64_t i) { return dout(unit.token(start + i)); };
    copy_rows<Dot>(query, d_words, query_row, rows, padded, d_words);
    copy_rows<Dot>(grad_out, d_words, grad_row, rows, padded, d_words);
    if (!same) {
      pack_rows<Dot>(query_rows, query_row, rows, D);
      pack_rows<Dot>(grad_out_rows, grad_row, rows, D);
    }
    for (int64_t i = 0; i < padded; ++i) {
      const int64_t token = unit.token(start + i);
      lse[i] = i < rows ? saved_lse[token] : kInfinity;
      delta[i] = i < rows ? dot_product<T>(out(token), dout(token), D) : 0;
    }

    prefetch_rows(part_of<const T>(p.qkv, 0, following.head), following, then, D);
    prefetch_rows(part_of<const T>(p.qkv, 1, next.head), next, next_share, D);
    gemm<Dot>(rows, vectors, d_words, Operand<Dot>{query, d_words, 1}, key,
              typename Scores<Dot>::PutP{scores, lse, p.scale * kLog2E});
    if (!unit.first) {
      for (int64_t i = 0; i < smaller(rows, unit.proxies - start); ++i) {
        for (int64_t j = 0; j < unit.proxies; ++j) scores.clear_p(i, j);
      }
    }
    prefetch_rows(head_of<const T>(p.out, following.head), following, then, D);
    gemm<Dot>(rows, vectors, d_words, Operand<Dot>{grad_out, d_words, 1}, value,
              typename Scores<Dot>::PutDs{scores, delta});
    if (keys % Dot::kElements) {
      for (int64_t i = 0; i < rows; ++i) scores.clear_ds(i, keys);
    }
    prefetch_rows(head_of<const T>(p.grad_out, following.head), following, then, D);
    gemm_into<Dot>(keys, d_vectors, row_words, scores.p_columns(), grad_out_rows, grad_value,
                   width, start > 0);
    prefetch_rows(part_of<const T>(p.qkv, 2, next.head), next, next_share, D);
    gemm_into<Dot>(keys, d_vectors, row_words, scores.ds_columns(), query_rows, grad_key,
                   width, start > 0);
    gemm<Dot>(rows, d_vectors, key_words, scores.ds_rows(), key_rows, StoreTile{grad_query, width});
    for (int64_t i = 0; i < rows; ++i) put(0, start + i, grad_query + i * width, p.scale);
  }
  for (int64_t i = 0; i < keys; ++i) {
    put(1, i, grad_key + i * width, p.scale);
    put(2, i, grad_value + i * width, 1.f);
  }
  stream_fence();
}

template <typename T>
void combine_backward(const ProxyAttentionParams& p, int64_t video, int64_t head) {
  const int32_t* offsets = p.frame_offsets.as<int32_t>();
  const int64_t D = p.head_dim(), begin = offsets[video], end = offsets[video + 1];
  for (int part = 0; part < 3; ++part) {
    for (int64_t m = 0; m < p.num_proxies; ++m) {
      const int64_t token = video * p.num_proxies + begin * p.patches + m;
      T* to = part_of<T>(p.grad_qkv, part, head)(token);
      for (int64_t d = 0; d < D; d += kLanes) {
        Vec sum = zero();
        for (int64_t f = begin; f < end; ++f) {
          const float* row = backward_partials(p, f, head) +
                             (part * p.num_proxies + m) * proxy_attention_padded_dim(D);
          sum = add(sum, load(row + d));
        }
        store_up_to(D - d, to + d, sum);
      }
    }
  }
}

template <typename Dot, typename T>
int64_t backward(const ProxyAttentionParams& p) {
  if (!p.workspace) return proxy_attention_workspace_bytes(p, true);
  for_each_unit(
      p,
      [&](const Unit& unit, const Unit& next, int thread) {
        backward_unit<Dot, T>(p, unit, next, thread);
      },
      [&](int64_t video, int64_t head) { combine_backward<T>(p, video, head); });
  return 0;
}

}  // namespace

int64_t proxy_attention_forward(const ProxyAttentionParams& params) {
  switch (params.qkv.dtype) {
    case DType::float32: return forward<Fp32Dot, float>(params);
#if defined(__AVX512BF16__)
    case DType::bfloat16: return forward<Bf16Dot, bfloat16>(params);
#else
    case DType::bfloat16: return forward<Fp32Dot, bfloat16>(params);
#endif
    default: return forward<Fp32Dot, float16>(params);
  }
}

int64_t proxy_attention_backward(const ProxyAttentionParams& params) {
  switch (params.qkv.dtype) {
    case DType::float32: return backward<Fp32Dot, float>(params);
#if defined(__AVX512BF16__)
    case DType::bfloat16: return backward<Bf16Dot, bfloat16>(params);
#else
    case DType::bfloat16: return backward<Fp32Dot, bfloat16>(params);
#endif
    default: return backward<Fp32Dot, float16>(params);
  }
}

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
