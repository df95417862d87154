// Code that the forward and backward kernels of proxy-guided attention share.
//
// A block of threads computes one unit: one head of one frame. Its rows are at once its queries and
// its keys: the M proxies of the video, then the frame's L patches. The patches' results are
// complete; the proxies' are partial, one part per frame. A second, small kernel combines the parts
// in the order of frames, so that results are deterministic. It also computes the attention of
// proxies to proxies, which units leave out; so it serves videos without frames too.
#pragma once

#include <math.h>
#include <string.h>

#include <string>

#include "common/device.cuh"
#include "common/tensor.h"

namespace clipvip {
namespace proxy_attention {

using device::any_lane;
using device::bfloat16;
using device::block_x;
using device::Bytes16;
using device::cp_async16;
using device::cp_async_commit;
using device::cp_async_wait;
using device::fast_exp2;
using device::fast_log2;
using device::float16;
using device::from_float;
using device::lane;
using device::ldmatrix;
using device::mma;
using device::pack;
using device::rounded_product;
using device::Shared;
using device::shuffle_xor;
using device::sync_block;
using device::sync_warp;
using device::thread;
using device::threads;
using device::to_float;
using device::warp;

constexpr float kLog2E = 1.44269504088896340736f;

// ---- Layout of tensors --------------------------------------------------------------------------

struct Shape {
  const int32_t* frame_offsets;  // [videos + 1]; with any values no unit accesses other memory
  int64_t frames;
  int videos, heads, head_dim, proxies, patches;
};

// One of q, k, v, out, … : the element (token, head, 0) is data[token · token_step + head ·
// head_step].
template <typename T>
struct Matrix {
  T* data;
  int64_t token_step, head_step;

  __device__ T* row(int64_t token, int head) const {
    return data + token * token_step + head * head_step;
  }
};

struct Unit {
  int head;
  int proxies, rows;  // M and M + L
  // A row's token less the row, of proxies and of patches; Python refuses 2^31 tokens and more.
  int proxy_token, patch_token;

  // The place of a proxy's part among all frames', heads' and proxies'.
  __device__ int64_t proxy_index(int row) const { return int64_t{block_x()} * proxies + row; }
  __device__ int token(int row) const {
    return row + (row < proxies ? proxy_token : patch_token);
  }
};

inline __device__ int64_t frame_offset(const Shape& shape, int video) {
  const int64_t offset = shape.frame_offsets[video];
  return offset < 0 ? 0 : offset > shape.frames ? shape.frames : offset;
}

inline __device__ int64_t proxy_token(const Shape& shape, int video) {
  return int64_t{video} * shape.proxies + frame_offset(shape, video) * shape.patches;
}

inline __device__ Unit make_unit(const Shape& shape) {
  const int frame = block_x() / shape.heads;
  int video = 0, end = shape.videos;  // the video is the last that begins at or before the frame
  while (end - video > 1) {
    const int middle = (video + end) / 2;
    (shape.frame_offsets[middle] <= frame ? video : end) = middle;
  }
  return {block_x() % shape.heads,
          shape.proxies,
          shape.proxies + shape.patches,
          static_cast<int>(proxy_token(shape, video)),
          static_cast<int>(int64_t{video} * shape.proxies + int64_t{frame} * shape.patches)};
}

// ---- Rows in shared memory -----------------------------------------------------------------------

constexpr int kChunk = 16;  // rows of the other side that enter one product

template <typename T>
constexpr bool kTensorCore = sizeof(T) == 2;

// Rows of kDim elements in pieces of 16 bytes, permuted within each row so that the same piece of
// eight rows lies in eight different groups of banks.
template <typename T, int kDim>
struct Rows {
  static constexpr int kPer16 = 16 / sizeof(T), kPieces = kDim / kPer16;
  static constexpr int kMask = kPieces % 8 == 0 ? 7 : kPieces % 4 == 0 ? 3 : 1;
  static constexpr int kShift = kMask == 7 ? 0 : kMask == 3 ? 1 : 2;

