// Forward: a block computes a frame's patches of one head, and the frame's part of the proxies'
// attention; a second kernel merges those parts.
#include <limits>

#include "proxy_attention/cuda.h"
#include "proxy_attention/kernel.cuh"

namespace clipvip {
namespace proxy_attention {
namespace {

template <typename T>
struct ForwardParams {
  Shape shape;
  Matrix<const T> q, k, v;
  Matrix<T> out;
  float* lse;      // [heads, tokens]
  int64_t tokens;
  float* partial;  // [frames, heads, proxies, head_dim + 2]: sum of 2^(x - max)·v, max, sum of 2^(…)
  float scale2;    // scale · log2 e
  float magnitude;  // of scale2, never 0: times this, a masked logit of -inf stays -inf
  bool resident;
};

// Most warps of a block that shares a multiprocessor's registers with another. Seven warps
// share the 13 tiles of 16 rows of B/16 evenly; larger heads need more registers per thread.
template <typename T, int kDim>
constexpr int kForwardWarps = kTensorCore<T> && kDim <= 64 ? 7 : 4;

template <typename T, int kDim>
struct ForwardBody {
  static constexpr int kChunks = 2;  // of 16 keys at a time: more would need too many registers

  const ForwardParams<T>& p;
  const Unit& unit;
  const Matrices<T, 1>& queries;  // of the warp
  float* scratch;
  Operand<T, kDim> query;
  float acc[kDim / 8][4], most[2], sum[2];

  __device__ void begin(int, const T* q, const T*) {
    query.load(q);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[n][e] = 0;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) most[half] = -INFINITY, sum[half] = 0;
  }

  // Starts to copy the warp's queries from `first` on.
  __device__ void load(int first) const {
    queries.template load<kDim>(unit, p.shape.head_dim, first, kChunk, 0, lane(), 32);
    cp_async_commit();
  }

  __device__ void step(int first, int key, const T* k, const T* v) {
    const int next = first + threads() / 32 * kChunk;
    if (kTensorCore<T> && p.resident && key + kTileRows<T> >= unit.rows && next < unit.rows) {
      sync_warp();  // queries are in registers since `begin`: the next pass's can take their place
      load(next);
    }
#pragma unroll 1
    for (int at = 0; at < kTileRows<T> && key + at < unit.rows; at += kChunks * kChunk) {
      attend(first, key + at, k + at * kDim, v + at * kDim);
    }
  }

  __device__ void attend(int first, int key, const T* k, const T* v) {
    float logit[kChunks][2][4];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) logit[c][n][e] = 0;
      }
      if (key + c * kChunk < unit.rows) {
        multiply(logit[c], query, k + c * kChunk * kDim);
      }
    }
    mask(first, key, logit);
    float factor[2];
    bool grows = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = most[half];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          largest = fmaxf(largest, fmaxf(logit[c][n][2 * half], logit[c][n][2 * half + 1]));
        }
      }
      largest = fmaxf(largest, shuffle_xor(largest, 1));
      largest = fmaxf(largest, shuffle_xor(largest, 2));
      // A proxy's row sees nothing in a tile of proxies: its maximum is still -inf.
      const float reference = largest == -INFINITY ? 0 : scaled(largest);
      factor[half] = fast_exp2(fmaf(most[half], p.magnitude, -reference));
      grows |= most[half] != largest;
      most[half] = largest;
      float total = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            logit[c][n][e] = fast_exp2(fmaf(logit[c][n][e], p.magnitude, -reference));
            total += logit[c][n][e];
          }
        }
      }
      sum[half] = sum[half] * factor[half] + total;
    }
    if (any_lane(grows)) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[n][e] *= factor[e / 2];
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (key + c * kChunk < unit.rows) {
        accumulate<kDim>(acc, logit[c], v + c * kChunk * kDim, scratch);
      }
    }
  }

  __device__ float scaled(float logit) const { return rounded_product(logit, p.magnitude); }

  // Sets logits to -inf where a query gives no weight to a key in this kernel, and turns their
  // signs for a negative scale. Most tiles need neither.
  __device__ void mask(int first, int key, float (&logit)[kChunks][2][4]) const {
    if (key + kChunks * kChunk <= unit.rows && (first >= unit.proxies || key >= unit.proxies) &&
        p.scale2 >= 0) {
      return;
    }
    const int column = key + 2 * (lane() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // A proxy sees no proxy here.
      const int from = first + lane() / 4 + 8 * half < unit.proxies ? unit.proxies : 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int at = column + c * kChunk + 8 * n + i;
            float& x = logit[c][n][2 * half + i];
            x = at < from || at >= unit.rows ? -INFINITY : copysignf(1, p.scale2) * x;
          }
        }
      }
    }
  }

  __device__ void end(int first) {
    T* to[2];
    float *partial[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += shuffle_xor(sum[half], 1);
      sum[half] += shuffle_xor(sum[half], 2);
      const int row = first + lane() / 4 + 8 * half;
      to[half] = nullptr;
      partial[half] = nullptr;
      factor[half] = 1;
      if (row < unit.proxies) {
        partial[half] = p.partial + unit.proxy_index(row) * (p.shape.head_dim + 2);
        if (lane() % 4 == 0) {
          partial[half][p.shape.head_dim] = scaled(most[half]);
          partial[half][p.shape.head_dim + 1] = sum[half];
        }
      } else if (row < unit.rows) {
        to[half] = p.out.row(unit.token(row), unit.head);
        factor[half] = 1 / sum[half];
        if (lane() % 4 == 0) {
          p.lse[unit.head * p.tokens + unit.token(row)] = scaled(most[half]) + fast_log2(sum[half]);
        }
      }
    }
    store_rows<kDim>(acc, factor, to, partial, p.shape.head_dim);
  }
};

