// A product C = A·B over many rows, in blocks that fit a core's second level of cache.
//
// All threads pack B together. Each task then converts a block of A's rows to words and multiplies
// it with B panel by panel. A sum in registers runs over a slice of the inner dimension only, and
// the slices are added one after another, which also keeps rounding errors small. Conversions,
// LayerNorm and SiLU are applied while A or B is packed; bias, residual and derivative while
// results leave the registers.
#include <cmath>

#include "common/arena.h"
#include "common/gemm.h"
#include "common/parallel.h"
#include "linear/params.h"

namespace clipvip {
namespace CLIPVIP_ISA {
namespace {

// Rows of a block of A; and words of tokens that are packed at a time where the tokens are the
// inner dimension.
constexpr int64_t kMaxRows = 96, kMaxWords = 768;
constexpr int64_t kSummed = 32;  // words of tokens per partial sum of a column
constexpr int64_t kPanel = kMaxPanelVectors * kLanes;
static_assert(kLinearUnit % kPanel == 0 && kLinearUnit % (2 * kLanes) == 0, "whole panels and words");

// [0, total) in equal parts of at most `largest`, each but the last a multiple of `unit`.
struct Parts {
  int64_t total, size, count;

  Parts(int64_t total, int64_t largest, int64_t unit) : total(total) {
    const int64_t wanted = (total + largest - 1) / largest;
    size = wanted ? round_up((total + wanted - 1) / wanted, unit) : unit;
    count = (total + size - 1) / size;
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t length(int64_t part) const {
    return total - begin(part) < size ? total - begin(part) : size;
  }
};

// Row i of a matrix as floats: in place, or converted into `line`.
CLIPVIP_INLINE const float* float_row(const Tensor& matrix, int64_t i, float* line) {
  if (matrix.dtype == DType::float32) return matrix.as<const float>() + i * matrix.stride[0];
  const bfloat16* row = matrix.as<const bfloat16>() + i * matrix.stride[0];
  for (int64_t k = 0; k < matrix.size[1]; k += kLanes) store(line + k, load(row + k));
  return line;
}

CLIPVIP_INLINE Vec load_at(const Tensor& matrix, int64_t i, int64_t k) {
  const int64_t at = i * matrix.stride[0] + k;
  return matrix.dtype == DType::float32 ? load(matrix.as<const float>() + at)
                                        : load(matrix.as<const bfloat16>() + at);
}

CLIPVIP_INLINE void store_at(const Tensor& matrix, int64_t i, int64_t k, Vec value) {
  const int64_t at = i * matrix.stride[0] + k;
  if (matrix.dtype == DType::float32) {
    store(matrix.as<float>() + at, value);
  } else {
    store(matrix.as<bfloat16>() + at, value);
  }
}

CLIPVIP_INLINE Vec sigmoid(Vec x) {
  return div(broadcast(1.f), add(broadcast(1.f), exp(sub(zero(), x))));
}
CLIPVIP_INLINE Vec silu(Vec x) { return mul(x, sigmoid(x)); }
CLIPVIP_INLINE Vec silu_derivative(Vec x) {
  const Vec s = sigmoid(x);
  return mul(s, fma(x, sub(broadcast(1.f), s), broadcast(1.f)));
}

// Mean and 1/√(variance + eps) of a row, the variance around the mean.
CLIPVIP_INLINE void statistics(const float* row, int64_t n, float eps, float& mean, float& rstd) {
  Vec sum = zero();
  for (int64_t k = 0; k < n; k += kLanes) sum = add(sum, load(row + k));
  mean = reduce_add(sum) / float(n);
  Vec squares = zero();
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vec off = sub(load(row + k), broadcast(mean));
    squares = fma(off, off, squares);
  }
  rstd = 1.f / std::sqrt(reduce_add(squares) / float(n) + eps);
}

// What to do with a row's statistics.
enum class Statistics { computed, computed_and_kept, given };

// Row i of f(x).
CLIPVIP_INLINE const float* input_row(const LinearParams& p, int64_t i, float* line,
                                      Statistics what) {
  const float* row = float_row(p.x, i, line);
  const int64_t width = p.x.size[1];
  if (p.input == LinearInput::normed) {
    float mean, rstd;
    if (what == Statistics::given) {
      mean = p.mean[i], rstd = p.rstd[i];
    } else {
      statistics(row, width, p.eps, mean, rstd);
    }
    if (what == Statistics::computed_and_kept) p.mean[i] = mean, p.rstd[i] = rstd;
    for (int64_t k = 0; k < width; k += kLanes) {
      const Vec normed = mul(sub(load(row + k), broadcast(mean)), broadcast(rstd));
      store(line + k, fma(normed, load(p.norm_weight + k), load(p.norm_bias + k)));
    }
    return line;
  }
  if (p.input == LinearInput::silu) {
    for (int64_t k = 0; k < width; k += kLanes) store(line + k, silu(load(row + k)));
    return line;
  }
  return row;
}

// Word k of B, of k_words, from its row (or its two rows) of `width` floats, for every panel.
template <typename Dot>
CLIPVIP_INLINE void pack_word(typename Dot::Word* b, int64_t k_words, int64_t k, int64_t width,
                              const float* const (&rows)[Dot::kElements]) {
  for (int64_t n = 0; n < width; n += kPanel) {
    typename Dot::Word* to = b + n * k_words + k * kPanel;
#pragma GCC unroll 4
    for (int c = 0; c < kMaxPanelVectors; ++c) {
      Words<Dot>::store(to + c * kLanes, Words<Dot>::load_rows(rows, n + c * kLanes));
    }
  }
}

template <typename Dot>
class Linear {
 public:
  using Word = typename Dot::Word;
  static constexpr int kElements = Dot::kElements;
  // Words of the inner dimension per sum; bf16 operands round so much that a longer sum does no
  // harm.
  static constexpr int64_t kMaxSlice = kElements == 1 ? 256 : 384;