  static __device__ int at(int row, int piece) {
    return row * kDim + (piece ^ (row >> kShift & kMask)) * kPer16;
  }
};

// ---- Products of one warp ------------------------------------------------------------------------
//
// Results are [16 × 8] tiles as mma gives them, with g = lane/4 and t = lane%4: element e of a lane
// is row g + 8·(e/2), column 2t + e%2. fp32 has no exact instruction; its products are computed
// element by element into the same tiles.

// 16 rows as the left side of a product over kDim: held in registers, or read where they lie each
// time, which fp32 always does.
template <typename T, int kDim, bool kHeld = kTensorCore<T>>
struct Operand {
  uint32_t word[kHeld ? kDim / 16 : 1][4];
  const T* rows;

  __device__ void load(const T* from) {
    rows = from;
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) read(word[k], k);
    }
  }
  // The elements from 16·k on.
  __device__ const uint32_t (&part(int k))[4] {
    if constexpr (!kHeld) read(word[0], k);
    return word[kHeld ? k : 0];
  }

 private:
  __device__ void read(uint32_t (&to)[4], int k) const {
    ldmatrix(to, rows + Rows<T, kDim>::at(lane() & 15, 2 * k + (lane() >> 4)));
  }
};

struct alignas(16) Float4 {
  float element[4];
};
struct alignas(8) Float2 {
  float x, y;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};

// tile [16 × 16] += left · rightᵀ over kDim; both sides have 16 rows.
template <typename T, int kDim, bool kHeld>
__device__ void multiply(float (&tile)[2][4], Operand<T, kDim, kHeld>& left, const T* right) {
  using Layout = Rows<T, kDim>;
  if constexpr (kTensorCore<T>) {
    const int row = (lane() & 7) + (lane() >> 4) * 8, half = lane() >> 3 & 1;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t b[4];
      ldmatrix(b, right + Layout::at(row, 2 * k + half));
      const uint32_t(&a)[4] = left.part(k);
      mma<T>(tile[0], a, b[0], b[1]);
      mma<T>(tile[1], a, b[2], b[3]);
    }
  } else {
    const int g = lane() / 4, t = lane() % 4;
    const auto piece = [](const float* rows, int row, int k) {
      return *reinterpret_cast<const Float4*>(rows + Layout::at(row, k));
    };
#pragma unroll 2
    for (int k = 0; k < Layout::kPieces; ++k) {
      const Float4 a[2] = {piece(left.rows, g, k), piece(left.rows, g + 8, k)};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const Float4 b[2] = {piece(right, 8 * n + 2 * t, k), piece(right, 8 * n + 2 * t + 1, k)};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            tile[n][e] = fmaf(a[e / 2].element[i], b[e % 2].element[i], tile[n][e]);
          }
        }
      }
    }
  }
}

// acc [16 × kDim] += tile [16 × 16] · right [16 × kDim]. `scratch` is 256 floats of the warp's own,
// used for fp32 alone.
template <int kDim, typename T>
__device__ void accumulate(float (&acc)[kDim / 8][4], const float (&tile)[2][4], const T* right,
                           float* scratch) {
  using Layout = Rows<T, kDim>;
  if constexpr (kTensorCore<T>) {
    uint32_t a[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) a[k] = pack<T>(tile[k / 2][k % 2 * 2], tile[k / 2][k % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix<true>(b, right + Layout::at(lane() & 15, 2 * n + (lane() >> 4)));
      mma<T>(acc[2 * n], a, b[0], b[1]);
      mma<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  } else {
    const int g = lane() / 4, t = lane() % 4;
    sync_warp();  // or a slow lane might still read what the last call wrote
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scratch[(g + e / 2 * 8) * 16 + 8 * n + 2 * t + e % 2] = tile[n][e];
      }
    }
    sync_warp();
#pragma unroll 2
    for (int k = 0; k < 16; ++k) {
      const float a[2] = {scratch[g * 16 + k], scratch[(g + 8) * 16 + k]};
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int at = Layout::at(k, 2 * n + t / 2) + t % 2 * 2;
        const Float2 b = *reinterpret_cast<const Float2*>(right + at);
        acc[n][0] = fmaf(a[0], b.x, acc[n][0]);
        acc[n][1] = fmaf(a[0], b.y, acc[n][1]);
        acc[n][2] = fmaf(a[1], b.x, acc[n][2]);
        acc[n][3] = fmaf(a[1], b.y, acc[n][3]);
      }
    }
  }
}