// Bytes of shared memory: keys and values, every warp's queries, and scratch for fp32.
template <typename T, int kDim>
size_t forward_shared(int rows, int warps, bool resident) {
  const int64_t kept = resident ? round_to_chunk(rows) : 2 * kTileRows<T>;
  return 2 * device::shared_bytes<T>(kept * kDim) +
         device::shared_bytes<T>(int64_t{warps} * kChunk * kDim) +
         (kTensorCore<T> ? 0 : device::shared_bytes<float>(warps * kChunk * kChunk));
}

template <typename T, int kDim>
__global__ void __launch_bounds__(most_threads(kForwardWarps<T, kDim>), 1)
    forward(ForwardParams<T> p) {
  const Unit unit = make_unit(p.shape);
  const int warps = threads() / 32;
  const int64_t kept = p.resident ? round_to_chunk(unit.rows) : 2 * kTileRows<T>;
  Shared shared;
  const Matrices<T> keys{{p.k, p.v}, {shared.take<T>(kept * kDim), shared.take<T>(kept * kDim)}};
  T* const queries = shared.take<T>(int64_t{warps} * kChunk * kDim);
  const Matrices<T, 1> query{{p.q}, {queries + warp() * kChunk * kDim}};
  float* const scratch =
      kTensorCore<T> ? nullptr
                     : shared.take<float>(warps * kChunk * kChunk) + warp() * kChunk * kChunk;
  ForwardBody<T, kDim> body{p, unit, query, scratch, {}, {}, {}, {}};
  if (p.resident) {
    query.template load<kDim>(unit, p.shape.head_dim, warp() * kChunk, kChunk, 0, lane(), 32);
    for (int tile = 0; tile * kTileRows<T> < unit.rows; ++tile) {
      load_tile<T, kDim>(keys, unit, p.shape.head_dim, tile, tile * kTileRows<T>);
      cp_async_commit();
    }
  }
#pragma unroll 1
  for (int start = 0; start < unit.rows; start += warps * kChunk) {  // a pass
    const int first = start + warp() * kChunk;
    if (!kTensorCore<T> && p.resident && start > 0) {
      sync_warp();
      body.load(first);
    }
    const Tiles state = !p.resident ? Tiles::kRing : start == 0 ? Tiles::kArriving : Tiles::kThere;
    pass<T, kDim>(state, 0, first, query, keys, unit, p.shape.head_dim, body);
  }
}

