// Gradients of the logits, panel by panel, and of the scale. PyTorch multiplies a panel with b and
// a: a kernel here would not beat its matrix products.
#include "pairwise_logsumexp/cuda.h"
#include "pairwise_logsumexp/kernel.cuh"

namespace clipvip {
namespace pairwise {
namespace {

constexpr int kWeighThreads = 256;
// Log-sum-exps that span no more than this (in nats) share one exp per logit: e^80 does not
// overflow, and terms that underflow beside it do not matter. fp32 uses two, which round better.
constexpr float kReach = 80;

// The gradient of a logit is row_weight·exp(logit − row_lse) + column_weight·exp(logit − col_lse),
// or, with a shared reference that the weights compensate for,
// (row_weight + column_weight)·exp(logit − reference).
struct Unit {
  float reference;
  float shared;   // 1 or 0
  float inverse;  // 1 / unit
  float unit;     // 2^-14 of the largest incoming gradient, so that fp16 holds all that matters
};

struct Side {  // rows or columns
  const float *lse, *grad;
  float* weight;
  int64_t count;
};

// What the unit depends on. Extrema are exact, so it does not matter who joins which of them.
struct Extent {
  float smallest = kInfinity, largest = -kInfinity;  // log-sum-exp
  float grad = 0;                                    // the largest

  __device__ void include(Extent other) {
    smallest = fminf(smallest, other.smallest);
    largest = fmaxf(largest, other.largest);
    grad = fmaxf(grad, other.grad);
  }
};

struct WeighParams {
  Side rows, columns;
  const float* grad_positive;
  int64_t diagonal;
  bool exact;
  int blocks;
  Extent* extents;  // [blocks]
  Unit* unit;
};

// Numbers i … i + 3 of `count`, where i is a multiple of 4; `rest` past the end.
__device__ Float4 four(const float* from, int64_t i, int64_t count, float rest) {
  if (i + 4 <= count && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    return *reinterpret_cast<const Float4*>(from + i);
  }
  Float4 numbers;
#pragma unroll
  for (int j = 0; j < 4; ++j) numbers.at[j] = i + j < count ? from[i + j] : rest;
  return numbers;
}

// Calls body(i, whether of a row) for the thread's share of all rows and columns, four at a time.
template <typename Body>
__device__ void for_each_four(const WeighParams& p, Body body) {
  const int64_t rows = (p.rows.count + 3) / 4, columns = (p.columns.count + 3) / 4;
  const int64_t first = int64_t{block_x()} * kWeighThreads + thread();
  for (int64_t k = first; k < rows + columns; k += int64_t{p.blocks} * kWeighThreads) {
    if (k < rows) {
      body(4 * k, true);
    } else {
      body(4 * (k - rows), false);
    }
  }
}

// Joins one extent per thread into the block's and returns it in every thread.
__device__ Extent extent_of_block(Extent extent, Extent* warps) {
  for (int mask = 1; mask < 32; mask *= 2) {
    extent.include({shuffle_xor(extent.smallest, mask), shuffle_xor(extent.largest, mask),
                    shuffle_xor(extent.grad, mask)});
  }
  if (lane() == 0) warps[warp()] = extent;
  sync_block();
  for (int i = 0; i < kWeighThreads / 32; ++i) extent.include(warps[i]);
  return extent;
}

// Each block writes the extent of its share.
__global__ void __launch_bounds__(kWeighThreads) measure(WeighParams p) {
  Shared shared;
  Extent* const warps = shared.take<Extent>(kWeighThreads / 32);
  Extent extent;
  for_each_four(p, [&](int64_t i, bool is_row) {
    const Side& side = is_row ? p.rows : p.columns;
    const Float4 lse = four(side.lse, i, side.count, -kInfinity);
    const Float4 grad = four(side.grad, i, side.count, 0);
    Float4 grad_positive{};
    if (is_row) grad_positive = four(p.grad_positive, i, side.count, 0);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (lse.at[j] != -kInfinity) extent.include({lse.at[j], lse.at[j], fabsf(grad.at[j])});
      const int64_t own = i + j + p.diagonal;
      if (own >= 0 && own < p.columns.count) {
        extent.grad = fmaxf(extent.grad, fabsf(grad_positive.at[j]));
      }
    }
  });
  extent = extent_of_block(extent, warps);
  if (thread() == 0) p.extents[block_x()] = extent;
}

// Each block joins the extents of all and writes the weights of its share.
__global__ void __launch_bounds__(kWeighThreads) weigh(WeighParams p) {
  Shared shared;
  Extent* const warps = shared.take<Extent>(kWeighThreads / 32);
  Extent extent;
#pragma unroll 1
  for (int i = thread(); i < p.blocks; i += kWeighThreads) extent.include(p.extents[i]);
  extent = extent_of_block(extent, warps);

  int exponent = 0;  // NaN and infinities are kept, in units of 1
  if (extent.grad > 0 && extent.grad < kInfinity) {
    frexpf(extent.grad, &exponent);
    exponent = (exponent < -90 ? -90 : exponent) - 14;
  }
  const bool any = extent.largest >= extent.smallest;
  const bool one_reference = !p.exact && any && extent.largest - extent.smallest <= kReach;
  const Unit unit{one_reference ? extent.smallest : 0, one_reference ? 1.f : 0.f,
                  ldexpf(1, -exponent), ldexpf(1, exponent)};
  if (block_x() == 0 && thread() == 0) *p.unit = unit;

  for_each_four(p, [&](int64_t i, bool is_row) {
    const Side& side = is_row ? p.rows : p.columns;
    const int64_t entries = is_row ? p.columns.count : p.rows.count;
    const int64_t lone = is_row ? -p.diagonal : p.diagonal;
    const Float4 lse = four(side.lse, i, side.count, 0);
    const Float4 grad = four(side.grad, i, side.count, 0);
    Float4 weight;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float own = one_reference ? natural_exp(unit.reference - lse.at[j]) : 1;
      // A row or column whose only entry is its positive has no gradient, whatever comes in.
      const bool no_others = entries == 1 && i + j == lone;
      weight.at[j] = no_others ? 0 : grad.at[j] * unit.inverse * own;
    }
    if (i + 4 <= side.count && reinterpret_cast<uintptr_t>(side.weight) % 16 == 0) {
      *reinterpret_cast<Float4*>(side.weight + i) = weight;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (i + j < side.count) side.weight[i + j] = weight.at[j];
      }
    }
  });
}