// Writes rows g and g + 8 of acc times their factors, each to `to`, or to `partial` in fp32 where
// `to` is null, or nowhere where both are. A quad of lanes writes 32 consecutive bytes at a time,
// which is what memory is written in. The last of a head's tiles of 8 columns may have no pair.
template <int kDim, typename T>
__device__ void store_rows(const float (&acc)[kDim / 8][4], const float (&factor)[2],
                           T* const (&to)[2], float* const (&partial)[2], int head_dim) {
  const int t = lane() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Columns to write; of pairs of tiles, the lanes of the second tile write fewer.
    const int columns = to[half] ? head_dim - (kTensorCore<T> ? t % 2 * 8 : 0) : 0;
    const int partial_columns = !to[half] && partial[half] ? head_dim : 0;
#pragma unroll
    for (int n = 0; n < kDim / 8; n += 2) {
      Float2 pair[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pair[i] = {acc[n + i][2 * half] * factor[half], acc[n + i][2 * half + 1] * factor[half]};
      }
      if constexpr (kTensorCore<T>) {
        // Lanes 2i and 2i + 1 swap, so that each has 8 consecutive bytes of one tile.
        const uint32_t first = pack<T>(pair[0].x, pair[0].y), second = pack<T>(pair[1].x, pair[1].y);
        const bool odd = t % 2;
        const uint32_t other = shuffle_xor(odd ? first : second, 1);
        if (8 * n < columns) {
          *reinterpret_cast<Words2*>(to[half] + 8 * n + t % 2 * 8 + t / 2 * 4) =
              odd ? Words2{other, second} : Words2{first, other};
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!kTensorCore<T> && 8 * (n + i) < columns) {
          *reinterpret_cast<Float2*>(to[half] + 8 * (n + i) + 2 * t) = pair[i];
        }
        if (8 * (n + i) < partial_columns) {
          *reinterpret_cast<Float2*>(partial[half] + 8 * (n + i) + 2 * t) = pair[i];
        }
      }
    }
  }
}

// ---- One row, spread over a warp -----------------------------------------------------------------

// Up to 128 numbers of which lane l holds l, l + 32, l + 64 and l + 96, for the small kernels.
template <typename T>
struct Elements {
  float at[4] = {0, 0, 0, 0};

  __device__ Elements() {}
  __device__ Elements(const T* row, int count) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lane() + 32 * i < count) at[i] = to_float(row[lane() + 32 * i]);
    }
  }
  template <typename U>
  __device__ float dot(const Elements<U>& other) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(at[i], other.at[i], sum);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }
  template <typename U>
  __device__ void add(const Elements<U>& other, float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = fmaf(other.at[i], factor, at[i]);
  }
  __device__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] *= factor;
  }
  template <typename U>
  __device__ void store(U* row, int count) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lane() + 32 * i < count) row[lane() + 32 * i] = from_float<U>(at[i]);
    }
  }
};

// ---- The walk of a block over a unit -------------------------------------------------------------

// Rows of the other side that are copied and waited for together.
template <typename T>
constexpr int kTileRows = kTensorCore<T> ? 64 : 32;

constexpr __device__ __host__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline __device__ __host__ int round_to_chunk(int rows) { return ceil_div(rows, kChunk) * kChunk; }

// Matrices of the unit that are used together, such as keys and values: where they come from, and
// their rows in shared memory.
template <typename T, int kCount = 2>
struct Matrices {
  Matrix<const T> from[kCount];
  T* rows[kCount];

