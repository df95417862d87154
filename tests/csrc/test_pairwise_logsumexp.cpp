// pairwise_logsumexp of every instruction set against sums in double. The workspace is exactly as
// large as asked for and full of NaNs, so that the sanitizers see a step outside and the results a
// value that nobody wrote.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "pairwise_logsumexp/params.h"

namespace {

using clipvip::DType;
using clipvip::PairwiseLogsumexpParams;
using clipvip::Tensor;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Case {
  int64_t n, m, depth, diagonal;
  float scale;
  int threads;
  DType dtype;
};

// Rows further apart than they are long; bf16 keeps the upper half of a float.
struct Matrix {
  int64_t rows, depth, stride;
  std::vector<float> values;
  std::vector<uint16_t> halves;
  Tensor tensor;

  Matrix(int64_t rows, int64_t depth, DType dtype, unsigned seed)
      : rows(rows), depth(depth), stride(depth + 3), values(rows * stride), halves(rows * stride) {
    for (size_t i = 0; i < values.size(); ++i) {
      seed = seed * 1664525u + 1013904223u;
      uint32_t bits;
      values[i] = (float(seed >> 8) / (1 << 23) - 1) / std::sqrt(float(depth));
      std::memcpy(&bits, &values[i], 4);
      if (dtype == DType::bfloat16) bits &= 0xffff0000u;
      std::memcpy(&values[i], &bits, 4);
      halves[i] = uint16_t(bits >> 16);
    }
    tensor.data = dtype == DType::bfloat16 ? (void*)halves.data() : (void*)values.data();
    tensor.dtype = dtype;
    tensor.ndim = 2;
    tensor.size[0] = rows, tensor.size[1] = depth;
    tensor.stride[0] = stride, tensor.stride[1] = 1;
  }
  double operator()(int64_t i, int64_t k) const { return values[i * stride + k]; }
};

int failures = 0;

void compare(const char* name, const std::vector<float>& found, const std::vector<double>& expected,
             double tolerance, const char* isa, const Case& c) {
  double size = 1;
  for (double x : expected) size = std::isfinite(x) ? std::fmax(size, std::fabs(x)) : size;
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool same = std::isfinite(expected[i])
                          ? std::fabs(found[i] - expected[i]) <= tolerance * size
                          : found[i] == expected[i];
    if (same) continue;
    std::printf("%s, n=%ld m=%ld D=%ld diagonal=%ld scale=%g: %s[%zu] is %g, expected %g\n", isa,
                long(c.n), long(c.m), long(c.depth), long(c.diagonal), c.scale, name, i, found[i],
                expected[i]);
    ++failures;
    return;
  }
}

using Kernel = int64_t (*)(const PairwiseLogsumexpParams&);

void call(Kernel kernel, PairwiseLogsumexpParams params) {
  std::vector<unsigned char> workspace(kernel(params), 0xff);
  params.workspace = workspace.data();
  kernel(params);
}

