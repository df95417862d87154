// Backward: a block yields the gradients of a frame's queries, keys and values of one head, and the
// frame's part of the proxies' gradients; a second kernel adds those parts up.
//
// Weights are computed again from the saved log-sum-exp: once with queries as rows, for the
// queries' gradient, and once transposed with keys as rows, for the gradients of keys and values.
// That is seven products instead of the minimum of five, but warps exchange nothing; memory
// traffic, not arithmetic, is the limit.
#include "proxy_attention/cuda.h"
#include "proxy_attention/kernel.cuh"

namespace clipvip {
namespace proxy_attention {
namespace {

struct alignas(8) RowStatistics {
  float lse, delta;  // delta: Σ out · grad_out over the head
};

template <typename T>
struct BackwardParams {
  Shape shape;
  Matrix<const T> q, k, v, out, grad_out;
  Matrix<T> grad_q, grad_k, grad_v;
  const float* lse;  // [heads, tokens]
  int64_t tokens;
  RowStatistics* statistics;  // [frames, heads, proxies + patches]
  float* partial;  // [frames, heads, proxies, 3, head_dim]: of grad_q, grad_k, grad_v
  float scale, scale2;  // scale · log2 e
  bool resident;
};

// Most warps of a block, such that registers suffice for two blocks per multiprocessor.
template <typename T, int kDim>
constexpr int kBackwardWarps = kTensorCore<T> && kDim <= 32 ? 6 : 4;

// What both sweeps need.
template <typename T, int kDim>
struct Sweep {
  const BackwardParams<T>& p;
  const Unit& unit;
  RowStatistics* statistics;  // the unit's
  float* scratch;

  // Whether a query gives weight to a key in this kernel.
  __device__ bool seen(int query, int key) const {
    return query < unit.rows && key < unit.rows &&
           (query >= unit.proxies || key >= unit.proxies);
  }
  // Whether that must be asked for a chunk of queries and a chunk of keys.
  __device__ bool edge(int query, int key) const {
    return query + kChunk > unit.rows || key + kChunk > unit.rows ||
           (query < unit.proxies && key < unit.proxies);
  }
  // Writes rows g and g + 8 of a gradient, its number `which` among partial results.
  __device__ void store(const float (&acc)[kDim / 8][4], float factor, const Matrix<T>& gradient,
                        int which, int first) const {
    const int head_dim = p.shape.head_dim;
    T* to[2];
    float* partial[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane() / 4 + 8 * half;
      to[half] = nullptr;
      partial[half] = nullptr;
      if (row < unit.proxies) {
        partial[half] = p.partial + (unit.proxy_index(p.shape, row) * 3 + which) * head_dim;
      } else if (row < unit.rows) {
        to[half] = gradient.row(unit.token(row), unit.head);
      }
    }
    store_rows<kDim>(acc, {factor, factor}, to, partial, head_dim);
  }
};

template <int kDim>
__device__ void clear(float (&acc)[kDim / 8][4]) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[n][e] = 0;
  }
}

// Queries own the rows: their statistics and their gradient.
template <typename T, int kDim>
struct QuerySweep : Sweep<T, kDim> {
  using Base = Sweep<T, kDim>;
  using Base::p, Base::unit, Base::statistics, Base::scratch;
  Operand<T, kDim> query;
  Operand<T, kDim, kTensorCore<T> && kDim <= 80> grad_out;
  float acc[kDim / 8][4];
  RowStatistics of[2];

  __device__ explicit QuerySweep(const Base& base) : Base(base) {}