  // Starts to copy `count` rows, from `first` on, to row `to` of the arrays; zeros past the unit's
  // rows and past the head's elements. The copy is shared by `workers` threads, of which this is
  // `worker`: a thread copies the same piece of 16 bytes of every step-th row.
  template <int kDim>
  __device__ void load(const Unit& unit, int head_dim, int first, int count, int to, int worker,
                       int workers) const {
    using Layout = Rows<T, kDim>;
    const int piece = worker % Layout::kPieces, element = piece * Layout::kPer16;
    const int step = workers / Layout::kPieces, start = worker / Layout::kPieces;
    const T* source[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) source[i] = from[i].row(0, unit.head) + element;
#pragma unroll 1
    for (int row = start < step ? start : count; row < count; row += step) {
      const bool valid = first + row < unit.rows && element < head_dim;
      const int at = to * kDim + Layout::at(row, piece);
      const uint32_t token = unit.token(first + row);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        cp_async16(rows[i] + at, source[i] + token * from[i].token_step, valid);
      }
    }
  }
};

// State of the other side's rows: in a ring of two tiles that every pass fills again; being copied
// to places of their own, as the last groups of copies, one per tile; or all copied.
enum class Tiles { kRing, kArriving, kThere };

// cp_async_wait for a number known at run time; waits for more groups where no instance fits.
inline __device__ void wait_until_pending(int groups) {
  switch (groups) {
    case 0: return cp_async_wait<0>();
    case 1: return cp_async_wait<1>();
    case 2: return cp_async_wait<2>();
    case 3: return cp_async_wait<3>();
    default: return cp_async_wait<4>();
  }
}

template <typename T, int kDim>
__device__ void load_tile(const Matrices<T>& other, const Unit& unit, int head_dim, int tile,
                          int to) {
  const int first = tile * kTileRows<T>;
  const int left = round_to_chunk(unit.rows) - first;
  other.template load<kDim>(unit, head_dim, first, left < kTileRows<T> ? left : kTileRows<T>, to,
                            thread(), threads());
}

// A warp multiplies 16 rows of its own, from `first` on, with all rows of the other side. `own`
// says where its rows lie or are copied to. Where tiles are arriving, `later` groups of copies
// follow theirs. Body says what to do:
//   begin(first, a, b)        the own rows are at a and b
//   step(first, row, a, b)    kTileRows rows of the other side, from `row` on, are at a and b
//   end(first)
// Unless all tiles are there, all warps of the block take part, some perhaps without own rows.
template <typename T, int kDim, int kOwn, typename Body>
__device__ void pass(Tiles tiles_are, int later, int first, const Matrices<T, kOwn>& own,
                     const Matrices<T>& other, const Unit& unit, int head_dim, Body& body) {
  constexpr int kTile = kTileRows<T>;
  const int tiles = ceil_div(unit.rows, kTile);
  const bool ring = tiles_are == Tiles::kRing;
  if (ring) {
    sync_block();  // all threads have read the last pass's tiles
    own.template load<kDim>(unit, head_dim, first, kChunk, 0, lane(), 32);
    load_tile<T, kDim>(other, unit, head_dim, 0, 0);
    cp_async_commit();
  }
  for (int tile = 0; tile < tiles; ++tile) {
    if (ring) {
      cp_async_wait<0>();
      sync_block();
      if (tile + 1 < tiles) {
        load_tile<T, kDim>(other, unit, head_dim, tile + 1, (tile + 1) % 2 * kTile);
        cp_async_commit();
      }
    } else if (tiles_are == Tiles::kArriving) {
      wait_until_pending(tile + 1 < tiles ? tiles - 1 - tile + later : 0);
      sync_block();
    } else if (tile == 0) {
      cp_async_wait<0>();
      sync_warp();
    }
    if (first >= unit.rows) continue;
    if (tile == 0) body.begin(first, own.rows[0], own.rows[kOwn - 1]);
    const int at = (ring ? tile % 2 : tile) * kTile * kDim;
    body.step(first, tile * kTile, other.rows[0] + at, other.rows[1] + at);
  }
  if (first < unit.rows) body.end(first);
}

// ---- Host side -----------------------------------------------------------------------------------

// How a block is launched: of several warps, and either with the rows of the unit resident in shared
// memory or with a ring of two tiles that every pass fills again from the second level of cache.
struct Plan {
  int warps;
  bool resident;
  size_t shared;
};

