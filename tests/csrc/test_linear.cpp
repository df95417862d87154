// The three products of every instruction set against sums in double. The workspace is exactly as
// large as asked for and full of NaNs, so that the sanitizers see a step outside and the results a
// value that nobody wrote.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "linear/params.h"

namespace {

using clipvip::DType;
using clipvip::LinearInput;
using clipvip::LinearParams;
using clipvip::Tensor;

struct Case {
  int64_t tokens, inner, outer;
  int threads;
  DType dtype;
  LinearInput input;
};

// Rows further apart than they are long; bf16 keeps the upper half of a float.
struct Matrix {
  int64_t rows, columns, stride;
  std::vector<float> values;
  std::vector<uint16_t> halves;
  Tensor tensor;

  Matrix(int64_t rows, int64_t columns, DType dtype, unsigned seed)
      : rows(rows), columns(columns), stride(columns + 3), values(rows * stride),
        halves(rows * stride) {
    for (size_t i = 0; i < values.size(); ++i) {
      seed = seed * 1664525u + 1013904223u;
      values[i] = float(seed >> 8) / (1 << 23) - 1;
      uint32_t bits;
      std::memcpy(&bits, &values[i], 4);
      if (dtype == DType::bfloat16) bits &= 0xffff0000u;
      std::memcpy(&values[i], &bits, 4);
      halves[i] = uint16_t(bits >> 16);
    }
    tensor.data = dtype == DType::bfloat16 ? (void*)halves.data() : (void*)values.data();
    tensor.dtype = dtype;
    tensor.ndim = 2;
    tensor.size[0] = rows, tensor.size[1] = columns;
    tensor.stride[0] = stride, tensor.stride[1] = 1;
  }
  // What is in memory now.
  double operator()(int64_t i, int64_t k) const {
    float value = values[i * stride + k];
    if (tensor.dtype == DType::bfloat16) {
      const uint32_t bits = uint32_t(halves[i * stride + k]) << 16;
      std::memcpy(&value, &bits, 4);
    }
    return value;
  }
};

int failures = 0;

template <typename Found, typename Expected>
void compare(const char* name, int64_t rows, int64_t columns, const Found& found,
             const Expected& expected, double tolerance, const char* isa, const Case& c) {
  double size = 0;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) size = std::fmax(size, std::fabs(expected(i, k)));
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      if (std::fabs(found(i, k) - expected(i, k)) <= tolerance * size) continue;
      std::printf("%s, T=%ld K=%ld N=%ld dtype=%d input=%d: %s[%ld, %ld] is %g, expected %g\n", isa,
                  long(c.tokens), long(c.inner), long(c.outer), int(c.dtype), int(c.input), name,
                  long(i), long(k), double(found(i, k)), double(expected(i, k)));
      ++failures;
      return;
    }
  }
}

template <typename Kernel>
void call(Kernel kernel, LinearParams p) {
  std::vector<float> workspace(kernel(p) / 4, std::numeric_limits<float>::quiet_NaN());
  p.workspace = workspace.data();
  kernel(p);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void check(const Case& c, const char* isa) {
  const int64_t T = c.tokens, K = c.inner, N = c.outer;
  Matrix x(T, K, c.dtype, 1), w(N, K, c.dtype, 2), residual(T, N, c.dtype, 3), g(T, N, c.dtype, 4);
  Matrix before(T, K, c.dtype, 5), out(T, N, c.dtype, 6), grad_x(T, K, c.dtype, 7);
  Matrix vectors(3, K > N ? K : N, DType::float32, 8);
  std::vector<float> mean(T, NAN), rstd(T, NAN), grad_w(N * K, NAN), grad_b(N, NAN);
  std::vector<double> f(T * K);
  const float alpha = 0.75f, beta = 1.5f, eps = 1e-5f;
  const auto vector = [&](int i) { return vectors.values.data() + i * vectors.stride; };
  for (int64_t t = 0; t < T; ++t) {
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < K; ++k) sum += x(t, k);
    for (int64_t k = 0; k < K; ++k) squares += std::pow(x(t, k) - sum / K, 2);
    for (int64_t k = 0; k < K; ++k) {
      const double value = x(t, k);
      f[t * K + k] = c.input == LinearInput::silu ? value * sigmoid(value)
                     : c.input == LinearInput::normed
                         ? (value - sum / K) / std::sqrt(squares / K + eps) * vector(0)[k] +
                               vector(1)[k]
                         : value;
    }
  }
  LinearParams p;
  p.x = x.tensor, p.weight = w.tensor, p.residual = residual.tensor, p.out = out.tensor;
  p.operands = c.dtype, p.input = c.input, p.alpha = alpha, p.beta = beta, p.eps = eps;
  p.bias = vector(2), p.norm_weight = vector(0), p.norm_bias = vector(1);
  p.mean = mean.data(), p.rstd = rstd.data(), p.threads = c.threads;
  call([](const LinearParams& q) { return clipvip::linear_forward(q); }, p);
  const double loose = c.dtype == DType::bfloat16 ? 1e-2 : 2e-6;
  compare("out", T, N, out, [&](int64_t t, int64_t n) {
    double sum = 0;
    for (int64_t k = 0; k < K; ++k) sum += f[t * K + k] * w(n, k);
    return alpha * sum + beta * vector(2)[n] + residual(t, n);
  }, loose, isa, c);

  p.grad = g.tensor, p.grad_weight = grad_w.data(), p.grad_bias = grad_b.data();
  call([](const LinearParams& q) { return clipvip::linear_grad_weight(q); }, p);
  compare("grad_weight", N, K, [&](int64_t n, int64_t k) { return grad_w[n * K + k]; },
          [&](int64_t n, int64_t k) {
            double sum = 0;
            for (int64_t t = 0; t < T; ++t) sum += g(t, n) * f[t * K + k];
            return alpha * sum;
          }, loose, isa, c);
  compare("grad_bias", 1, N, [&](int64_t, int64_t n) { return grad_b[n]; },
          [&](int64_t, int64_t n) {
            double sum = 0;
            for (int64_t t = 0; t < T; ++t) sum += g(t, n);
            return sum;
          }, 2e-6, isa, c);

  p.out = grad_x.tensor;
  if (c.input == LinearInput::silu) p.before = before.tensor;
  call([](const LinearParams& q) { return clipvip::linear_grad_input(q); }, p);
  compare("grad_input", T, K, grad_x, [&](int64_t t, int64_t k) {
    double sum = 0;
    for (int64_t n = 0; n < N; ++n) sum += g(t, n) * w(n, k);
    const double z = before(t, k), s = sigmoid(z);
    return c.input == LinearInput::silu ? sum * s * (1 + z * (1 - s)) : sum;
  }, loose, isa, c);
}

}  // namespace

int main() {
  for (const std::string& isa : clipvip::cpu_capabilities()) {
    clipvip::set_cpu_capability(isa);
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      for (LinearInput input : {LinearInput::plain, LinearInput::normed, LinearInput::silu}) {
        check({1, 64, 64, 1, dtype, input}, isa.c_str());
        check({101, 128, 192, 3, dtype, input}, isa.c_str());
        check({7, 640, 64, 2, dtype, input}, isa.c_str());
        check({1601, 64, 128, 2, dtype, input}, isa.c_str());
      }
    }
  }
  return failures != 0;
}
