// Backward: gradients through LayerNorm and QuickGELU, with the sums of columns that are gradients
// of weights and biases. What the weight gradients of products read is computed again on the way.
//
// Sums of columns are the same in every run on one GPU: a thread adds up what it owns, a block's
// warps meet in shared memory, blocks write to places of their own, and `join` adds those up.
#include "elementwise/cuda.h"
#include "elementwise/kernel.cuh"

namespace clipvip {
namespace elementwise {
namespace {

// Adds up a block's sums and writes them to its slab's row of partial [slabs, width].
template <int count>
__device__ void write_sums(const Columns& p, const float (&sum)[count], float* partial) {
  Shared shared;
  float* const sums = shared.take<float>(count * kThreads);
#pragma unroll
  for (int i = 0; i < count; ++i) sums[i * kThreads + thread()] = sum[i];
  sync_block();
  const int column = block_x() * 32 * count + thread();
  if (thread() >= 32 * count || column >= p.width) return;
  const float* const own = sums + thread() % count * kThreads + thread() / count;
  float total = 0;
  for (int i = 0; i < kWarps; ++i) total += own[i * 32];
  partial[int64_t{block_y()} * p.width + column] = total;
}

constexpr int kJoinWarps = 32;

struct JoinParams {
  const float* partial;  // [parts, width]
  float* sums;           // [width]
  int parts, width;
};

__global__ void __launch_bounds__(32 * kJoinWarps) join(JoinParams p) {
  Shared shared;
  float* const sums = shared.take<float>(kJoinWarps * 32);
  const int column = block_x() * 32 + lane();
  float sum = 0;
  if (column < p.width) {
#pragma unroll 4
    for (int i = warp(); i < p.parts; i += kJoinWarps) {
      sum += p.partial[int64_t{i} * p.width + column];
    }
  }
  sums[thread()] = sum;
  sync_block();
  if (warp() > 0 || column >= p.width) return;
  for (int i = 1; i < kJoinWarps; ++i) sum += sums[i * 32 + lane()];
  p.sums[column] = sum;
}

// Warps of a block; each keeps three sums per column in shared memory.
constexpr int kNormWarps = 4, kNormThreads = 32 * kNormWarps, kSums = 3;

// Blocks per multiprocessor that the registers allow.
constexpr int blocks_of(int most) { return most <= 512 ? 4 : most <= 1024 ? 3 : 2; }

struct AddNormBackwardParams {
  const void *grad_normed, *grad_sum, *sum;  // grad_sum may be null
  const float *mean, *rstd, *weight, *norm_bias;
  void *grad, *copy, *normed;  // copy may be null
  float* partial;              // [blocks, kSums, width]
  int64_t rows;
  int width, blocks;
};

__device__ void add_to(float* sums, const float (&values)[4]) {
  float total[4];
  load_vector(sums, 0, total);
#pragma unroll
  for (int i = 0; i < 4; ++i) total[i] += values[i];
  store<float>(sums, 0, total);
}

// Each of the n warps takes every n-th row. With x̂ = (sum − mean)·rstd, ĝ = grad_normed·weight and
// ⟨·⟩ the mean over the row, the gradient through LayerNorm is rstd·(ĝ − ⟨ĝ⟩ − x̂·⟨ĝ·x̂⟩).
// R: sum, its gradients; P: normed, its gradient and the copy.
template <typename R, typename P, int most>
__global__ void __launch_bounds__(kNormThreads, blocks_of(most))
    add_norm_backward(AddNormBackwardParams p) {
  constexpr int kPieces = most / kPiece, kAtOnce = kPieces > 8 ? 4 : kPieces;
  Shared shared;
  float* const all_sums = shared.take<float>(kNormWarps * kSums * p.width);
  float* const of_weight = all_sums + warp() * kSums * p.width;
  float* const of_bias = of_weight + p.width;
  float* const of_grad = of_bias + p.width;
  for (int i = lane(); i < kSums * p.width; i += 32) of_weight[i] = 0;
  sync_warp();

  const int64_t step = int64_t{p.blocks} * kNormWarps;
  for (int64_t row = block_x() * kNormWarps + warp(); row < p.rows; row += step) {
    const int64_t first = row * p.width;
    Numbers<R, 4> sum[kPieces];
    Numbers<P, 4> grad_normed[kPieces];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int column = column_of(k);
      if (column >= p.width) continue;
      sum[k] = load<R, 4>(p.sum, first + column);
      grad_normed[k] = load<P, 4>(p.grad_normed, first + column);
    }
    const float mean = p.mean[row], rstd = p.rstd[row];

    float x[kPieces][4], grads = 0, products = 0;  // x: without weight and bias
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const int column = column_of(k);
      if (column >= p.width) continue;
      float weight[4], bias[4], grad[4], product[4], normed[4];
      load_vector(p.weight, column, weight);
      load_vector(p.norm_bias, column, bias);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[k][i] = (to_float(sum[k].at[i]) - mean) * rstd;
        grad[i] = to_float(grad_normed[k].at[i]);
        product[i] = grad[i] * x[k][i];
        grads += grad[i] * weight[i];
        products += product[i] * weight[i];
        normed[i] = x[k][i] * weight[i] + bias[i];
      }
      store<P>(p.normed, first + column, normed);
      add_to(of_weight + column, product);
      add_to(of_bias + column, grad);
    }
    grads = sum_over_warp(grads) / p.width;
    products = sum_over_warp(products) / p.width;