// Threads of the largest block of a kernel of which two blocks of `warps` warps shall fit into a
// multiprocessor's registers: of twice as many warps, and as many in each of its quarters.
constexpr int most_threads(int warps) { return ceil_div(2 * warps, 4) * 4 * 32; }

// `bytes(warps, resident)` is the shared memory that a block needs. Two blocks of up to max_warps
// warps shall fit into a multiprocessor, so that one computes while the other waits for memory. A
// block that is alone there may have twice as many warps; such a block that keeps its rows is better
// than two that read them again. With resident rows, the warps share the turns of all `sweeps`. There
// are as few warps as finish them in the same number of rounds.
template <typename Bytes>
Plan make_plan(int rows, int sweeps, int max_warps, device::Stream stream, const Bytes& bytes) {
  constexpr size_t kSystem = 1024;  // bytes that the system takes for every block
  const size_t most = device::max_shared_bytes(stream);  // leaves the system's part for one block
  const int chunks = ceil_div(rows, kChunk);
  Plan plan{};
  for (const bool resident : {true, false}) {
    for (const int blocks : {2, 1}) {
      const int turns = resident ? sweeps * chunks : chunks, at_once = max_warps * 2 / blocks;
      const int even = ceil_div(turns, ceil_div(turns, at_once));
      plan = {even < chunks ? even : chunks, resident, 0};
      plan.shared = bytes(plan.warps, resident);
      if (blocks * (plan.shared + kSystem) <= most + kSystem) return plan;
    }
  }
  while (plan.warps > 1 && plan.shared > most) plan.shared = bytes(--plan.warps, false);
  return plan;
}

template <typename T>
Matrix<T> part_of(const Tensor& qkv, int part) {
  return {qkv.as<T>() + part * qkv.stride[1], qkv.stride[0], qkv.stride[2]};
}
template <typename T>
Matrix<T> matrix_of(const Tensor& x) {
  return {x.as<T>(), x.stride[0], x.stride[1]};
}

inline Shape make_shape(const Tensor& qkv, const Tensor& frame_offsets, int64_t num_proxies,
                        int64_t patches) {
  const int64_t videos = frame_offsets.size[0] - 1;
  qkv.expect_rows(qkv.dtype, qkv.size[3]);
  return {frame_offsets.dense<const int32_t>(1),
          (qkv.size[0] - videos * num_proxies) / patches,
          static_cast<int>(videos),
          static_cast<int>(qkv.size[2]),
          static_cast<int>(qkv.size[3]),
          static_cast<int>(num_proxies),
          static_cast<int>(patches)};
}

inline std::string describe(const char* what, const Tensor& qkv, const Shape& shape) {
  return std::string("proxy_attention ") + what + " of qkv [" + std::to_string(qkv.size[0]) +
         ", 3, " + std::to_string(shape.heads) + ", " + std::to_string(shape.head_dim) + "], B=" +
         std::to_string(shape.videos) + ", M=" + std::to_string(shape.proxies) + ", L=" +
         std::to_string(shape.patches);
}

template <typename T, int kDim>
struct Instance {
  using Element = T;
  static constexpr int kHeadDim = kDim;
};

// Calls body(Instance<T, kDim>{}) with the smallest kDim there is that holds head_dim.
template <typename Body>
void for_instance(DType dtype, int head_dim, const Body& body) {
  const auto with_dim = [&](auto element) {
    using T = decltype(element);
    if (head_dim <= 32) return body(Instance<T, 32>{});
    if (head_dim <= 64) return body(Instance<T, 64>{});
    if (head_dim <= 80) return body(Instance<T, 80>{});
    if (head_dim <= 96) return body(Instance<T, 96>{});
    if (head_dim <= 112) return body(Instance<T, 112>{});
    return body(Instance<T, 128>{});
  };
  switch (dtype) {
    case DType::bfloat16: return with_dim(bfloat16{});
    case DType::float16: return with_dim(float16{});
    default: return with_dim(float{});
  }
}

}  // namespace proxy_attention
}  // namespace clipvip
