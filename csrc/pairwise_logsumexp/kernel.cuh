// Tiles of scale·a·bᵀ in registers, for both directions: forward reduces them to statistics,
// backward turns them into gradients.
//
// A block of 8 warps computes 128×256 logits at a time, a warp 64×64: with less, shared memory could
// not feed the tensor cores. It walks through a slab of row blocks × a strip of column tiles, row
// block after row block, in steps of 128 bytes of the rows. The steps of all its tiles form one
// sequence through a ring of stages, so that copies continue while a tile ends. Where it fits, the
// row block's a stays in shared memory for the whole strip, which saves a third of the traffic from
// the second level of cache; that traffic would otherwise be the limit on an H100.
//
// Columns are distributed so that a thread holds 8 neighbours, stored at once as 16 bytes (of
// 16-bit numbers): of the 32 columns of four n = 8 fragments, fragment j holds at its position p
// column 8·(p/2) + 2·j + p%2.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/device.cuh"
#include "common/tensor.h"

namespace clipvip::pairwise {

using namespace device;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 128, kColumns = 256, kWarpTile = 64;
constexpr int kWarpRows = kRows / kWarpTile, kWarpColumns = kColumns / kWarpTile;
constexpr int kRowBytes = 128, kChunks = kRowBytes / 16;  // of a row in one step
constexpr int kABytes = kRows * kRowBytes, kBBytes = kColumns * kRowBytes;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Product {
  const char* a;     // [n], rows a_stride bytes apart
  const char* b;     // [m]
  int64_t a_stride, b_stride;
  int n, m;
  int chunks;        // of 16 bytes in a row
  const float* scale;
  int diagonal;      // from -n to m
  int slabs, strips; // block x has slab x / strips
  int stages;        // 2 or 3
  bool resident;     // the row block's a stays; needs as many steps as stages
};

inline __device__ float natural_exp(float x) { return fast_exp2(x * kLog2E); }

// The beginning of a part when `count` items are cut into `parts` nearly equal ones.
inline __device__ int share(int count, int parts, int part) {
  return static_cast<int>(int64_t{count} * part / parts);
}

// A thread's place in its warp's 64×64 logits, c[4][8][4]: row k of 8 is of c[k/2][·][2·(k%2) …],
// column k of 16 of c[·][k/2][k%2 + …].
inline __device__ int row_of(int k) { return k / 2 * 16 + k % 2 * 8 + lane() / 4; }
inline __device__ int column_of(int k) { return k / 8 * 32 + lane() % 4 * 8 + k % 8; }

// The logits that a warp holds, without the scale.
struct Tile {
  float (&c)[4][8][4];
  int row, column;  // the first

  __device__ float& at(int row, int column) const {
    return c[row / 2][column / 2][row % 2 * 2 + column % 2];
  }
  // Whether all of it lies inside the matrix and holds no positive.
  __device__ bool plain(const Product& p) const {
    const int64_t apart = int64_t{column} - row - p.diagonal;
    return row + kWarpTile <= p.n && column + kWarpTile <= p.m &&
           (apart >= kWarpTile || apart <= -kWarpTile);
  }
};

// Adds a step's products to c. Both operands have rows of 128 bytes in shared memory, whose 16-byte
// chunk k is kept at k ^ (row % 8) in a and at k ^ (row / 8 % 4 · 2 + row % 2) in b: the rows that
// an instruction reads together then lie in different banks.
template <typename T>
class Multiplier {
 public:
  __device__ Multiplier() {
    const int in_matrix = lane() % 8, matrix = lane() / 8;
    a_ = (warp() / kWarpColumns * kWarpTile + lane() % 16) * kRowBytes +
         ((matrix / 2) ^ in_matrix) * 16;
    b_ = (warp() % kWarpColumns * kWarpTile + in_matrix / 2 * 8 + matrix / 2 * 2 + in_matrix % 2) *
             kRowBytes +
         ((matrix % 2) ^ in_matrix) * 16;
  }