  // rows × columns of C, and the elements of the inner dimension. `whole`: all of B is packed, and
  // A is staged by rows; else a part of the inner dimension at a time, and A by columns.
  Linear(const LinearParams& p, int64_t rows, int64_t columns, int64_t inner, bool whole)
      : p_(p),
        columns_(columns),
        words_((inner + kElements - 1) / kElements),
        rows_(rows, kMaxRows, whole ? tile_rows(kMaxPanelVectors) : kLanes),
        parts_(words_, whole && words_ ? words_ : kMaxWords, 1),
        groups_(columns / kPanel, group_panels(), 1),
        a_step_(words_ + kLanes),  // rows a power of two apart would share a few cache sets
        arena_(p.workspace) {
    const int64_t staged =
        whole ? (rows_.size + kRowPadding) * a_step_ : parts_.size * kMaxRows + kRowPadding;
    const int64_t line = whole && inner > columns ? inner : columns;
    b_ = arena_.take<Word>(parts_.size * columns);
    scratch_begin_ = arena_.used();
    scratch(arena_, staged, line);
    staged_ = staged, line_ = line, scratch_size_ = arena_.used() - scratch_begin_;
  }

  int64_t workspace_bytes() const { return scratch_begin_ + p_.threads * scratch_size_; }

  // C = f(x)·Wᵀ: rows of W side by side are columns of B.
  void forward() const {
    parallel_for(columns_ / kPanel, p_.threads, [&](int64_t panel, int) {
      if (p_.weight.dtype == DType::float32) {
        pack_weight<float>(panel * kPanel);
      } else {
        pack_weight<bfloat16>(panel * kPanel);
      }
    });
    multiply([&](int64_t i, float* line, bool first_group) {
               return input_row(p_, i, line, first_group ? Statistics::computed_and_kept
                                                         : Statistics::computed);
             },
             [&](int64_t i, int64_t n, Vec value) {
               value = mul(value, broadcast(p_.alpha));
               if (p_.bias) value = fma(load(p_.bias + n), broadcast(p_.beta), value);
               if (p_.residual.data) value = add(value, load_at(p_.residual, i, n));
               store_at(p_.out, i, n, value);
             });
  }

  // C = grad·W, with W as B.
  void grad_input() const {
    parallel_for(words_, p_.threads, [&](int64_t k, int thread) {
      const Scratch s = scratch(thread);
      const float* rows[kElements];
      for (int e = 0; e < kElements; ++e) {
        rows[e] = float_row(p_.weight, k * kElements + e, s.line[e]);
      }
      pack_word<Dot>(b_, words_, k, columns_, rows);
    });
    multiply([&](int64_t i, float* line, bool) { return float_row(p_.grad, i, line); },
             [&](int64_t i, int64_t k, Vec value) {
               if (p_.before.data) value = mul(value, silu_derivative(load_at(p_.before, i, k)));
               store_at(p_.out, i, k, value);
             });
  }

