// Log-sum-exps of the rows and columns: each warp reduces its part of a tile and keeps sums of its
// own rows and columns in the workspace; a second kernel adds those up. No two warps write to one
// place.
#include "pairwise_logsumexp/cuda.h"
#include "pairwise_logsumexp/kernel.cuh"

namespace clipvip {
namespace pairwise {
namespace {

// Σ exp(x) as sum · exp(reference); nothing where the sum is 0.
struct alignas(8) Sum {
  float reference, sum;
};
struct alignas(16) SumPair {
  Sum first, second;
};

struct ForwardParams {
  Product product;
  Sum* rows;         // [strips · kWarpColumns, n]
  Sum* columns;      // [slabs · kWarpRows, column_step]
  int64_t column_step;  // m, made even
  float *row_lse, *col_lse, *positive;
};

__device__ Sum merge(Sum x, Sum y) {
  if (x.sum == 0) return y;
  if (y.sum == 0) return x;
  const float reference = fmaxf(x.reference, y.reference);
  return {reference, x.sum * natural_exp(x.reference - reference) +
                         y.sum * natural_exp(y.reference - reference)};
}

// A warp's sums. One exp per logit serves its row and its column as long as the sums over a tile,
// relative to one reference, stay between kSmall and 1 / kSmall: then terms lost below 2^-126 do
// not matter, and nothing overflows when a million rows are added up. Otherwise, or where a part of
// the tile is left out, each row and column takes its own maximum and the reference follows. fp32
// always does so: it rounds better, and its products cost far more.
template <typename T>
class Statistics {
 public:
  __device__ explicit Statistics(const ForwardParams& p)
      : p_(p), scale_(*p.product.scale) {}

  __device__ void begin_rows(int row, bool first) {
    row_ = row;
    first_ = first;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      sum_[k] = 0;
      if (owns_row(k)) kept_row(k) = Sum{0, 0};
    }
  }

  __device__ void tile(const Tile& tile) {
    SumPair sums;
    if (kExact || !tile.plain(p_.product) || !sum_to_reference(tile, sums)) {
      sum_to_maxima(tile, sums);
    }
    const int column = tile.column + column_of(lane() / 4 * 2);
    if (column >= p_.product.m) return;
    const int slab = block_x() / p_.product.strips;
    SumPair* const all = reinterpret_cast<SumPair*>(
        p_.columns + (slab * kWarpRows + warp() / kWarpColumns) * p_.column_step + column);
    if (!first_) {
      const SumPair old = *all;
      sums = {merge(old.first, sums.first), merge(old.second, sums.second)};
    }
    *all = sums;
  }

  // Adds the running sums to those in the workspace.
  __device__ void end_rows() {
    if constexpr (!kExact) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float sum = sum_[k];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        add_row(k, {reference_, sum});
        sum_[k] = 0;
      }
    }
  }

 private:
  static constexpr bool kExact = std::is_same_v<T, float>;
  static constexpr float kSmall = 1.f / (1ull << 45) / (1ull << 45);

  // Of the four lanes that hold a row, the one that keeps its sum.
  __device__ bool owns_row(int k) const {
    return lane() % 4 == k / 2 && row_ + row_of(k) < p_.product.n;
  }
  __device__ Sum& kept_row(int k) const {
    const int strip = block_x() % p_.product.strips;
    const int64_t part = strip * kWarpColumns + warp() % kWarpColumns;
    return p_.rows[part * p_.product.n + row_ + row_of(k)];
  }
  __device__ void add_row(int k, Sum sum) const {
    if (owns_row(k)) kept_row(k) = merge(kept_row(k), sum);
  }

  // Adds up over two lanes of a column; each continues with half of their columns.
  template <int half>
  static __device__ void halve(float (&column)[16]) {
    const bool upper = lane() & half * 2;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const float kept = upper ? column[j + half] : column[j];
      const float sent = upper ? column[j] : column[j + half];
      column[j] = kept + shuffle_xor(sent, half * 2);
    }
  }

  // Returns false, and changes nothing, where the reference does not fit.
  __device__ bool sum_to_reference(const Tile& tile, SumPair& sums) {
    float row[8] = {}, column[16] = {};
    const float scale2 = scale_ * kLog2E, reference2 = reference_ * kLog2E;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float term = fast_exp2(fmaf(tile.at(i, j), scale2, -reference2));
        row[i] += term;
        column[j] += term;
      }
    }
    halve<8>(column);
    halve<4>(column);
    halve<2>(column);
    float smallest = fminf(column[0], column[1]), largest = fmaxf(column[0], column[1]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      smallest = fminf(smallest, row[i]);
      largest = fmaxf(largest, row[i]);
    }
    if (any_lane(smallest < kSmall || largest > 1 / kSmall)) return false;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum_[i] += row[i];
    sums = {{reference_, column[0]}, {reference_, column[1]}};
    return true;
  }

  __device__ void sum_to_maxima(const Tile& tile, SumPair& sums) {
    const Product& p = p_.product;
    float largest = kLowest;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = row_ + row_of(i);
      float maximum = kLowest, sum = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int column = tile.column + column_of(j);
        float& logit = tile.at(i, j);
        logit = rounded_product(logit, scale_);
        const bool inside = row < p.n && column < p.m, own = column - row == p.diagonal;
        if (inside && own) p_.positive[row] = logit;
        if (!inside || own) logit = -kInfinity;
        maximum = fmaxf(maximum, logit);
      }
      maximum = fmaxf(maximum, shuffle_xor(maximum, 1));
      maximum = fminf(fmaxf(maximum, shuffle_xor(maximum, 2)), -kLowest);  // ∞ is for the sum