  // Reads what depth k … k + 15 of the step needs; k as a number of 16.
  __device__ void load(int buffer, const char* a, const char* b, int k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ldmatrix(left_[buffer][i], a + (a_ ^ k * 32) + i * 16 * kRowBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ldmatrix(right_[buffer][i], b + (b_ ^ k * 32) + (i / 2 * 32 + i % 2 * 4) * kRowBytes);
    }
  }
  __device__ void multiply(int buffer, float (&c)[4][8][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t(&b)[4] = right_[buffer][j / 2];
        mma<T>(c[i][j], left_[buffer][i], b[j % 2 * 2], b[j % 2 * 2 + 1]);
      }
    }
  }

 private:
  int a_, b_;  // bytes to where this lane reads
  uint32_t left_[2][4][4], right_[2][4][4];
};

struct alignas(16) Float4 {
  float at[4];
};

// Exact fp32: the same logits in the same threads, by multiply-adds.
template <>
class Multiplier<float> {
 public:
  __device__ void multiply(const char* a, const char* b, float (&c)[4][8][4]) const {
    const int first_row = warp() / kWarpColumns * kWarpTile;
    const int first_column = warp() % kWarpColumns * kWarpTile;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Float4 left[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) left[k] = read(a, first_row + row_of(k), chunk ^ lane() / 4);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const Float4 right =
            read(b, first_column + column_of(k), chunk ^ (lane() % 4 * 2 + k % 2));
#pragma unroll
        for (int row = 0; row < 8; ++row) {
          float& sum = c[row / 2][k / 2][row % 2 * 2 + k % 2];
#pragma unroll
          for (int i = 0; i < 4; ++i) sum = fmaf(left[row].at[i], right.at[i], sum);
        }
      }
    }
  }

 private:
  static __device__ Float4 read(const char* rows, int row, int chunk) {
    return *reinterpret_cast<const Float4*>(rows + row * kRowBytes + chunk * 16);
  }
};

// Copies steps into the ring, in the order in which they are used; after the last one, zeros.
class Loader {
 public:
  __device__ Loader(const Product& p, char* a, char* b, int first_row_block, int end_row_block,
                    int first_column_tile, int end_column_tile)
      : p_(p),
        a_(a),
        b_(b),
        row_block_(first_row_block),
        end_row_block_(end_row_block),
        first_column_tile_(first_column_tile),
        column_tile_(first_column_tile),
        end_column_tile_(end_column_tile) {}

  // Copies the next step's part of a, unless it is resident.
  __device__ void copy_a() const {
    if (p_.resident && column_tile_ != first_column_tile_) return;
    const int row = thread() / kChunks, chunk = thread() % kChunks;
    copy<kRows>(a_ + (p_.resident ? step_ : stage_) * kABytes + (chunk ^ row % 8) * 16, p_.a,
                p_.a_stride, row_block_ * kRows, p_.n);
  }
  // Copies its part of b, without a branch, so that it can overlap with products.
  __device__ void copy_b() const {
    const int row = thread() / kChunks, chunk = thread() % kChunks;
    copy<kColumns>(b_ + stage_ * kBBytes + (chunk ^ (row / 8 % 4 * 2 + row % 2)) * 16, p_.b,
                   p_.b_stride, column_tile_ * kColumns, p_.m);
  }
  // Closes the group and advances to the next step.
  __device__ void next() {
    cp_async_commit();
    if (++stage_ == p_.stages) stage_ = 0;
    if (++step_ * kChunks < p_.chunks) return;
    step_ = 0;
    if (++column_tile_ < end_column_tile_) return;
    column_tile_ = first_column_tile_;
    ++row_block_;
  }