  __device__ void begin(int first, const T* q, const T* d_out) {
    query.load(q);
    grad_out.load(d_out);
    clear<kDim>(acc);
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + g + 8 * half;
      const bool inside = row < unit.rows;
      float delta = 0;
      if (inside) {
        const T* out = p.out.row(unit.token(row), unit.head);
#pragma unroll 2
        for (int n = 0; 8 * n < p.shape.head_dim; ++n) {
          const int element = 8 * n + 2 * t, piece = element / Rows<T, kDim>::kPer16;
          const T* d = d_out + Rows<T, kDim>::at(g + 8 * half, piece) +
                       element % Rows<T, kDim>::kPer16;
          delta = fmaf(to_float(out[element]), to_float(d[0]), delta);
          delta = fmaf(to_float(out[element + 1]), to_float(d[1]), delta);
        }
      }
      delta += shuffle_xor(delta, 1);
      delta += shuffle_xor(delta, 2);
      of[half] = {inside ? p.lse[unit.head * p.tokens + unit.token(row)] : 0, delta};
      if (inside && t == 0) statistics[row] = of[half];
    }
  }

  __device__ void step(int first, int key, const T* k, const T* v) {
#pragma unroll 1
    for (int at = 0; at < kTileRows<T> && key + at < unit.rows; at += kChunk) {
      chunk(first, key + at, k + at * kDim, v + at * kDim);
    }
  }

  __device__ void chunk(int first, int key, const T* k, const T* v) {
    float weight[2][4] = {}, grad[2][4] = {};
    multiply(weight, query, k);
    multiply(grad, grad_out, v);
    const bool edge = this->edge(first, key);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float w = fast_exp2(fmaf(weight[n][e], p.scale2, -of[e / 2].lse));
        grad[n][e] = w * (grad[n][e] - of[e / 2].delta);
        const int row = first + lane() / 4 + 8 * (e / 2);
        if (edge && !this->seen(row, key + 8 * n + 2 * (lane() % 4) + e % 2)) grad[n][e] = 0;
      }
    }
    accumulate<kDim>(acc, grad, k, scratch);
  }

  __device__ void end(int first) { this->store(acc, p.scale, p.grad_q, 0, first); }
};

// Keys own the rows: their gradient and their values'.
template <typename T, int kDim>
struct KeySweep : Sweep<T, kDim> {
  using Base = Sweep<T, kDim>;
  using Base::p, Base::unit, Base::statistics, Base::scratch;
  // For large heads read from shared memory each time: accumulators leave too few registers.
  Operand<T, kDim, kTensorCore<T> && kDim <= 80> key;
  Operand<T, kDim, kTensorCore<T> && kDim <= 64> value;
  float grad_key[kDim / 8][4], grad_value[kDim / 8][4];

  __device__ explicit KeySweep(const Base& base) : Base(base) {}

  __device__ void begin(int, const T* k, const T* v) {
    key.load(k);
    value.load(v);
    clear<kDim>(grad_key);
    clear<kDim>(grad_value);
  }

  __device__ void step(int first, int query, const T* q, const T* grad_out) {
#pragma unroll 1
    for (int at = 0; at < kTileRows<T> && query + at < unit.rows; at += kChunk) {
      chunk(first, query + at, q + at * kDim, grad_out + at * kDim);
    }
  }

  __device__ void chunk(int first, int query, const T* q, const T* grad_out) {
    float weight[2][4] = {}, grad[2][4] = {};
    multiply(weight, key, q);
    multiply(grad, value, grad_out);
    const bool edge = this->edge(query, first);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = query + 8 * n + 2 * (lane() % 4) + i;
        const RowStatistics of = column < unit.rows ? statistics[column] : RowStatistics{0, 0};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int e = 2 * half + i;
          float w = fast_exp2(fmaf(weight[n][e], p.scale2, -of.lse));
          if (edge && !this->seen(column, first + lane() / 4 + 8 * half)) w = 0;
          weight[n][e] = w;
          grad[n][e] = w * (grad[n][e] - of.delta);
        }
      }
    }
    accumulate<kDim>(grad_value, weight, grad_out, scratch);
    accumulate<kDim>(grad_key, grad, q, scratch);
  }

  __device__ void end(int first) {
    this->store(grad_key, p.scale, p.grad_k, 1, first);
    this->store(grad_value, 1, p.grad_v, 2, first);
  }
};