void check(const char* isa, const Case& c) {
  const Matrix a(c.n, c.depth, c.dtype, 1), b(c.m, c.depth, c.dtype, 2);
  std::vector<double> row(c.n, -kInfinity), col(c.m, -kInfinity), positive(c.n, -kInfinity);
  std::vector<double> product(c.n * c.m), row_sum(c.n), col_sum(c.m);
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t i = 0; i < c.n; ++i) {
      for (int64_t j = 0; j < c.m; ++j) {
        double& p = product[i * c.m + j];
        if (pass == 0) {
          for (int64_t k = 0; k < c.depth; ++k) p += a(i, k) * b(j, k);
        }
        const double logit = c.scale * p;
        if (j == i + c.diagonal) {
          positive[i] = logit;
        } else if (pass == 0) {
          row[i] = std::fmax(row[i], logit), col[j] = std::fmax(col[j], logit);
        } else {
          row_sum[i] += std::exp(logit - row[i]), col_sum[j] += std::exp(logit - col[j]);
        }
      }
    }
  }
  for (int64_t i = 0; i < c.n; ++i) row[i] += row[i] > -kInfinity ? std::log(row_sum[i]) : 0;
  for (int64_t j = 0; j < c.m; ++j) col[j] += col[j] > -kInfinity ? std::log(col_sum[j]) : 0;

  std::vector<float> row_lse(c.n), col_lse(c.m), found_positive(c.n);
  PairwiseLogsumexpParams params{a.tensor, b.tensor, &c.scale, c.diagonal};
  params.row_lse = row_lse.data();
  params.col_lse = col_lse.data();
  params.positive = found_positive.data();
  params.threads = c.threads;
  call(clipvip::pairwise_logsumexp_forward, params);
  compare("row_lse", row_lse, row, 2e-6, isa, c);
  compare("col_lse", col_lse, col, 2e-6, isa, c);
  compare("positive", found_positive, positive, 2e-6, isa, c);

  std::vector<float> grad_row(c.n), grad_col(c.m), grad_positive(c.n);
  for (int64_t i = 0; i < c.n; ++i) grad_row[i] = 0.1f * float(i % 7), grad_positive[i] = -1;
  for (int64_t j = 0; j < c.m; ++j) grad_col[j] = 0.2f * float(j % 5);
  std::vector<double> expected_a(c.n * c.depth), expected_b(c.m * c.depth), expected_scale(1);
  for (int64_t i = 0; i < c.n; ++i) {
    for (int64_t j = 0; j < c.m; ++j) {
      const double logit = c.scale * product[i * c.m + j];
      double grad = grad_positive[i];
      if (j != i + c.diagonal) {
        grad = grad_row[i] * std::exp(logit - row[i]) + grad_col[j] * std::exp(logit - col[j]);
      }
      expected_scale[0] += grad * product[i * c.m + j];
      for (int64_t k = 0; k < c.depth; ++k) {
        expected_a[i * c.depth + k] += c.scale * grad * b(j, k);
        expected_b[j * c.depth + k] += c.scale * grad * a(i, k);
      }
    }
  }
  std::vector<float> grad_a(c.n * c.depth), grad_b(c.m * c.depth), grad_scale(1);
  params.grad_row_lse = grad_row.data();
  params.grad_col_lse = grad_col.data();
  params.grad_positive = grad_positive.data();
  params.grad_a = grad_a.data();
  params.grad_b = grad_b.data();
  params.grad_scale = grad_scale.data();
  call(clipvip::pairwise_logsumexp_backward, params);
  // AVX512-BF16 rounds the gradient of the logits to bf16 before the products.
  const double tolerance = c.dtype == DType::bfloat16 ? 1e-2 : 2e-5;
  compare("grad_a", grad_a, expected_a, tolerance, isa, c);
  compare("grad_b", grad_b, expected_b, tolerance, isa, c);
  compare("grad_scale", grad_scale, expected_scale, 2e-5, isa, c);
}

}  // namespace

int main() {
  for (const std::string& isa : clipvip::cpu_capabilities()) {
    clipvip::set_cpu_capability(isa);
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      for (float scale : {0.f, 20.f, 200.f}) {
        check(isa.c_str(), {1, 1, 1, 0, scale, 1, dtype});
        check(isa.c_str(), {0, 3, 5, 0, scale, 1, dtype});
        check(isa.c_str(), {3, 0, 5, 0, scale, 2, dtype});
        check(isa.c_str(), {2, 3, 17, -1, scale, 1, dtype});
        check(isa.c_str(), {129, 70, 33, 5, scale, 2, dtype});
        check(isa.c_str(), {63, 200, 31, 150, scale, 3, dtype});
        check(isa.c_str(), {200, 63, 16, -400, scale, 2, dtype});
      }
    }
  }
  std::printf(failures ? "%d failed\n" : "all passed\n", failures);
  return failures != 0;
}