 private:
  // Copies a chunk of every 32nd of `count` rows from `first` on; the swizzle is the same for all.
  template <int count>
  __device__ void copy(char* to, const char* from, int64_t stride, int first, int end) const {
    constexpr int kStep = kThreads / kChunks;
    const int row = thread() / kChunks, chunk = step_ * kChunks + thread() % kChunks;
    const int left = chunk < p_.chunks && row_block_ < end_row_block_ ? end - first - row : 0;
    from += (first + row) * stride + chunk * 16;
    to += row * kRowBytes;
#pragma unroll
    for (int i = 0; i < count; i += kStep) {
      cp_async16(to + i * kRowBytes, from, i < left);
      from += kStep * stride;
    }
  }

  const Product& p_;
  char *const a_, *const b_;
  int row_block_;
  const int end_row_block_, first_column_tile_;
  int column_tile_;
  const int end_column_tile_;
  int step_ = 0, stage_ = 0;
};

// Computes the block's tiles and passes each warp's part to reducer.tile; reducer.begin_rows and
// end_rows are called before and after those of a row block.
template <typename T, typename Reducer>
__device__ void for_each_tile(const Product& p, Shared& shared, Reducer& reducer) {
  const int steps = (p.chunks + kChunks - 1) / kChunks;
  char* const a = shared.take<char>((p.resident ? steps : p.stages) * kABytes);
  char* const b = shared.take<char>(p.stages * kBBytes);
  const int slab = block_x() / p.strips, strip = block_x() % p.strips;
  const int row_blocks = (p.n + kRows - 1) / kRows, column_tiles = (p.m + kColumns - 1) / kColumns;
  const int first_row_block = share(row_blocks, p.slabs, slab);
  const int end_row_block = share(row_blocks, p.slabs, slab + 1);
  const int first_column_tile = share(column_tiles, p.strips, strip);
  const int end_column_tile = share(column_tiles, p.strips, strip + 1);

  Loader loader(p, a, b, first_row_block, end_row_block, first_column_tile, end_column_tile);
  Multiplier<T> multiplier;
  for (int i = 0; i < p.stages; ++i) {
    loader.copy_a();
    loader.copy_b();
    loader.next();
  }
  if (p.stages == 3) {
    cp_async_wait<2>();
  } else {
    cp_async_wait<1>();
  }
  sync_block();
  int stage = 0;
  // Called when each warp has read all it needs of a stage; waits for the next one.
  const auto advance = [&] {
    if (p.stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    sync_block();
    if (++stage == p.stages) stage = 0;
  };

  for (int row_block = first_row_block; row_block < end_row_block; ++row_block) {
    const int row = row_block * kRows + warp() / kWarpColumns * kWarpTile;
    reducer.begin_rows(row, row_block == first_row_block);
    for (int column_tile = first_column_tile; column_tile < end_column_tile; ++column_tile) {
      float c[4][8][4] = {};
      if constexpr (std::is_same_v<T, float>) {
        for (int step = 0; step < steps; ++step) {
          multiplier.multiply(a + (p.resident ? step : stage) * kABytes, b + stage * kBBytes, c);
          advance();
          loader.copy_a();
          loader.copy_b();
          loader.next();
        }
      } else {
        multiplier.load(0, a + (p.resident ? 0 : stage) * kABytes, b + stage * kBBytes, 0);
        for (int step = 0; step < steps; ++step) {
#pragma unroll
          for (int k = 0; k < kChunks / 2; ++k) {
            if (k + 1 == kChunks / 2) advance();
            // After the tile's last step this would read the next tile's first, which can wait.
            if (k + 1 < kChunks / 2 || step + 1 < steps) {
              const int from = k + 1 < kChunks / 2 ? step : step + 1;
              multiplier.load((k + 1) % 2, a + (p.resident ? from : stage) * kABytes,
                              b + stage * kBBytes, (k + 1) % (kChunks / 2));
            }
            if (k + 1 == kChunks / 2) {
              loader.copy_a();
              loader.copy_b();
            }
            multiplier.multiply(k % 2, c);
            if (k + 1 == kChunks / 2) loader.next();
          }
        }
      }
      reducer.tile(Tile{c, row, column_tile * kColumns + warp() % kWarpColumns * kWarpTile});
    }
    reducer.end_rows();
  }
  cp_async_wait<0>();  // the zeros after the last step: no copy may outlive its block
}

// Host side ---------------------------------------------------------------------------------------

inline std::string describe(const Tensor& a, const Tensor& b, const char* direction) {
  const auto text = [](const Tensor& x) {
    return "[" + std::to_string(x.size[0]) + ", " + std::to_string(x.size[1]) + "]";
  };
  return std::string("pairwise_logsumexp ") + direction + " of a " + text(a) + " and b " + text(b);
}

// Divides the work into slabs·strips blocks, one per multiprocessor, such that the largest is as
// small as possible. `row_bytes` and `column_bytes` are what a strip keeps per row and a slab per
// column; in total these should not exceed the inputs.
inline Product make_product(const Tensor& a, const Tensor& b, const Tensor& scale,
                            int64_t diagonal, int blocks, int64_t row_bytes, int64_t column_bytes,
                            Stream stream, size_t& shared, const char* direction) {
  const int64_t n = a.size[0], m = b.size[0], item = a.dtype == DType::float32 ? 4 : 2;
  const int64_t bytes = a.size[1] * item;
  const auto aligned = [&](const Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.stride[0] * item % 16 == 0;
  };
  a.expect_rows(a.dtype, b.size[1]);
  b.expect_rows(a.dtype, a.size[1]);
  if (n > 1 << 30 || m > 1 << 30 || bytes > 1 << 28) {
    throw std::invalid_argument(describe(a, b, direction) + ": at most 2^30 rows of 2^28 bytes");
  }
  if (bytes % 16 != 0 || !aligned(a) || !aligned(b) || a.stride[1] != 1 || b.stride[1] != 1) {
    throw std::invalid_argument(describe(a, b, direction) +
                                ": rows must be whole and aligned to 16 bytes");
  }
  Product p{};
  p.a = a.as<const char>(), p.b = b.as<const char>();
  p.a_stride = a.stride[0] * item, p.b_stride = b.stride[0] * item;
  p.n = static_cast<int>(n), p.m = static_cast<int>(m);
  p.chunks = static_cast<int>(bytes / 16);
  p.scale = scale.dense<const float>(1);
  p.diagonal = static_cast<int>(std::max(-n, std::min(m, diagonal)));

  const int64_t steps = (p.chunks + kChunks - 1) / kChunks, most = max_shared_bytes(stream);
  p.resident = steps >= 3 && steps * kABytes + 3 * kBBytes <= most;
  p.stages = p.resident || 3 * (kABytes + kBBytes) <= most ? 3 : 2;
  shared = (p.resident ? steps : p.stages) * kABytes + p.stages * kBBytes;

  const int64_t row_blocks = (n + kRows - 1) / kRows, column_tiles = (m + kColumns - 1) / kColumns;
  double least = std::numeric_limits<double>::infinity();
  for (int64_t slabs = 1; slabs <= std::min<int64_t>(blocks, row_blocks) && m > 0; ++slabs) {
    const int64_t strips = std::min<int64_t>(blocks / slabs, column_tiles);
    const double rows = (row_blocks + slabs - 1) / slabs;
    const double columns = (column_tiles + strips - 1) / strips;
    const double kept = double(slabs * m) * column_bytes + double(strips * n) * row_bytes;
    // A row block costs another quarter of a tile; the last factor favours keeping less.
    const double cost = rows * (columns + 0.25) * (1 + kept / (64. * double(n + m) * bytes));
    if (cost < least) {
      least = cost;
      p.slabs = static_cast<int>(slabs), p.strips = static_cast<int>(strips);
    }
  }
  return p;
}

// Calls body with a value of the dtype's type.
template <typename Body>
void for_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::bfloat16:
      return body(bfloat16{});
    case DType::float16:
      return body(float16{});
    default:
      return body(float{});
  }
}

}  // namespace clipvip::pairwise
