// Backward: a block yields the gradients of a frame's queries, keys and values of one head, and the
// frame's part of the proxies' gradients; a second kernel adds those parts up.
//
// Weights are computed again from the saved log-sum-exp: once with queries as rows, for the
// queries' gradient, and once transposed with keys as rows, for the gradients of keys and values.
// That is seven products instead of the minimum of five, but warps exchange nothing. The limit is
// not arithmetic, but traffic to global and shared memory.
#include "proxy_attention/cuda.h"
#include "proxy_attention/kernel.cuh"

namespace clipvip {
namespace proxy_attention {
namespace {

template <typename T>
struct BackwardParams {
  Shape shape;
  Matrix<const T> q, k, v, out, grad_out;
  Matrix<T> grad_q, grad_k, grad_v;
  const float* lse;  // [heads, tokens]
  int64_t tokens;
  float* partial;  // [frames, heads, proxies, 3, head_dim]: of grad_q, grad_k, grad_v
  float scale, scale2;  // scale · log2 e
  bool resident;
};

// Most warps of a block that shares a multiprocessor's registers with another.
template <typename T, int kDim>
constexpr int kBackwardWarps = kTensorCore<T> && kDim <= 32 ? 6 : 4;

// What both sweeps need.
template <typename T, int kDim>
struct Sweep {
  const BackwardParams<T>& p;
  const Unit& unit;
  const float* lse;
  const float* minus_delta;  // -Σ out · grad_out over the head; of the unit's rows, as lse
  float* scratch;

  // Sets exponents to -inf where a query gives no weight to a key in this kernel: past the ends, and
  // between proxies. One side's rows are from `row` on, the other's from `column` on. Most chunks
  // have no such place.
  __device__ void mask(float (&exponent)[2][4], int row, int column) const {
    if (row + kChunk <= unit.rows && column + kChunk <= unit.rows &&
        (row >= unit.proxies || column >= unit.proxies)) {
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane() / 4 + 8 * half;
      const int from = r < unit.proxies ? unit.proxies : 0, to = r < unit.rows ? unit.rows : 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = column + 8 * n + 2 * (lane() % 4) + i;
          if (c < from || c >= to) exponent[n][2 * half + i] = -INFINITY;
        }
      }
    }
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
        partial[half] = p.partial + (unit.proxy_index(row) * 3 + which) * head_dim;
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

// Queries own the rows: their gradient.
template <typename T, int kDim>
struct QuerySweep : Sweep<T, kDim> {
  using Base = Sweep<T, kDim>;
  using Base::p, Base::unit, Base::lse, Base::minus_delta, Base::scratch;
  Operand<T, kDim> query;
  Operand<T, kDim, kTensorCore<T> && kDim <= 80> grad_out;
  float acc[kDim / 8][4], lse_of[2], minus_delta_of[2];

  __device__ explicit QuerySweep(const Base& base) : Base(base) {}

  __device__ void begin(int first, const T* q, const T* d_out) {
    query.load(q);
    grad_out.load(d_out);
    clear<kDim>(acc);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + lane() / 4 + 8 * half;
      lse_of[half] = lse[row];
      minus_delta_of[half] = minus_delta[row];
    }
  }

  __device__ void step(int first, int key, const T* k, const T* v) {
#pragma unroll 1
    for (int at = 0; at < kTileRows<T> && key + at < unit.rows; at += kChunk) {
      chunk(first, key + at, k + at * kDim, v + at * kDim);
    }
  }

  __device__ void chunk(int first, int key, const T* k, const T* v) {
    float weight[2][4] = {}, grad[2][4];
    multiply(weight, query, k);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weight[n][e] = fmaf(weight[n][e], p.scale2, -lse_of[e / 2]);
        grad[n][e] = minus_delta_of[e / 2];
      }
    }
    multiply(grad, grad_out, v);
    this->mask(weight, first, key);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) grad[n][e] *= fast_exp2(weight[n][e]);
    }
    accumulate<kDim>(acc, grad, k, scratch);
  }

  __device__ void end(int first) { this->store(acc, p.scale, p.grad_q, 0, first); }
};