// A warp computes a proxy's result: its attention to proxies, then the frames' parts in order.
template <typename T>
__global__ void __launch_bounds__(128) combine(ForwardParams<T> p) {
  const Shape& shape = p.shape;
  const int64_t index = int64_t{block_x()} * 4 + warp();
  const int proxy = static_cast<int>(index % shape.proxies);
  const int head = static_cast<int>(index / shape.proxies % shape.heads);
  const int64_t video = index / shape.proxies / shape.heads;
  if (video >= shape.videos) return;
  const int64_t token = proxy_token(shape, static_cast<int>(video));
  const Elements<T> query(p.q.row(token + proxy, head), shape.head_dim);
  Elements<float> acc;
  float most = -INFINITY, sum = 0;
  const auto merge = [&](float other_most, float other_sum, const auto& other) {
    const float largest = fmaxf(most, other_most);
    const float reference = largest == -INFINITY ? 0 : largest;
    const float mine = fast_exp2(most - reference), others = fast_exp2(other_most - reference);
    acc.scale(mine);
    acc.add(other, others);
    sum = sum * mine + other_sum * others;
    most = largest;
  };
  for (int key = 0; key < shape.proxies; ++key) {
    const float logit = query.dot(Elements<T>(p.k.row(token + key, head), shape.head_dim));
    merge(logit * p.scale2, 1, Elements<T>(p.v.row(token + key, head), shape.head_dim));
  }
  const int64_t end = frame_offset(shape, static_cast<int>(video) + 1);
  for (int64_t frame = frame_offset(shape, static_cast<int>(video)); frame < end; ++frame) {
    const float* part = p.partial + ((frame * shape.heads + head) * shape.proxies + proxy) *
                                        (shape.head_dim + 2);
    merge(part[shape.head_dim], part[shape.head_dim + 1], Elements<float>(part, shape.head_dim));
  }
  acc.scale(1 / sum);
  acc.store(p.out.row(token + proxy, head), shape.head_dim);
  if (lane() == 0) p.lse[head * p.tokens + token + proxy] = most + fast_log2(sum);
}

}  // namespace
}  // namespace proxy_attention

int64_t proxy_attention_forward_cuda(const Tensor& qkv, const Tensor& frame_offsets,
                                     int64_t num_proxies, int64_t patches, float scale,
                                     const Tensor& out, const Tensor& lse, int device,
                                     uintptr_t handle, uintptr_t workspace) {
  using namespace proxy_attention;
  const device::Stream stream{device, handle};
  const Shape shape = make_shape(qkv, frame_offsets, num_proxies, patches);
  const int64_t partials = shape.frames * shape.heads * shape.proxies * (shape.head_dim + 2);
  if (partials > 0 && !workspace) return partials * sizeof(float);
  const auto what = [&] { return describe("forward", qkv, shape); };
  for_instance(qkv.dtype, shape.head_dim, [&](auto instance) {
    using T = typename decltype(instance)::Element;
    constexpr int kDim = decltype(instance)::kHeadDim;
    ForwardParams<T> p{shape,
                       part_of<const T>(qkv, 0),
                       part_of<const T>(qkv, 1),
                       part_of<const T>(qkv, 2),
                       matrix_of<T>(out),
                       lse.dense<float>(shape.heads * qkv.size[0]),
                       qkv.size[0],
                       reinterpret_cast<float*>(workspace),
                       scale * kLog2E,
                       scale == 0 ? std::numeric_limits<float>::denorm_min()
                                  : fabsf(scale * kLog2E),
                       true};
    const int rows = shape.proxies + shape.patches;
    const Plan plan = make_plan(rows, 1, kForwardWarps<T, kDim>, stream, [&](int warps, bool all) {
      return forward_shared<T, kDim>(rows, warps, all);
    });
    p.resident = plan.resident;
    device::launch(forward<T, kDim>, {shape.frames * shape.heads}, plan.warps * 32, plan.shared,
                   stream, p, what);
    device::launch(combine<T>, {(int64_t{shape.videos} * shape.heads * shape.proxies + 3) / 4}, 128,
                   0, stream, p, what);
  });
  return 0;
}

}  // namespace clipvip
