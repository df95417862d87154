// Forward: residual + (product + bias) with or without its LayerNorm, and QuickGELU.
#include "elementwise/cuda.h"
#include "elementwise/kernel.cuh"

namespace clipvip {
namespace elementwise {
namespace {

struct AddNormParams {
  const void *residual, *product;  // product may be null
  const float *bias, *weight, *norm_bias;
  float eps;
  void *sum, *normed;
  float *mean, *rstd;
  int64_t rows;
  int width;
};

// Blocks of add_norm per multiprocessor that the registers allow.
constexpr int blocks_of(int most) {
  return most <= 512 ? 4 : most <= 768 ? 3 : most <= 1024 ? 2 : 1;
}

// A warp normalizes a row, which it holds in registers. R: residual and sum; P: product and normed.
template <typename R, typename P, int most>
__global__ void __launch_bounds__(kThreads, blocks_of(most)) add_norm(AddNormParams p) {
  constexpr int kPieces = most / kPiece;
  const int64_t row = int64_t{block_x()} * kWarps + warp(), first = row * p.width;
  if (row >= p.rows) return;
  Numbers<R, 4> residual[kPieces];
  Numbers<P, 4> product[kPieces] = {};
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int column = column_of(k);
    if (column < p.width) residual[k] = load<R, 4>(p.residual, first + column);
    if (column < p.width && p.product) product[k] = load<P, 4>(p.product, first + column);
  }

  float x[kPieces][4], sum = 0;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int column = column_of(k);
    if (column >= p.width) continue;
    float bias[4];
    load_vector(p.bias, column, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[k][i] = to_float(residual[k].at[i]);
    if (p.product) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Rounded as it is stored, so that backward sees what was normalized.
        x[k][i] = to_float(from_float<R>(x[k][i] + (to_float(product[k].at[i]) + bias[i])));
      }
      store<R>(p.sum, first + column, x[k]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += x[k][i];
  }
  const float mean = sum_over_warp(sum) / p.width;

  float squares = 0;
#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    if (column_of(k) >= p.width) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) squares += (x[k][i] - mean) * (x[k][i] - mean);
  }
  const float rstd = 1 / sqrtf(sum_over_warp(squares) / p.width + p.eps);
  if (lane() == 0) p.mean[row] = mean, p.rstd[row] = rstd;

#pragma unroll
  for (int k = 0; k < kPieces; ++k) {
    const int column = column_of(k);
    if (column >= p.width) continue;
    float weight[4], bias[4];
    load_vector(p.weight, column, weight);
    load_vector(p.norm_bias, column, bias);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[k][i] = (x[k][i] - mean) * rstd * weight[i] + bias[i];
    store<P>(p.normed, first + column, x[k]);
  }
}

struct AddParams {
  const void *residual, *product;
  const float* bias;
  void* sum;
  Columns columns;
};

template <typename R, typename P>
__global__ void __launch_bounds__(kThreads, kBlocks) add(AddParams p) {
  constexpr int kCount = 16 / sizeof(R);
  struct Taken {
    Numbers<R, kCount> residual;
    Numbers<P, kCount> product;
  };
  float bias[kCount];
  load_own(p.columns, p.bias, bias);
  for_each_row<kCount, 2>(
      p.columns,
      [&](int64_t i) {
        return Taken{load<R, kCount>(p.residual, i), load<P, kCount>(p.product, i)};
      },
      [&](int64_t i, const Taken& taken) {
        float sum[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          sum[j] = to_float(taken.residual.at[j]) + (to_float(taken.product.at[j]) + bias[j]);
        }
        store<R>(p.sum, i, sum);
      });
}

struct QuickGeluParams {
  const void* x;
  const float* bias;
  void* out;
  Columns columns;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) quick_gelu(QuickGeluParams p) {
  constexpr int kCount = 16 / sizeof(T);
  float bias[kCount];
  load_own(p.columns, p.bias, bias);
  for_each_row<kCount, 4>(
      p.columns, [&](int64_t i) { return load<T, kCount>(p.x, i); },
      [&](int64_t i, const Numbers<T, kCount>& x) {
        float out[kCount];
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float y = to_float(x.at[j]) + bias[j];
          out[j] = y * quick_sigmoid(y);
        }
        store<T>(p.out, i, out);
      });
}

}  // namespace
}  // namespace elementwise

int64_t elementwise_add_norm_cuda(const Tensor& residual, const Tensor* product,
                                  const Tensor* bias, const Tensor& weight,
                                  const Tensor& norm_bias, float eps, const Tensor* sum,
                                  const Tensor& normed, const Tensor& mean, const Tensor& rstd,
                                  int device, uintptr_t handle, uintptr_t /*workspace*/) {
  using namespace elementwise;
  const int64_t rows = residual.size[0], width = residual.size[1];
  const AddNormParams p{matrix(residual, residual.dtype, residual),
                        matrix(product, normed.dtype, residual),
                        vector(bias, width),
                        weight.dense<const float>(width),
                        norm_bias.dense<const float>(width),
                        eps,
                        matrix(sum, residual.dtype, residual),
                        matrix(normed, normed.dtype, residual),
                        mean.dense<float>(rows),
                        rstd.dense<float>(rows),
                        rows,
                        static_cast<int>(width)};
  if ((product == nullptr) != (sum == nullptr)) {
    throw std::invalid_argument("add_norm writes a sum if there is a product");
  }
  for_dtypes(residual.dtype, normed.dtype, [&](auto wide, auto narrow) {
    for_width(width, [&](auto most) {
      launch(add_norm<decltype(wide), decltype(narrow), decltype(most)::value>,
             Grid{(rows + kWarps - 1) / kWarps}, kThreads, 0, Stream{device, handle}, p,
             [&] { return describe("add_norm", residual); });
    });
  });
  return 0;
}

int64_t elementwise_add_cuda(const Tensor& residual, const Tensor& product, const Tensor* bias,
                             const Tensor& sum, int device, uintptr_t handle,
                             uintptr_t /*workspace*/) {
  using namespace elementwise;
  const Stream stream{device, handle};
  for_dtypes(residual.dtype, product.dtype, [&](auto wide, auto narrow) {
    constexpr int kCount = 16 / sizeof(wide);
    const AddParams p{matrix(residual, residual.dtype, residual),
                      matrix(product, product.dtype, residual), vector(bias, residual.size[1]),
                      matrix(sum, residual.dtype, residual), divide(residual, kCount, stream)};
    launch_columns<kCount>(add<decltype(wide), decltype(narrow)>, p, false, stream, "add",
                           residual);
  });
  return 0;
}

int64_t elementwise_quick_gelu_cuda(const Tensor& x, const Tensor& bias, const Tensor& out,
                                    int device, uintptr_t handle, uintptr_t /*workspace*/) {
  using namespace elementwise;
  const Stream stream{device, handle};
  for_dtype(x.dtype, [&](auto of_type) {
    constexpr int kCount = 16 / sizeof(of_type);
    const QuickGeluParams p{matrix(x, x.dtype, x), bias.dense<const float>(x.size[1]),
                            matrix(out, x.dtype, x), divide(x, kCount, stream)};
    launch_columns<kCount>(quick_gelu<decltype(of_type)>, p, false, stream, "quick_gelu", x);
  });
  return 0;
}

}  // namespace clipvip