    // grad_sum is read late and in parts, because registers are scarce.
#pragma unroll
    for (int part = 0; part < kPieces; part += kAtOnce) {
      Numbers<R, 4> grad_sum[kAtOnce] = {};
#pragma unroll
      for (int k = part; k < part + kAtOnce; ++k) {
        const int column = column_of(k);
        if (!p.grad_sum || column >= p.width) continue;
        grad_sum[k - part] = load<R, 4>(p.grad_sum, first + column);
      }
#pragma unroll
      for (int k = part; k < part + kAtOnce; ++k) {
        const int column = column_of(k);
        if (column >= p.width) continue;
        float weight[4], grad[4];
        load_vector(p.weight, column, weight);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float own = to_float(grad_normed[k].at[i]) * weight[i];
          grad[i] = to_float(grad_sum[k - part].at[i]) + rstd * (own - grads - x[k][i] * products);
        }
        store<R>(p.grad, first + column, grad);
        if (p.copy) store<P>(p.copy, first + column, grad);
        add_to(of_grad + column, grad);
      }
    }
  }
  sync_block();
  for (int i = thread(); i < kSums * p.width; i += kNormThreads) {
    float total = 0;
    for (int j = 0; j < kNormWarps; ++j) total += all_sums[j * kSums * p.width + i];
    p.partial[int64_t{block_x()} * kSums * p.width + i] = total;
  }
}

struct CastAndSumParams {
  const void* grad;
  void* copy;  // may be null
  float* partial;
  Columns columns;
};

template <typename G, typename C>
__global__ void __launch_bounds__(kThreads, kBlocks) cast_and_sum(CastAndSumParams p) {
  constexpr int kCount = 16 / sizeof(G);
  float sums[kCount] = {};
  for_each_row<kCount, 4>(
      p.columns, [&](int64_t i) { return load<G, kCount>(p.grad, i); },
      [&](int64_t i, const Numbers<G, kCount>& taken) {
        float grad[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) sums[j] += grad[j] = to_float(taken.at[j]);
        if (p.copy) store<C>(p.copy, i, grad);
      });
  write_sums(p.columns, sums, p.partial);
}

struct QuickGeluBackwardParams {
  const void *grad, *x;
  const float* bias;
  void *grad_x, *out;
  float* partial;
  Columns columns;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    quick_gelu_backward(QuickGeluBackwardParams p) {
  constexpr int kCount = 16 / sizeof(T);
  struct Taken {
    Numbers<T, kCount> grad, x;
  };
  float bias[kCount], sums[kCount] = {};
  load_own(p.columns, p.bias, bias);
  for_each_row<kCount, 2>(
      p.columns,
      [&](int64_t i) { return Taken{load<T, kCount>(p.grad, i), load<T, kCount>(p.x, i)}; },
      [&](int64_t i, const Taken& taken) {
        float grad[kCount], out[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float y = to_float(taken.x.at[j]) + bias[j], sigmoid = quick_sigmoid(y);
          out[j] = y * sigmoid;
          grad[j] = to_float(taken.grad.at[j]) * sigmoid * (1 + kSlope * y * (1 - sigmoid));
          sums[j] += grad[j];
        }
        store<T>(p.grad_x, i, grad);
        store<T>(p.out, i, out);
      });
  write_sums(p.columns, sums, p.partial);
}

void launch_join(const float* partial, int64_t parts, const Tensor& sums, Stream stream,
                        const char* op, const Tensor& x) {
  const int64_t width = sums.ndim == 2 ? sums.size[0] * sums.size[1] : sums.size[0];
  const JoinParams p{partial, sums.dense<float>(width), static_cast<int>(parts),
                     static_cast<int>(width)};
  launch(join, Grid{(width + 31) / 32}, 32 * kJoinWarps, shared_bytes<float>(kJoinWarps * 32),
         stream, p, [&] { return describe(op, x); });
}

}  // namespace
}  // namespace elementwise