// Bytes of shared memory: queries, keys, values and gradients of outputs, or a ring of two tiles of
// two of them and every warp's own rows of the other two; scratch for fp32.
template <typename T, int kDim>
size_t backward_shared(int rows, int warps, bool resident) {
  const int64_t kept = resident ? round_to_chunk(rows) : 2 * kTileRows<T>;
  const int64_t own = resident ? kept : int64_t{warps} * kChunk;
  return 2 * device::shared_bytes<T>(kept * kDim) + 2 * device::shared_bytes<T>(own * kDim) +
         (kTensorCore<T> ? 0 : device::shared_bytes<float>(warps * kChunk * kChunk));
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kBackwardWarps<T, kDim> * 32, 2) backward(BackwardParams<T> p) {
  const Unit unit = make_unit(p.shape);
  const int warps = threads() / 32, head_dim = p.shape.head_dim;
  const bool resident = p.resident;
  const int64_t kept = resident ? round_to_chunk(unit.rows) : 2 * kTileRows<T>;
  const int64_t own = resident ? kept : int64_t{warps} * kChunk;
  const int mine = resident ? 0 : warp() * kChunk * kDim;
  Shared shared;
  T* const ring[2] = {shared.take<T>(kept * kDim), shared.take<T>(kept * kDim)};
  T* const rows[2] = {shared.take<T>(own * kDim) + mine, shared.take<T>(own * kDim) + mine};
  float* const scratch =
      kTensorCore<T> ? nullptr
                     : shared.take<float>(warps * kChunk * kChunk) + warp() * kChunk * kChunk;
  RowStatistics* const statistics =
      p.statistics + (unit.frame * p.shape.heads + unit.head) * unit.rows;
  const Sweep<T, kDim> base{p, unit, statistics, scratch};

  const Pair<T> queries{{p.q, p.grad_out}, {rows[0], rows[1]}};
  const Pair<T> keys{{p.k, p.v}, {ring[0], ring[1]}};
  if (resident) {
    queries.template load<kDim>(unit, head_dim, 0, round_to_chunk(unit.rows), 0, thread(),
                                threads());
    for (int tile = 0; tile * kTileRows<T> < unit.rows; ++tile) {
      load_tile<T, kDim>(keys, unit, head_dim, tile, tile * kTileRows<T>);
      cp_async_commit();
    }
  }
  {
    QuerySweep<T, kDim> sweep(base);
    walk<T, kDim>(resident ? Tiles::kArriving : Tiles::kRing, resident, queries, keys, unit,
                  head_dim, sweep);
  }
  sync_block();  // statistics of all rows are written
  KeySweep<T, kDim> sweep(base);
  if (resident) {
    walk<T, kDim>(Tiles::kThere, true, keys, queries, unit, head_dim, sweep);
  } else {
    const Pair<T> own_keys{{p.k, p.v}, {rows[0], rows[1]}};
    const Pair<T> all_queries{{p.q, p.grad_out}, {ring[0], ring[1]}};
    walk<T, kDim>(Tiles::kRing, false, own_keys, all_queries, unit, head_dim, sweep);
  }
}