// Keys own the rows: their gradient and their values'.
template <typename T, int kDim>
struct KeySweep : Sweep<T, kDim> {
  using Base = Sweep<T, kDim>;
  using Base::p, Base::unit, Base::lse, Base::minus_delta, Base::scratch;
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
    float weight[2][4] = {}, grad[2][4];
    multiply(weight, key, q);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int column = query + 8 * n + 2 * (lane() % 4);
      const Float2 log = *reinterpret_cast<const Float2*>(lse + column);
      const Float2 delta = *reinterpret_cast<const Float2*>(minus_delta + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weight[n][e] = fmaf(weight[n][e], p.scale2, -(e % 2 ? log.y : log.x));
        grad[n][e] = e % 2 ? delta.y : delta.x;
      }
    }
    multiply(grad, value, grad_out);
    this->mask(weight, first, query);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weight[n][e] = fast_exp2(weight[n][e]);
        grad[n][e] *= weight[n][e];
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

// Writes lse and -Σ out · grad_out of the unit's rows to shared memory, and 0 past its rows.
template <typename T, int kDim>
__device__ void read_statistics(const BackwardParams<T>& p, const Unit& unit, float* lse,
                                float* minus_delta) {
  constexpr int kPer16 = Rows<T, kDim>::kPer16, kPieces = Rows<T, kDim>::kPieces;
  // Lanes per row, each one's pieces of 16 bytes, and its rows whose pieces are on their way at a
  // time.
  constexpr int kLanes = kPieces % 4 == 0 ? 4 : 2, kParts = kPieces / kLanes;
  constexpr int kRows = ceil_div(8, kParts);
  const int member = thread() % kLanes, step = threads() / kLanes, end = round_to_chunk(unit.rows);
  const auto inside = [&](int part) {
    return (part * kLanes + member) * kPer16 < p.shape.head_dim;
  };
  const int start = inside(0) ? member * kPer16 : 0;
  const T* const out_row = p.out.row(0, unit.head) + start;
  const T* const grad_row = p.grad_out.row(0, unit.head) + start;
#pragma unroll 1
  for (int first = thread() / kLanes; first < end; first += kRows * step) {
    Bytes16 out[kRows][kParts], grad_out[kRows][kParts];
    float log[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = first + i * step;
      const uint32_t token = unit.token(row < unit.rows ? row : 0);
      log[i] = p.lse[unit.head * p.tokens + token];
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const int element = inside(j) ? j * kLanes * kPer16 : 0;
        out[i][j] = *reinterpret_cast<const Bytes16*>(out_row + token * p.out.token_step + element);
        grad_out[i][j] = *reinterpret_cast<const Bytes16*>(
            grad_row + token * p.grad_out.token_step + element);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        T a[kPer16], b[kPer16];
        memcpy(a, &out[i][j], 16);
        memcpy(b, &grad_out[i][j], 16);
        float part = 0;
#pragma unroll
        for (int k = 0; k < kPer16; ++k) part = fmaf(to_float(a[k]), to_float(b[k]), part);
        if (inside(j)) sum += part;
      }
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
      const int row = first + i * step;
      if (row < end && member == 0) {
        lse[row] = row < unit.rows ? log[i] : 0;
        minus_delta[row] = row < unit.rows ? -sum : 0;
      }
    }
  }
}

// Bytes of shared memory: queries, keys, values and gradients of outputs, or a ring of two tiles of
// two of them and every warp's own rows of the other two; statistics of rows; scratch for fp32.
template <typename T, int kDim>
size_t backward_shared(int rows, int warps, bool resident) {
  const int64_t kept = resident ? round_to_chunk(rows) : 2 * kTileRows<T>;
  const int64_t own = resident ? kept : int64_t{warps} * kChunk;
  return 2 * device::shared_bytes<T>(kept * kDim) + 2 * device::shared_bytes<T>(own * kDim) +
         2 * device::shared_bytes<float>(round_to_chunk(rows)) +
         (kTensorCore<T> ? 0 : device::shared_bytes<float>(warps * kChunk * kChunk));
}