#pragma unroll
      for (int j = 0; j < 16; ++j) sum += natural_exp(tile.at(i, j) - maximum);
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      add_row(i, {maximum, sum});
      largest = fmaxf(largest, maximum);
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float maximum = kLowest, sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) maximum = fmaxf(maximum, tile.at(i, j));
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        maximum = fmaxf(maximum, shuffle_xor(maximum, mask));
      }
      maximum = fminf(maximum, -kLowest);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += natural_exp(tile.at(i, j) - maximum);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (lane() / 4 == j / 2) (j % 2 ? sums.second : sums.first) = {maximum, sum};
    }
    if constexpr (!kExact) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        largest = fmaxf(largest, shuffle_xor(largest, mask));
      }
      const float wanted = largest - 30;  // more range is needed below a tile's largest than above
      if (largest > kLowest && largest < -kLowest && fabsf(wanted - reference_) > 40) {
        end_rows();
        reference_ = wanted;
      }
    }
  }

  const ForwardParams& p_;
  const float scale_;
  int row_ = 0;
  bool first_ = true;
  float reference_ = 0, sum_[8] = {};
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) statistics(ForwardParams p) {
  Shared shared;
  Statistics<T> statistics(p);
  for_each_tile<T>(p.product, shared, statistics);
}

// A block takes 32 rows or columns: each warp adds up every eighth part, the first warp the
// results.
__global__ void __launch_bounds__(kThreads) combine(ForwardParams p) {
  Shared shared;
  Sum* const sums = shared.take<Sum>(kThreads);
  const int n = p.product.n, m = p.product.m, row_blocks = (n + 31) / 32;
  const bool is_row = block_x() < row_blocks;
  const int index = (is_row ? block_x() : block_x() - row_blocks) * 32 + lane();
  const int count = is_row ? n : m;
  const Sum* const parts = is_row ? p.rows : p.columns;
  const int64_t step = is_row ? n : p.column_step;
  const int number = is_row ? p.product.strips * kWarpColumns : p.product.slabs * kWarpRows;
  Sum sum{0, 0};
  if (index < count) {
    for (int part = warp(); part < number; part += kWarps) {
      sum = merge(sum, parts[part * step + index]);
    }
  }
  sums[thread()] = sum;
  sync_block();
  if (warp() > 0 || index >= count) return;
  for (int other = 1; other < kWarps; ++other) sum = merge(sum, sums[other * 32 + lane()]);
  const float lse = sum.sum == 0 ? -kInfinity
                                 : sum.reference + fast_log2(sum.sum) * kLn2;
  (is_row ? p.row_lse : p.col_lse)[index] = lse;
  const int64_t own = int64_t{index} + p.product.diagonal;
  if (is_row && (own < 0 || own >= m)) {
    p.positive[index] = -kInfinity;
  }
}

}  // namespace
}  // namespace pairwise

int64_t pairwise_logsumexp_forward_cuda(const Tensor& a, const Tensor& b, const Tensor& scale,
                                        int64_t diagonal, const Tensor& row_lse,
                                        const Tensor& col_lse, const Tensor& positive,
                                        int device, uintptr_t handle, uintptr_t workspace) {
  using namespace pairwise;
  const Stream stream{device, handle};
  size_t shared = 0;
  ForwardParams p{};
  p.product = make_product(a, b, scale, diagonal, multiprocessors(stream),
                           kWarpColumns * sizeof(Sum), kWarpRows * sizeof(Sum), stream, shared,
                           "forward");
  const int64_t n = p.product.n, m = p.product.m;
  p.column_step = (m + 1) / 2 * 2;
  const int64_t columns = p.product.slabs * kWarpRows * p.column_step;
  const int64_t rows = p.product.strips * kWarpColumns * n;
  const int64_t bytes = (columns + rows) * sizeof(Sum);
  if (bytes > 0 && !workspace) return bytes;
  p.columns = reinterpret_cast<Sum*>(workspace);
  p.rows = p.columns + columns;
  p.row_lse = row_lse.dense<float>(n);
  p.col_lse = col_lse.dense<float>(m);
  p.positive = positive.dense<float>(n);
  const auto what = [&] { return describe(a, b, "forward"); };
  for_dtype(a.dtype, [&](auto of_type) {
    launch(statistics<decltype(of_type)>, Grid{p.product.slabs * p.product.strips}, kThreads,
           shared, stream, p, what);
  });
  launch(combine, Grid{(n + 31) / 32 + (m + 31) / 32}, kThreads, shared_bytes<Sum>(kThreads),
         stream, p, what);
  return 0;
}

}  // namespace clipvip