// A warp computes a proxy's gradients: its attention to and from other proxies, then the frames'
// parts in order.
template <typename T>
__global__ void __launch_bounds__(128) reduce(BackwardParams<T> p) {
  const Shape& shape = p.shape;
  const int64_t index = int64_t{block_x()} * 4 + warp();
  const int proxy = static_cast<int>(index % shape.proxies);
  const int head = static_cast<int>(index / shape.proxies % shape.heads);
  const int64_t video = index / shape.proxies / shape.heads;
  if (video >= shape.videos) return;
  const int dim = shape.head_dim;
  const int64_t token = proxy_token(shape, static_cast<int>(video)), self = token + proxy;
  const auto row = [&](const Matrix<const T>& x, int64_t at) {
    return Elements<T>(x.row(at, head), dim);
  };
  const auto lse = [&](int64_t at) { return p.lse[head * p.tokens + at]; };
  const Elements<T> query = row(p.q, self), key = row(p.k, self), value = row(p.v, self);
  const Elements<T> grad_out = row(p.grad_out, self);
  const float delta = grad_out.dot(row(p.out, self));
  Elements<float> grad_query, grad_key, grad_value;
  for (int other = 0; other < shape.proxies; ++other) {
    const int64_t at = token + other;
    {  // as a query, which gives weight to another's key
      const Elements<T> other_key = row(p.k, at);
      const float weight = fast_exp2(fmaf(query.dot(other_key), p.scale2, -lse(self)));
      const float grad = weight * (grad_out.dot(row(p.v, at)) - delta);
      grad_query.add(other_key, grad * p.scale);
    }
    {  // as a key, which another's query gives weight to
      const Elements<T> other_query = row(p.q, at), other_grad = row(p.grad_out, at);
      const float weight = fast_exp2(fmaf(other_query.dot(key), p.scale2, -lse(at)));
      const float grad = weight * (other_grad.dot(value) - other_grad.dot(row(p.out, at)));
      grad_key.add(other_query, grad * p.scale);
      grad_value.add(other_grad, weight);
    }
  }
  const int64_t end = frame_offset(shape, static_cast<int>(video) + 1);
  for (int64_t frame = frame_offset(shape, static_cast<int>(video)); frame < end; ++frame) {
    const float* part =
        p.partial + ((frame * shape.heads + head) * shape.proxies + proxy) * 3 * dim;
    grad_query.add(Elements<float>(part, dim), 1);
    grad_key.add(Elements<float>(part + dim, dim), 1);
    grad_value.add(Elements<float>(part + 2 * dim, dim), 1);
  }
  grad_query.store(p.grad_q.row(self, head), dim);
  grad_key.store(p.grad_k.row(self, head), dim);
  grad_value.store(p.grad_v.row(self, head), dim);
}

}  // namespace
}  // namespace proxy_attention

int64_t proxy_attention_backward_cuda(const Tensor& grad_out, const Tensor& qkv,
                                      const Tensor& frame_offsets, int64_t num_proxies,
                                      int64_t patches, float scale, const Tensor& out,
                                      const Tensor& lse, const Tensor& grad_qkv, int device,
                                      uintptr_t handle, uintptr_t workspace) {
  using namespace proxy_attention;
  const device::Stream stream{device, handle};
  const Shape shape = make_shape(qkv, frame_offsets, num_proxies, patches);
  const int rows = shape.proxies + shape.patches;
  const int64_t units = shape.frames * shape.heads;
  // A multiple of 16 bytes, after which the partial results begin.
  const int64_t statistics = (2 * units * rows + 3) / 4 * 4;
  const int64_t floats = statistics + units * shape.proxies * 3 * shape.head_dim;
  if (floats > 0 && !workspace) return floats * sizeof(float);
  const auto what = [&] { return describe("backward", qkv, shape); };
  for_instance(qkv.dtype, shape.head_dim, [&](auto instance) {
    using T = typename decltype(instance)::Element;
    constexpr int kDim = decltype(instance)::kHeadDim;
    BackwardParams<T> p{shape,
                        part_of<const T>(qkv, 0),
                        part_of<const T>(qkv, 1),
                        part_of<const T>(qkv, 2),
                        matrix_of<const T>(out),
                        matrix_of<const T>(grad_out),
                        part_of<T>(grad_qkv, 0),
                        part_of<T>(grad_qkv, 1),
                        part_of<T>(grad_qkv, 2),
                        lse.dense<const float>(shape.heads * qkv.size[0]),
                        qkv.size[0],
                        reinterpret_cast<RowStatistics*>(workspace),
                        reinterpret_cast<float*>(workspace) + statistics,
                        scale,
                        scale * kLog2E,
                        true};
    const Plan plan = make_plan(rows, kBackwardWarps<T, kDim>, stream, [&](int warps, bool all) {
      return backward_shared<T, kDim>(rows, warps, all);
    });
    p.resident = plan.resident;
    device::launch(backward<T, kDim>, {shape.frames * shape.heads}, plan.warps * 32, plan.shared,
                   stream, p, what);
    device::launch(reduce<T>, {(int64_t{shape.videos} * shape.heads * shape.proxies + 3) / 4}, 128,
                   0, stream, p, what);
  });
  return 0;
}

}  // namespace clipvip