template <typename T, int kDim>
__global__ void __launch_bounds__(most_threads(kBackwardWarps<T, kDim>), 1)
    backward(BackwardParams<T> p) {
  const Unit unit = make_unit(p.shape);
  const int warps = threads() / 32, head_dim = p.shape.head_dim;
  const bool resident = p.resident;
  const int padded = round_to_chunk(unit.rows), tiles = ceil_div(unit.rows, kTileRows<T>);
  const int64_t kept = resident ? padded : 2 * kTileRows<T>;
  const int64_t own = resident ? kept : int64_t{warps} * kChunk;
  Shared shared;
  T* const ring[2] = {shared.take<T>(kept * kDim), shared.take<T>(kept * kDim)};
  T* const rows[2] = {shared.take<T>(own * kDim), shared.take<T>(own * kDim)};
  float* const lse = shared.take<float>(padded);
  float* const minus_delta = shared.take<float>(padded);
  float* const scratch =
      kTensorCore<T> ? nullptr
                     : shared.take<float>(warps * kChunk * kChunk) + warp() * kChunk * kChunk;

  const Matrices<T> queries{{p.q, p.grad_out}, {rows[0], rows[1]}};
  const Matrices<T> keys{{p.k, p.v}, {ring[0], ring[1]}};
  const int at_first = warps * kChunk;  // queries of the first turn
  if (resident) {
    queries.template load<kDim>(unit, head_dim, 0, at_first, 0, thread(), threads());
    load_tile<T, kDim>(keys, unit, head_dim, 0, 0);
    cp_async_commit();
  }
  read_statistics<T, kDim>(p, unit, lse, minus_delta);
  if (resident) {
    for (int tile = 1; tile < tiles; ++tile) {
      load_tile<T, kDim>(keys, unit, head_dim, tile, tile * kTileRows<T>);
      cp_async_commit();
    }
    queries.template load<kDim>(unit, head_dim, at_first, padded - at_first, at_first, thread(),
                                threads());
    cp_async_commit();
  }

  // A turn is 16 queries, or then 16 keys. In a ring all warps take turns of the same kind. When
  // the first turn ends, resident rows have all arrived: then warps do not wait for each other. Two
  // loops, because one would keep both sweeps' addresses in registers.
  const Sweep<T, kDim> base{p, unit, lse, minus_delta, scratch};
  const int chunks = padded / kChunk, turns = resident ? chunks : ceil_div(chunks, warps) * warps;
  const auto mine = [&](T* all, int first) {
    return all + (resident ? first : warp() * kChunk) * kDim;
  };
  int turn = warp();
#pragma unroll 1
  for (; turn < turns; turn += warps) {
    const int first = turn * kChunk;
    const Tiles state = !resident ? Tiles::kRing : turn < warps ? Tiles::kArriving : Tiles::kThere;
    const Matrices<T> own{{p.q, p.grad_out}, {mine(rows[0], first), mine(rows[1], first)}};
    QuerySweep<T, kDim> sweep(base);
    pass<T, kDim>(state, 1, first, own, keys, unit, head_dim, sweep);
  }
  T* const key_rows[2] = {resident ? ring[0] : rows[0], resident ? ring[1] : rows[1]};
  const Matrices<T> other{{p.q, p.grad_out},
                          {resident ? rows[0] : ring[0], resident ? rows[1] : ring[1]}};
#pragma unroll 1
  for (; turn < 2 * turns; turn += warps) {
    const int first = (turn - turns) * kChunk;
    const Matrices<T> own{{p.k, p.v}, {mine(key_rows[0], first), mine(key_rows[1], first)}};
    KeySweep<T, kDim> sweep(base);
    pass<T, kDim>(resident ? Tiles::kThere : Tiles::kRing, 0, first, own, other, unit, head_dim,
                  sweep);
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
  const int64_t floats = units * shape.proxies * 3 * shape.head_dim;
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
                        reinterpret_cast<float*>(workspace),
                        scale,
                        scale * kLog2E,
                        true};
    const Plan plan = make_plan(rows, 2, kBackwardWarps<T, kDim>, stream, [&](int warps, bool all) {
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