int64_t elementwise_add_norm_backward_cuda(const Tensor& grad_normed, const Tensor* grad_sum,
                                           const Tensor& sum, const Tensor& mean,
                                           const Tensor& rstd, const Tensor& weight,
                                           const Tensor& norm_bias, const Tensor& grad,
                                           const Tensor* copy, const Tensor& normed,
                                           const Tensor& column_sums, int device,
                                           uintptr_t handle, uintptr_t workspace) {
  using namespace elementwise;
  const Stream stream{device, handle};
  const int64_t rows = sum.size[0], width = sum.size[1];
  const DType wide = sum.dtype, narrow = normed.dtype;
  AddNormBackwardParams p{matrix(grad_normed, narrow, sum),
                          matrix(grad_sum, wide, sum),
                          matrix(sum, wide, sum),
                          mean.dense<const float>(rows),
                          rstd.dense<const float>(rows),
                          weight.dense<const float>(width),
                          norm_bias.dense<const float>(width),
                          matrix(grad, wide, sum),
                          matrix(copy, narrow, sum),
                          matrix(normed, narrow, sum),
                          reinterpret_cast<float*>(workspace),
                          rows,
                          static_cast<int>(width),
                          0};
  const size_t shared = shared_bytes<float>(kNormWarps * kSums * width);
  int64_t fitting = (max_shared_bytes(stream) + kSystemBytes) / (shared + kSystemBytes);
  for_width(width, [&](auto most) { fitting = std::min<int64_t>(fitting, blocks_of(most)); });
  p.blocks = static_cast<int>(
      std::min((rows + kNormWarps - 1) / kNormWarps, fitting * multiprocessors(stream)));
  const int64_t needed = p.blocks * kSums * width * sizeof(float);
  if (needed > 0 && !workspace) return needed;
  for_dtypes(wide, narrow, [&](auto of_wide, auto of_narrow) {
    for_width(width, [&](auto most) {
      launch(add_norm_backward<decltype(of_wide), decltype(of_narrow), decltype(most)::value>,
             Grid{p.blocks}, kNormThreads, shared, stream, p,
             [&] { return describe("add_norm_backward", sum); });
    });
  });
  launch_join(p.partial, p.blocks, column_sums, stream, "add_norm_backward", sum);
  return 0;
}

int64_t elementwise_cast_and_sum_cuda(const Tensor& grad, const Tensor* copy,
                                      const Tensor& column_sums, int device, uintptr_t handle,
                                      uintptr_t workspace) {
  using namespace elementwise;
  const Stream stream{device, handle};
  int64_t needed = 0;
  for_dtypes(grad.dtype, copy ? copy->dtype : grad.dtype, [&](auto wide, auto narrow) {
    constexpr int kCount = 16 / sizeof(wide);
    const CastAndSumParams p{matrix(grad, grad.dtype, grad),
                             copy ? matrix(copy, copy->dtype, grad) : nullptr,
                             reinterpret_cast<float*>(workspace), divide(grad, kCount, stream)};
    needed = workspace ? 0 : p.columns.partial_bytes();
    if (needed > 0) return;
    launch_columns<kCount>(cast_and_sum<decltype(wide), decltype(narrow)>, p, true, stream,
                           "cast_and_sum", grad);
    launch_join(p.partial, p.columns.slabs, column_sums, stream, "cast_and_sum", grad);
  });
  return needed;
}

int64_t elementwise_quick_gelu_backward_cuda(const Tensor& grad, const Tensor& x,
                                             const Tensor& bias, const Tensor& grad_x,
                                             const Tensor& out, const Tensor& column_sums,
                                             int device, uintptr_t handle, uintptr_t workspace) {
  using namespace elementwise;
  const Stream stream{device, handle};
  int64_t needed = 0;
  for_dtype(x.dtype, [&](auto of_type) {
    constexpr int kCount = 16 / sizeof(of_type);
    const QuickGeluBackwardParams p{matrix(grad, x.dtype, x),
                                    matrix(x, x.dtype, x),
                                    bias.dense<const float>(x.size[1]),
                                    matrix(grad_x, x.dtype, x),
                                    matrix(out, x.dtype, x),
                                    reinterpret_cast<float*>(workspace),
                                    divide(x, kCount, stream)};
    needed = workspace ? 0 : p.columns.partial_bytes();
    if (needed > 0) return;
    launch_columns<kCount>(quick_gelu_backward<decltype(of_type)>, p, true, stream,
                           "quick_gelu_backward", x);
    launch_join(p.partial, p.columns.slabs, column_sums, stream, "quick_gelu_backward", x);
  });
  return needed;
}

}  // namespace clipvip