  // C = gradᵀ·f(x), one part of the tokens after another.
  void grad_weight() const {
    const int64_t tokens = p_.x.size[0];
    for (int64_t part = 0; part < parts_.count; ++part) {
      const int64_t first = parts_.begin(part), words = parts_.length(part);
      parallel_for(words, p_.threads, [&](int64_t k, int thread) {
        const Scratch s = scratch(thread);
        const float* rows[kElements] = {};
        for (int e = 0; e < kElements; ++e) {
          const int64_t i = (first + k) * kElements + e;
          if (i < tokens) rows[e] = input_row(p_, i, s.line[e], Statistics::given);
        }
        pack_word<Dot>(b_, words, k, columns_, rows);
      });
      each_task([&](int64_t n, int64_t rows, int64_t group, const Scratch& s) {
        float* sums = group == 0 && p_.grad_bias ? p_.grad_bias + n : nullptr;
        if (p_.grad.dtype == DType::float32) {
          stage_columns<float>(s.a, first, words, n, rows, sums, part > 0);
        } else {
          stage_columns<bfloat16>(s.a, first, words, n, rows, sums, part > 0);
        }
        walk(Operand<Dot>{s.a, 1, kMaxRows}, words, rows, group, s,
             [&](int64_t i, int64_t column, Vec value) {
               float* to = p_.grad_weight + (n + i) * columns_ + column;
               value = mul(value, broadcast(p_.alpha));
               store(to, part > 0 ? add(load(to), value) : value);
             });
      });
    }
  }

 private:
  struct Scratch {
    Word* a;         // a block of A
    float* line[2];  // rows that are being converted
    float* c;        // a panel's sums over the slices so far
  };

  static CLIPVIP_INLINE Scratch scratch(Arena& arena, int64_t staged, int64_t line) {
    Scratch s{};
    s.a = arena.take<Word>(staged);
    for (float*& each : s.line) each = arena.take<float>(line);
    s.c = arena.take<float>(kMaxRows * kPanel);
    return s;
  }
  Scratch scratch(int thread) const {
    Arena arena(static_cast<char*>(p_.workspace) + scratch_begin_ + thread * scratch_size_);
    return scratch(arena, staged_, line_);
  }

  // Panels per task, chosen for about four tasks per thread.
  int64_t group_panels() const {
    const int64_t panels = columns_ / kPanel;
    const int64_t groups = rows_.count ? (4 * p_.threads + rows_.count - 1) / rows_.count : 1;
    return groups >= panels ? 1 : (panels + groups - 1) / groups;
  }

  template <typename T>
  CLIPVIP_INLINE void pack_weight(int64_t n) const {
    const T* from = p_.weight.as<const T>() + n * p_.weight.stride[0];
    pack_transposed<Dot>(b_ + n * words_,
                         [&](int64_t row) { return from + row * p_.weight.stride[0]; }, kPanel,
                         words_, kMaxPanelVectors);
  }

  // Packs columns [n, n + rows) of the gradient, side by side for each word of tokens, and adds to
  // the columns' sums.
  template <typename T>
  CLIPVIP_INLINE void stage_columns(Word* to, int64_t first, int64_t words, int64_t n,
                                    int64_t rows, float* sums, bool more) const {
    const int64_t tokens = p_.grad.size[0], step = p_.grad.stride[0];
    Vec total[kMaxRows / kLanes], summed[kMaxRows / kLanes];
    for (Vec& each : total) each = zero();
    for (Vec& each : summed) each = zero();
    for (int64_t k = 0; k < words; ++k) {
      const T* sources[kElements] = {};
      for (int e = 0; e < kElements; ++e) {
        const int64_t i = (first + k) * kElements + e;
        if (i < tokens) sources[e] = p_.grad.as<const T>() + i * step + n;
      }
      const bool enough = k % kSummed == kSummed - 1 || k + 1 == words;
      for (int64_t j = 0; j < rows; j += kLanes) {
        Words<Dot>::store(to + k * kMaxRows + j, Words<Dot>::load_rows(sources, j));
        if (!sums) continue;
        Vec& sum = summed[j / kLanes];
        for (const T* source : sources) {
          if (source) sum = add(sum, load(source + j));
        }
        if (enough) total[j / kLanes] = add(total[j / kLanes], sum), sum = zero();
      }
    }
    for (int64_t j = 0; sums && j < rows; j += kLanes) {
      const Vec sum = total[j / kLanes];
      store(sums + j, more ? add(load(sums + j), sum) : sum);
    }
  }

