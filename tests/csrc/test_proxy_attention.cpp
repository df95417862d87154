// proxy_attention on every instruction set against the formula in double, forward and backward.
// Buffers are exactly as large as asked for, so that the address sanitizer sees any overrun; between
// rows there may be NaN, which must neither be read nor overwritten.
#include "proxy_attention/op.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

using clipvip::DType;
using clipvip::Tensor;

namespace {

struct Aligned {  // float storage as Python hands it over: aligned to 64 bytes, filled with NaN
  explicit Aligned(int64_t count) : whole(count + 16, NAN) {}
  float* data() {
    void* p = whole.data();
    size_t space = whole.size() * sizeof(float);
    return static_cast<float*>(std::align(64, 4, p, space));
  }
  std::vector<float> whole;
};

// With `gap` elements between rows along the last dimension.
Tensor view(void* data, DType dtype, std::vector<int64_t> size, int64_t gap = 0) {
  Tensor t;
  t.data = data;
  t.dtype = dtype;
  t.ndim = static_cast<int>(size.size());
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.size[i] = size[i];
    t.stride[i] = stride;
    stride = i == t.ndim - 1 ? size[i] + gap : stride * size[i];
  }
  return t;
}

struct Case {
  std::vector<int32_t> offsets;
  int64_t proxies, patches, heads, dim, gap = 0;
};

// Out [T, H, D] and the gradient of qkv [T, 3, H, D] by the definition.
void reference(const Case& c, const std::vector<float>& qkv, const std::vector<float>& grad,
               double scale, std::vector<double>& out, std::vector<double>& grad_qkv) {
  const int64_t H = c.heads, D = c.dim, videos = int64_t(c.offsets.size()) - 1;
  const auto at = [&](int64_t token, int part, int64_t h) { return ((token * 3 + part) * H + h) * D; };
  for (int64_t b = 0; b < videos; ++b) {
    const int64_t start = b * c.proxies + c.offsets[b] * c.patches;
    const int64_t tokens = c.proxies + (c.offsets[b + 1] - c.offsets[b]) * c.patches;
    const auto frame = [&](int64_t i) { return i < c.proxies ? -1 : (i - c.proxies) / c.patches; };
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t i = 0; i < tokens; ++i) {
        std::vector<double> p(tokens, 0);
        double highest = -INFINITY, sum = 0, delta = 0;
        const auto seen = [&](int64_t j) {
          return frame(i) < 0 || frame(j) < 0 || frame(i) == frame(j);
        };
        for (int64_t j = 0; j < tokens; ++j) {
          for (int64_t d = 0; d < D; ++d) {
            p[j] += scale * qkv[at(start + i, 0, h) + d] * qkv[at(start + j, 1, h) + d];
          }
          if (seen(j)) highest = std::fmax(highest, p[j]);
        }
        for (int64_t j = 0; j < tokens; ++j) sum += p[j] = seen(j) ? std::exp(p[j] - highest) : 0;
        double* o = &out[((start + i) * H + h) * D];
        const float* go = &grad[((start + i) * H + h) * D];
        for (int64_t j = 0; j < tokens; ++j) {
          p[j] /= sum;
          for (int64_t d = 0; d < D; ++d) o[d] += p[j] * qkv[at(start + j, 2, h) + d];
        }
        for (int64_t d = 0; d < D; ++d) delta += o[d] * go[d];
        for (int64_t j = 0; j < tokens; ++j) {
          double dp = 0;
          for (int64_t d = 0; d < D; ++d) dp += go[d] * qkv[at(start + j, 2, h) + d];
          const double ds = scale * p[j] * (dp - delta);
          for (int64_t d = 0; d < D; ++d) {
            grad_qkv[at(start + i, 0, h) + d] += ds * qkv[at(start + j, 1, h) + d];
            grad_qkv[at(start + j, 1, h) + d] += ds * qkv[at(start + i, 0, h) + d];
            grad_qkv[at(start + j, 2, h) + d] += p[j] * go[d];
          }
        }
      }
    }
  }
}

// Elements of `dtype`, exactly rounded down from floats that bf16 holds; fp16 is Python's to test.
// Rows of c.dim lie c.gap apart, with all bits set between them and nothing after the last.
struct Rows {
  const Case& c;
  size_t bytes;

  Rows(const Case& c, DType dtype) : c(c), bytes(dtype == DType::float32 ? 4 : 2) {}
  size_t at(size_t i) const { return (i + i / c.dim * c.gap) * bytes; }