struct PanelParams {
  Product product;
  const float *row_lse, *col_lse, *row_weight, *col_weight, *grad_positive;
  const Unit* unit;
  void* panel;  // [n, panel_step]
  int64_t panel_step;
  double* grad_scale;  // one number per warp of the launch
};

template <typename T>
class Gradient {
 public:
  __device__ explicit Gradient(const PanelParams& p)
      : p_(p), scale_(*p.product.scale), unit_(*p.unit) {}

  __device__ void begin_rows(int row, bool) {
    row_ = row;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int own = row + row_of(k);
      weight_[k] = own < p_.product.n ? p_.row_weight[own] : 0;
    }
  }

  __device__ void tile(const Tile& tile) {
    sum_ = 0;
    const bool plain = tile.plain(p_.product);
    if constexpr (std::is_same_v<T, float>) {
      write<false, false>(tile);
    } else if (unit_.shared == 0) {
      write<false, false>(tile);
    } else if (plain) {
      write<true, true>(tile);
    } else {
      write<false, true>(tile);
    }
    total_ += sum_;
  }

  __device__ void end_rows() {}

  __device__ void end() {
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) total_ += shuffle_xor(total_, mask);
    if (lane() == 0) p_.grad_scale[block_x() * kWarps + warp()] += total_;
  }

 private:
  // plain: all of the tile lies inside and has no positive. shared: the log-sum-exps' reference is.
  template <bool plain, bool shared>
  __device__ void write(const Tile& tile) {
    const Product& p = p_.product;
    const float scale2 = scale_ * kLog2E, reference2 = unit_.reference * kLog2E;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = tile.column + column_of(half * 8);
      float weight[8], lse[8];
      load<plain>(p_.col_weight, first, weight);
      if constexpr (!shared) load<plain>(p_.col_lse, first, lse);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int row = row_ + row_of(i);
        const bool own_exp = !shared && row < p.n;
        const float row_lse = own_exp ? p_.row_lse[row] : 0;
        const float row_weight = own_exp ? p_.row_weight[row] : weight_[i];
        float grad[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float product = tile.at(i, half * 8 + j);
          if constexpr (shared) {
            grad[j] = (row_weight + weight[j]) * fast_exp2(fmaf(product, scale2, -reference2));
          } else {
            // Rounded as for the log-sum-exps, so that a logit that is a sum's only term has weight
            // 1.
            const float logit = rounded_product(product, scale_);
            grad[j] = row_weight * natural_exp(logit - row_lse) +
                      weight[j] * natural_exp(logit - lse[j]);
          }
          if constexpr (!plain) {
            const int column = first + j;
            if (row >= p.n || column >= p.m) {
              grad[j] = product = 0;  // infinity times the zeros that pad rows is NaN
            } else if (column - row == p.diagonal) {
              grad[j] = p_.grad_positive[row] * unit_.inverse;
            }
          }
          sum_ = fmaf(grad[j], product, sum_);
        }
        if (plain || (row < p.n && first < p.m)) store(row, first, grad);
      }
    }
  }

  template <bool plain>
  __device__ void load(const float* from, int first, float (&to)[8]) const {
    if constexpr (plain) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const Float4 four = *reinterpret_cast<const Float4*>(from + first + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) to[i + j] = four.at[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i] = first + i < p_.product.m ? from[first + i] : 0;
    }
  }

  __device__ void store(int row, int first, const float (&grad)[8]) const {
    T* const to = static_cast<T*>(p_.panel) + row * p_.panel_step + first;
    if constexpr (std::is_same_v<T, float>) {
      reinterpret_cast<Float4*>(to)[0] = {grad[0], grad[1], grad[2], grad[3]};
      reinterpret_cast<Float4*>(to)[1] = {grad[4], grad[5], grad[6], grad[7]};
    } else {
      *reinterpret_cast<Bytes16*>(to) = {pack<T>(grad[0], grad[1]), pack<T>(grad[2], grad[3]),
                                         pack<T>(grad[4], grad[5]), pack<T>(grad[6], grad[7])};
    }
  }

  const PanelParams& p_;
  const float scale_;
  const Unit unit_;
  int row_ = 0;
  float sum_ = 0, weight_[8];
  double total_ = 0;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) panel(PanelParams p) {
  Shared shared;
  Gradient<T> gradient(p);
  for_each_tile<T>(p.product, shared, gradient);
  gradient.end();
}

}  // namespace
}  // namespace pairwise

