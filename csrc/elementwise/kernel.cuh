// What the kernels share: how lanes divide rows and columns, and the host's checks.
//
// Neighbouring lanes read and write neighbouring bytes: of fp32 rows 16 each, of 16-bit rows 8
// where rows are normalized or others are fp32, and otherwise 16.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/device.cuh"
#include "common/tensor.h"

namespace clipvip::elementwise {

using namespace device;

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kBlocks = 4;  // of kThreads per multiprocessor: half of its warps, with 64 registers
constexpr int kPiece = 4 * 32;  // numbers of a row of which each lane holds four, as fp32 16 bytes
constexpr int64_t kSystemBytes = 1024;  // of shared memory, which the system takes for every block
constexpr float kSlope = 1.702f, kLog2E = 1.44269504088896341f;

// Neighbouring numbers of a row, which one instruction reads or writes.
template <typename T, int count>
struct alignas(count * sizeof(T)) Numbers {
  T at[count];
};

template <typename T, int count>
__device__ Numbers<T, count> load(const void* rows, int64_t first) {
  return *reinterpret_cast<const Numbers<T, count>*>(static_cast<const T*>(rows) + first);
}

template <typename T, int count>
__device__ void store(void* rows, int64_t first, const float (&from)[count]) {
  Numbers<T, count> numbers;
#pragma unroll
  for (int i = 0; i < count; ++i) numbers.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Numbers<T, count>*>(static_cast<T*>(rows) + first) = numbers;
}

// Reads a vector, 16 bytes at a time; zeros if there is none.
template <int count>
__device__ void load_vector(const float* vector, int first, float (&to)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const Numbers<float, 4> four =
        vector ? load<float, 4>(vector, first + i) : Numbers<float, 4>{};
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = four.at[j];
  }
}

inline __device__ float sum_over_warp(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// σ(1.702·y), so that y·σ(1.702·y) is QuickGELU.
inline __device__ float quick_sigmoid(float y) {
  return fast_reciprocal(1 + fast_exp2(-kSlope * kLog2E * y));
}

// Where a lane's numbers of the k-th piece of a row are.
inline __device__ int column_of(int k) { return k * kPiece + lane() * 4; }

// How blocks divide a matrix by columns: block (x, y) has 32·count columns, and of the rows every
// slabs-th group of kWarps, a row per warp.
struct Columns {
  int64_t rows;
  int width, slabs;

  int64_t partial_bytes() const { return int64_t{slabs} * width * sizeof(float); }
};

template <int count>
__device__ int own_column() {
  return (block_x() * 32 + lane()) * count;
}

// Reads a vector at this lane's columns; zeros if there is none.
template <int count>
__device__ void load_own(const Columns& p, const float* vector, float (&to)[count]) {
  const int column = own_column<count>();
  load_vector(column < p.width ? vector : nullptr, column, to);
}

// Calls use(i, read(i)) for the first element of this lane's numbers in each of its rows, with
// `ahead` rows being read at a time.
template <int count, int ahead, typename Read, typename Use>
__device__ void for_each_row(const Columns& p, Read read, Use use) {
  const int column = own_column<count>();
  if (column >= p.width) return;
  const int64_t step = int64_t{p.slabs} * kWarps;
  for (int64_t row = block_y() * kWarps + warp(); row < p.rows; row += ahead * step) {
    decltype(read(row)) taken[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {  // past the end the last row again, rather than a branch
      const int64_t other = row + i * step < p.rows ? row + i * step : p.rows - 1;
      taken[i] = read(other * p.width + column);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (row + i * step < p.rows) use((row + i * step) * p.width + column, taken[i]);
    }
  }
}

// Host side ---------------------------------------------------------------------------------------

// Describes a call for its error.
inline std::string describe(const char* op, const Tensor& x) {
  return std::string(op) + " of [" + std::to_string(x.size[0]) + ", " + std::to_string(x.size[1]) +
         "]";
}

// The matrix's values. Raises unless it is of the dtype and the other's shape, and as cuda.h says.
inline void* matrix(const Tensor& x, DType dtype, const Tensor& like) {
  if (x.ndim != 2 || x.dtype != dtype || x.size[0] != like.size[0] || x.size[1] != like.size[1] ||
      x.size[1] < 8 || x.size[1] > 1 << 30 || x.size[1] % 8 != 0 || x.stride[1] != 1 ||
      (x.size[0] > 1 && x.stride[0] != x.size[1]) ||
      reinterpret_cast<uintptr_t>(x.data) % 16 != 0) {
    throw std::invalid_argument("a matrix does not have the dtype, the shape, or the aligned "
                                "contiguous rows, that its kernel reads");
  }
  return x.data;
}
inline void* matrix(const Tensor* x, DType dtype, const Tensor& like) {
  return x ? matrix(*x, dtype, like) : nullptr;
}
inline const float* vector(const Tensor* x, int64_t count) {
  return x ? x->dense<const float>(count) : nullptr;
}

template <typename Body>
void for_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::float32: return body(float{});
    case DType::bfloat16: return body(bfloat16{});
    case DType::float16: return body(float16{});
    default: throw std::invalid_argument("rows are not fp32, bf16 or fp16");
  }
}

// Calls body with a value of either dtype's type.
template <typename Body>
void for_dtypes(DType residual, DType product, Body body) {
  for_dtype(product, [&](auto narrow) {
    if (residual == product) return body(narrow, narrow);
    if (residual == DType::float32) return body(float{}, narrow);
    throw std::invalid_argument("16-bit rows of two dtypes, or a 16-bit residual beside fp32");
  });
}

// Calls body with the least number of columns, as a type, that a kernel holds of a row this wide.
template <typename Body>
void for_width(int64_t width, Body body) {
  if (width <= 512) return body(std::integral_constant<int, 512>{});
  if (width <= 768) return body(std::integral_constant<int, 768>{});
  if (width <= 1024) return body(std::integral_constant<int, 1024>{});
  if (width <= 2048) return body(std::integral_constant<int, 2048>{});
  throw std::invalid_argument("a row is longer than 2048 numbers");
}

// One wave of blocks with `count` numbers per lane.
inline Columns divide(const Tensor& x, int count, Stream stream) {
  const int64_t blocks = int64_t{kBlocks} * multiprocessors(stream);
  const int64_t tiles = (x.size[1] + 32 * count - 1) / (32 * count);
  const int64_t slabs =
      std::min((x.size[0] + kWarps - 1) / kWarps, std::max<int64_t>(1, blocks / tiles));
  return {x.size[0], static_cast<int>(x.size[1]), static_cast<int>(slabs)};
}

// Launches a kernel over the columns of its parameters.
template <int count, typename Params>
void launch_columns(void (*kernel)(Params), const Params& p, bool sums, Stream stream,
                    const char* op, const Tensor& x) {
  const Grid grid{(p.columns.width + 32 * count - 1) / (32 * count), p.columns.slabs};
  const size_t shared = sums ? shared_bytes<float>(count * kThreads) : 0;
  launch(kernel, grid, kThreads, shared, stream, p, [&] { return describe(op, x); });
}

}  // namespace clipvip::elementwise