  std::vector<char> encode(const std::vector<float>& x) const {
    std::vector<char> raw(at(x.size() - 1) + bytes, '\xff');
    for (size_t i = 0; i < x.size(); ++i) {
      std::memcpy(&raw[at(i)], reinterpret_cast<const char*>(&x[i]) + 4 - bytes, bytes);
    }
    return raw;
  }
  std::vector<float> decode(const std::vector<char>& raw, size_t count) const {
    std::vector<float> x(count, 0.f);
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(reinterpret_cast<char*>(&x[i]) + 4 - bytes, &raw[at(i)], bytes);
    }
    return x;
  }
  bool gaps_are_untouched(std::vector<char> raw, size_t count) const {
    for (size_t i = 0; i < count; ++i) std::memset(&raw[at(i)], 0xff, bytes);
    return std::all_of(raw.begin(), raw.end(), [](char x) { return x == '\xff'; });
  }
};

double worst(const std::vector<float>& got, const std::vector<double>& want) {
  double error = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double each = std::fabs(got[i] - want[i]);
    if (!(each <= error)) error = each;  // keeps NaN
  }
  return error;
}

bool check(const std::string& capability, DType dtype, const Case& c, int threads) {
  clipvip::set_cpu_capability(capability);
  const int64_t frames = c.offsets.back(), videos = int64_t(c.offsets.size()) - 1;
  const int64_t T = videos * c.proxies + frames * c.patches, H = c.heads, D = c.dim;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  const auto draw = [&](int64_t count) {
    std::vector<float> x(count);
    for (float& each : x) {
      uint32_t bits;
      each = normal(random);
      std::memcpy(&bits, &each, 4);
      bits &= 0xffff0000;
      std::memcpy(&each, &bits, 4);
    }
    return x;
  };
  const std::vector<float> qkv = draw(T * 3 * H * D), grad = draw(T * H * D);
  std::vector<double> want(T * H * D), want_grad(T * 3 * H * D);
  const float scale = 1 / std::sqrt(float(D));
  reference(c, qkv, grad, scale, want, want_grad);

  const Rows rows(c, dtype);
  std::vector<char> raw_qkv = rows.encode(qkv), raw_grad = rows.encode(grad);
  std::vector<char> raw_out(raw_grad.size(), '\xff'), raw_grad_qkv(raw_qkv.size(), '\xff');
  std::vector<int32_t> offsets = c.offsets;
  std::vector<float> lse(H * T);
  const Tensor qkv_t = view(raw_qkv.data(), dtype, {T, 3, H, D}, c.gap);
  const Tensor offsets_t = view(offsets.data(), DType::int32, {videos + 1});
  const Tensor out_t = view(raw_out.data(), dtype, {T, H, D}, c.gap);
  const Tensor lse_t = view(lse.data(), DType::float32, {H, T});
  for (const bool backward : {false, true}) {
    const auto run = [&](uintptr_t workspace) {
      return backward ? clipvip::proxy_attention_backward_op(
                            view(raw_grad.data(), dtype, {T, H, D}, c.gap), qkv_t, offsets_t,
                            c.proxies, c.patches, scale, out_t, lse_t,
                            view(raw_grad_qkv.data(), dtype, {T, 3, H, D}, c.gap), threads,
                            workspace)
                      : clipvip::proxy_attention_forward_op(qkv_t, offsets_t, c.proxies, c.patches,
                                                            scale, out_t, lse_t, threads,
                                                            workspace);
    };
    Aligned workspace(run(0) / 4);
    run(reinterpret_cast<uintptr_t>(workspace.data()));
  }
  const double error = worst(rows.decode(raw_out, want.size()), want);
  const double grad_error = worst(rows.decode(raw_grad_qkv, want_grad.size()), want_grad);
  const bool untouched = rows.gaps_are_untouched(raw_out, want.size()) &&
                         rows.gaps_are_untouched(raw_grad_qkv, want_grad.size());
  const double allowed = dtype == DType::float32 ? 1e-5 : 0.06;
  if (error <= allowed && grad_error <= allowed && untouched) return true;
  std::printf("%s %s M=%d L=%d H=%d D=%d threads=%d: out off by %g, gradient by %g%s\n",
              capability.c_str(), dtype == DType::float32 ? "fp32" : "bf16", int(c.proxies),
              int(c.patches), int(H), int(D), threads, error, grad_error,
              untouched ? "" : ", gaps overwritten");
  return false;
}

}  // namespace

int main() {
  std::vector<Case> cases = {
      {{0, 2, 2, 3}, 4, 49, 2, 64}, {{0, 2}, 5, 7, 1, 80},     {{0, 1, 3}, 1, 1, 3, 32},
      {{0, 2}, 16, 60, 1, 96},      {{0, 1, 2}, 4, 100, 1, 128}, {{0, 0}, 3, 2, 1, 64},
  };
  for (int64_t dim = 8; dim <= 128; dim += 8) {
    for (const int64_t gap : {0, 8}) cases.push_back({{0, 2, 2, 3}, 3, 5, 2, dim, gap});
  }
  bool good = true;
  for (const std::string& capability : clipvip::cpu_capabilities()) {
    for (const DType dtype : {DType::float32, DType::bfloat16}) {
      for (const Case& c : cases) {
        for (const int threads : {1, 2}) good = check(capability, dtype, c, threads) && good;
      }
    }
  }
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