int64_t pairwise_logsumexp_weigh_cuda(const Tensor& row_lse, const Tensor& col_lse,
                                      const Tensor& grad_row_lse, const Tensor& grad_col_lse,
                                      const Tensor& grad_positive, int64_t diagonal, bool exact,
                                      const Tensor& row_weight, const Tensor& col_weight,
                                      const Tensor& unit, int device, uintptr_t handle,
                                      uintptr_t workspace) {
  using namespace pairwise;
  const Stream stream{device, handle};
  const int64_t n = row_lse.size[0], m = col_lse.size[0];
  const int64_t fours = (n + 3) / 4 + (m + 3) / 4;
  const int64_t blocks = std::max<int64_t>(
      1, std::min<int64_t>(multiprocessors(stream), (fours + kWeighThreads - 1) / kWeighThreads));
  if (!workspace) return blocks * sizeof(Extent);
  const WeighParams p{{row_lse.dense<const float>(n), grad_row_lse.dense<const float>(n),
                       row_weight.dense<float>(n), n},
                      {col_lse.dense<const float>(m), grad_col_lse.dense<const float>(m),
                       col_weight.dense<float>(m), m},
                      grad_positive.dense<const float>(n),
                      std::max(-n, std::min(m, diagonal)),
                      exact,
                      static_cast<int>(blocks),
                      reinterpret_cast<Extent*>(workspace),
                      unit.as<Unit>()};
  for (const auto kernel : {measure, weigh}) {
    launch(kernel, Grid{blocks}, kWeighThreads, shared_bytes<Extent>(kWeighThreads / 32), stream,
           p, [&] {
             return "pairwise_logsumexp backward's weights of " + std::to_string(n) +
                    " rows and " + std::to_string(m) + " columns";
           });
  }
  return 0;
}

int64_t pairwise_logsumexp_panel_cuda(const Tensor& a, const Tensor& b, const Tensor& scale,
                                      int64_t diagonal, const Tensor& row_lse,
                                      const Tensor& col_lse, const Tensor& row_weight,
                                      const Tensor& col_weight, const Tensor& grad_positive,
                                      const Tensor& unit, const Tensor& panel,
                                      const Tensor& grad_scale, int device, uintptr_t handle,
                                      uintptr_t /*workspace*/) {
  using namespace pairwise;
  const Stream stream{device, handle};
  const int blocks = static_cast<int>(
      std::min<int64_t>(multiprocessors(stream), grad_scale.size[0] / 2 / kWarps));
  size_t shared = 0;
  PanelParams p{};
  p.product = make_product(a, b, scale, diagonal, blocks, 0, 0, stream, shared, "backward");
  p.row_lse = row_lse.dense<const float>(p.product.n);
  p.col_lse = col_lse.dense<const float>(p.product.m);
  p.row_weight = row_weight.dense<const float>(p.product.n);
  p.col_weight = col_weight.dense<const float>(p.product.m);
  p.grad_positive = grad_positive.dense<const float>(p.product.n);
  p.unit = unit.as<const Unit>();
  p.panel = panel.data;
  p.panel_step = panel.stride[0];
  p.grad_scale = grad_scale.as<double>();
  for_dtype(a.dtype, [&](auto of_type) {
    launch(pairwise::panel<decltype(of_type)>, Grid{p.product.slabs * p.product.strips}, kThreads,
           shared, stream, p, [&] { return describe(a, b, "backward"); });
  });
  return 0;
}

}  // namespace clipvip