  // body(first row, rows, group of panels, scratch) for all of C.
  template <typename Body>
  CLIPVIP_INLINE void each_task(const Body& body) const {
    parallel_for(rows_.count * groups_.count, p_.threads, [&](int64_t task, int thread) {
      const int64_t block = task / groups_.count, group = task % groups_.count;
      body(rows_.begin(block), rows_.length(block), group, scratch(thread));
    });
  }

  // emit(row, column, C there) for all of C; row(i, line, whether this is the first group of panels
  // to ask for it) gives the floats of A's row.
  template <typename Row, typename Emit>
  CLIPVIP_INLINE void multiply(const Row& row, const Emit& emit) const {
    each_task([&](int64_t first, int64_t rows, int64_t group, const Scratch& s) {
      for (int64_t i = 0; i < rows; ++i) {
        const float* line = row(first + i, s.line[0], group == 0);
        copy_rows<Dot>(s.a + i * a_step_, a_step_, [&](int64_t) { return line; }, 1, 1, words_);
      }
      walk(Operand<Dot>{s.a, a_step_, 1}, words_, rows, group, s,
           [&](int64_t i, int64_t n, Vec value) { emit(first + i, n, value); });
    });
  }

  // emit(row of the block, column, C there) for a block of A and a group of panels.
  template <typename Emit>
  CLIPVIP_INLINE void walk(Operand<Dot> a, int64_t words, int64_t rows, int64_t group,
                           const Scratch& s, const Emit& emit) const {
    const Parts slices(words, kMaxSlice, 1);
    const int64_t begin = groups_.begin(group), end = begin + groups_.length(group);
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t slice = 0; slice < slices.count; ++slice) {
        const int64_t k = slices.begin(slice);
        const bool last = slice + 1 == slices.count;
        gemm<Dot>(rows, kMaxPanelVectors, slices.length(slice),
                  Operand<Dot>{a.data + k * a.k_step, a.row_step, a.k_step},
                  b_ + (panel * words + k) * kPanel, [&](int64_t i, int64_t, const auto& acc) {
                    each_vector(acc, rows - i, [&](int r, int c, Vec value) {
                      float* sum = s.c + (i + r) * kPanel + c * kLanes;
                      if (slice > 0) value = add(value, load(sum));
                      if (last) {
                        emit(i + r, panel * kPanel + c * kLanes, value);
                      } else {
                        store(sum, value);
                      }
                    });
                  });
      }
    }
  }

  template <int MR, int NV, typename Body>
  static CLIPVIP_INLINE void each_vector(const Vec (&acc)[MR][NV], int64_t rows, const Body& body) {
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      if (r >= rows) return;
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) body(r, c, acc[r][c]);
    }
  }

  const LinearParams& p_;
  const int64_t columns_, words_;
  const Parts rows_, parts_, groups_;  // of C's rows, of the inner dimension, of C's panels
  const int64_t a_step_;
  Arena arena_;
  Word* b_ = nullptr;
  int64_t scratch_begin_ = 0, scratch_size_ = 0, staged_ = 0, line_ = 0;
};

template <typename Work>
int64_t dispatch(const LinearParams& p, int64_t rows, int64_t columns, int64_t inner, bool whole,
                 const Work& work) {
  const auto run = [&](auto linear) -> int64_t {
    if (!p.workspace) return linear.workspace_bytes();
    work(linear);
    return 0;
  };
#if defined(__AVX512BF16__)
  if (p.operands == DType::bfloat16) return run(Linear<Bf16Dot>(p, rows, columns, inner, whole));
#endif
  return run(Linear<Fp32Dot>(p, rows, columns, inner, whole));
}

}  // namespace

int64_t linear_forward(const LinearParams& p) {
  return dispatch(p, p.x.size[0], p.weight.size[0], p.x.size[1], true,
                  [](const auto& linear) { linear.forward(); });
}

int64_t linear_grad_input(const LinearParams& p) {
  return dispatch(p, p.grad.size[0], p.weight.size[1], p.grad.size[1], true,
                  [](const auto& linear) { linear.grad_input(); });
}

int64_t linear_grad_weight(const LinearParams& p) {
  return dispatch(p, p.grad.size[1], p.x.size[1], p.grad.size[0], false,
                  [](const auto& linear) { linear.grad_weight(); });
}

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
