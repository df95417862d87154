// Row and column log-sum-exps of scale·a·bᵀ, and their gradients, tile by tile.
//
// The matrix is cut into tiles whose logits stay in a core's cache. Forward reduces each tile to
// (maximum, sum) per row and column and merges those into running ones. Backward computes the tile
// again, turns it into the gradient of the logits in place, and adds its two products with b and a.
//
// Tiles run in a fixed wavefront order: tiles of one wave share no row block and no column block,
// and a tile waits for the one before it in its row block and in its column block. So whatever the
// number of threads, nothing is added concurrently and sums have one order.
#include <sched.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "common/arena.h"
#include "common/gemm.h"
#include "common/parallel.h"
#include "pairwise_logsumexp/params.h"

namespace clipvip {
namespace CLIPVIP_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest(), kHighest = -kLowest;

// One exp serves a row sum and a column sum if no maximum is further than this below the common
// reference; and both gradients, if the log-sum-exps span no more. With 60, terms that underflow
// (at e^-87) are less than e^-27 of any sum, and nothing overflows. Terms are then exact to 60 ulp
// only, which suffices for logits of bf16 or fp16 features.
template <typename T>
constexpr float kReach = sizeof(T) == 4 ? 8.f : 60.f;

constexpr int64_t kMaxRows = 384, kMaxColumns = 384;

// One side of the matrix, cut into equal blocks; a function of its length alone.
struct Blocks {
  int64_t length, size, count;

  Blocks(int64_t length, int64_t unit, int64_t largest) : length(length) {
    const int64_t quarter = round_up((length + 3) / 4, unit), limit = largest / unit * unit;
    const int64_t wanted = quarter > limit ? limit : quarter < unit ? unit : quarter;
    count = (length + wanted - 1) / wanted;
    size = count ? round_up((length + count - 1) / count, unit) : unit;
    count = (length + size - 1) / size;
  }
  int64_t begin(int64_t block) const { return block * size; }
  int64_t rows(int64_t block) const {
    return length - begin(block) < size ? length - begin(block) : size;
  }
};

// Runs body(row_block, column_block, worker) on every tile, in the order described above.
class Wavefront {
 public:
  Wavefront(int64_t row_blocks, int64_t column_blocks, Arena& arena)
      : by_row_(row_blocks <= column_blocks),
        narrow_(by_row_ ? row_blocks : column_blocks),
        wide_(by_row_ ? column_blocks : row_blocks),
        done_(arena.take<uint8_t>(narrow_ * wide_)) {}

  template <typename Body>
  void run(int threads, const Body& body) {
    const int64_t tiles = narrow_ * wide_;
    std::memset(done_, 0, size_t(tiles));
    int64_t next = 0;
    parallel_for(threads, threads, [&](int64_t worker, int) {
      for (;;) {
        // Tiles are claimed in order, so a running thread has claimed each tile that is waited for.
        const int64_t tile = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        if (tile >= tiles) return;
        const int64_t wave = tile / narrow_, x = tile % narrow_, y = (x + wave) % wide_;
        if (wave > 0) wait(x, (y + wide_ - 1) % wide_);
        if (x + 1 < narrow_ ? wave > 0 : y < x) wait(x + 1 < narrow_ ? x + 1 : 0, y);
        body(by_row_ ? x : y, by_row_ ? y : x, worker);
        __atomic_store_n(&done_[x * wide_ + y], uint8_t(1), __ATOMIC_RELEASE);
      }
    });
  }

 private:
  void wait(int64_t x, int64_t y) const {
    while (!__atomic_load_n(&done_[x * wide_ + y], __ATOMIC_ACQUIRE)) sched_yield();
  }

  bool by_row_;
  int64_t narrow_, wide_;
  uint8_t* done_;
};

// Rows of T as rows of words, with zeros up to a whole number of vectors.
template <typename Dot, typename T>
void stage(typename Dot::Word* to, int64_t row_step, const Tensor& tensor, int64_t first,
           int64_t rows, int64_t padded_rows) {
  const int64_t depth = tensor.size[1];
  std::memset(to, 0, size_t(padded_rows * row_step) * sizeof(typename Dot::Word));
  const T* from = tensor.as<const T>() + first * tensor.stride[0];
  for (int64_t i = 0; i < rows; ++i, from += tensor.stride[0], to += row_step) {
    if constexpr (Dot::kElements == 1) {
      for (int64_t k = 0; k < depth; k += kLanes) {
        store_first(to + k, load_first(from + k, depth - k), depth - k);
      }
    } else {
      std::memcpy(to, from, size_t(depth) * sizeof(T));
    }
  }
}

template <typename T, int Elements>
struct ElementOf {
  using type = T;  // pairs of bf16 keep their type
};
template <typename T>
struct ElementOf<T, 1> {
  using type = float;
};

// Adds a tile to rows of exactly `columns` floats, of which there are `rows`.
struct AddWithin {
  float* c;
  int64_t rows, columns;

  template <int MR, int NV>
  CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
    float* to = c + i * columns + v * kLanes;
    const int64_t width = columns - v * kLanes;
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      if (i + r >= rows) return;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* p = to + r * columns + j * kLanes;
        const int64_t n = width - j * kLanes;
        if (n >= kLanes) {
          store(p, add(load(p), acc[r][j]));
        } else if (n > 0) {
          store_first(p, add(load_first(p, n), acc[r][j]), n);
        }
      }
    }
  }
};

// Running log-sum-exps of rows or of columns, as maximum and Σ exp(x − maximum). Maxima are always
// finite (kLowest before any value); infinities and NaN show in the sum only.
struct Running {
  float* maximum;
  float* sum;

  void clear(int64_t n) const {
    for (int64_t i = 0; i < n; ++i) maximum[i] = kLowest, sum[i] = 0;
  }
  // sums are relative to `reference`, or each to its own maximum where there is none.
  void merge(int64_t n, const float* maxima, const float* sums, const float* reference) const {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec old = load_first(maximum + i, n - i), tile = load_first(maxima + i, n - i);
      const Vec both = max(old, tile);
      // The reference is less than 100 above any maximum but kLowest, which stays.
      const Vec relative =
          reference ? min(broadcast(*reference), add(tile, broadcast(100.f))) : tile;
      const Vec kept = mul(load_first(sum + i, n - i), exp(sub(old, both)));
      const Vec added = mul(load_first(sums + i, n - i), exp(sub(relative, both)));
      store_first(maximum + i, both, n - i);
      store_first(sum + i, add(kept, added), n - i);
    }
  }
  void finish(int64_t n) const {  // leaves the log-sum-exp in `maximum`
    for (int64_t i = 0; i < n; ++i) {
      maximum[i] = sum[i] == 0 ? -kInfinity : maximum[i] + __builtin_logf(sum[i]);
    }
  }
};

template <typename Dot, typename T>
class Core {
 public:
  using Word = typename Dot::Word;
  using Element = typename ElementOf<T, Dot::kElements>::type;

  Core(const PairwiseLogsumexpParams& params, bool backward)
      : p_(params),
        backward_(backward),
        depth_(round_up(params.a.size[1], kLanes * Dot::kElements)),
        words_(depth_ / Dot::kElements),
        row_step_(words_ + 16),  // rows a power of two apart would share a few cache sets
        rows_(params.a.size[0], kRowPadding, kMaxRows),
        columns_(params.b.size[0], kMaxPanelVectors * kLanes, kMaxColumns),
        logits_step_(columns_.size + 16),
        arena_(params.workspace),
        wavefront_(rows_.count, columns_.count, arena_) {
    // kRowPadding rows more, for the whole tiles that gemm reads and writes.
    a_rows_ = arena_.take<Word>((rows_.count * rows_.size + kRowPadding) * row_step_);
    b_transposed_ = arena_.take<Word>(columns_.count * columns_.size * words_);
    if (backward) {
      a_packed_ = arena_.take<Word>(rows_.count * rows_.size * words_);
      b_packed_ = arena_.take<Word>(columns_.count * columns_.size * words_);
      partial_ = arena_.take<double>(rows_.count);
    } else {
      row_sum_ = arena_.take<float>(rows_.length);
      col_sum_ = arena_.take<float>(columns_.length);
    }
    scratch_begin_ = arena_.used();
    scratch(0, arena_);
    scratch_size_ = arena_.used() - scratch_begin_;
  }

  int64_t workspace_bytes() const { return scratch_begin_ + p_.threads * scratch_size_; }

  void forward() {
    pack();
    const Running row{p_.row_lse, row_sum_}, col{p_.col_lse, col_sum_};
    row.clear(rows_.length);
    col.clear(columns_.length);
    for (int64_t i = 0; i < rows_.length; ++i) p_.positive[i] = -kInfinity;
    wavefront_.run(p_.threads, [&](int64_t r, int64_t c, int64_t worker) {
      const Scratch s = scratch(worker);
      const Tile tile = compute_products(r, c, s);
      reduce(tile, s, row, col);
    });
    row.finish(rows_.length);
    col.finish(columns_.length);
  }

  void backward() {
    pack();
    for (int64_t r = 0; r < rows_.count; ++r) partial_[r] = 0;
    wavefront_.run(p_.threads, [&](int64_t r, int64_t c, int64_t worker) {
      const Scratch s = scratch(worker);
      const Tile tile = compute_products(r, c, s);
      differentiate(tile, s);
      multiply_gradient(tile, s);
    });
    double total = 0;
    for (int64_t r = 0; r < rows_.count; ++r) total += partial_[r];
    *p_.grad_scale = float(total);
  }

 private:
  struct Scratch {
    float* logits;  // [rows_.size + kRowPadding][logits_step_]
    Word* by_row;   // bf16 gradient of the logits, pairs along a row: [rows][logits_step_]
    Word* by_pair;  // and pairs along a column: [rows / 2][logits_step_]
    float* row[3];  // vectors over the tile's rows and columns
    float* col[3];
  };

  struct Tile {
    int64_t r, c, i, j, rows, columns, vectors;
    int64_t diagonal;  // the positive of the tile's row k is in its column k + diagonal
  };

  Scratch scratch(int64_t worker) const {
    Arena arena(static_cast<char*>(p_.workspace) + scratch_begin_ + worker * scratch_size_);
    return scratch(worker, arena);
  }
  Scratch scratch(int64_t, Arena& arena) const {
    Scratch s{};
    const int64_t rows = rows_.size + kRowPadding;
    // Packing stages a block of columns here.
    const int64_t staged = columns_.size * row_step_, logits = rows * logits_step_;
    s.logits = arena.take<float>(staged > logits ? staged : logits);
    if (backward_ && Dot::kElements == 2) {
      s.by_row = arena.take<Word>(rows * logits_step_);
      s.by_pair = arena.take<Word>(rows / 2 * logits_step_);
    }
    for (float*& each : s.row) each = arena.take<float>(rows + kLanes);
    for (float*& each : s.col) each = arena.take<float>(columns_.size + kLanes);
    return s;
  }

  void pack() {
    parallel_for(rows_.count + columns_.count, p_.threads, [&](int64_t block, int thread) {
      const bool is_row = block < rows_.count;
      if (!is_row) block -= rows_.count;
      const Blocks& side = is_row ? rows_ : columns_;
      const int64_t rows = side.rows(block);
      Word* staged = is_row ? a_rows_ + side.begin(block) * row_step_
                            : reinterpret_cast<Word*>(scratch(thread).logits);
      const bool last = is_row && block + 1 == rows_.count;
      stage<Dot, T>(staged, row_step_, is_row ? p_.a : p_.b, side.begin(block), rows,
                    side.size + (last ? kRowPadding : 0));
      const auto row = [&](int64_t i) {
        return reinterpret_cast<const Element*>(staged + i * row_step_);
      };
      if (!is_row) {
        pack_transposed<Dot>(b_transposed_ + side.begin(block) * words_, row, rows, words_,
                             (rows + kLanes - 1) / kLanes);
      }
      if (backward_) {
        Word* packed = is_row ? a_packed_ : b_packed_;
        pack_rows<Dot>(packed + side.begin(block) * words_, row, rows, depth_);
      }
    });
  }

  // a·bᵀ of a tile.
  Tile compute_products(int64_t r, int64_t c, const Scratch& s) const {
    Tile t{r, c, rows_.begin(r), columns_.begin(c), rows_.rows(r), columns_.rows(c), 0, 0};
    t.vectors = (t.columns + kLanes - 1) / kLanes;
    t.diagonal = t.i + p_.diagonal - t.j;
    gemm<Dot>(t.rows, t.vectors, words_, Operand<Dot>{a_rows_ + t.i * row_step_, row_step_, 1},
              b_transposed_ + t.j * words_, StoreTile{s.logits, logits_step_});
    return t;
  }

  static bool has_positive(const Tile& t, int64_t i) {
    return i + t.diagonal >= 0 && i + t.diagonal < t.columns;
  }

  void reduce(const Tile& t, const Scratch& s, const Running& row, const Running& col) const {
    float *row_max = s.row[0], *row_sum = s.row[1], *col_max = s.col[0], *col_sum = s.col[1];
    const Vec masked = broadcast(-kInfinity), scale = broadcast(*p_.scale);
    for (int64_t v = 0; v < t.vectors; ++v) {
      store(col_max + v * kLanes, masked);
      store(col_sum + v * kLanes, zero());
    }
    for (int64_t i = 0; i < t.rows; ++i) {
      float* x = s.logits + i * logits_step_;
      for (int64_t v = 0; v < t.vectors; ++v) {
        store(x + v * kLanes, mul(scale, load(x + v * kLanes)));
      }
      if (has_positive(t, i)) {
        p_.positive[t.i + i] = x[i + t.diagonal];
        x[i + t.diagonal] = -kInfinity;
      }
      float* tail = x + (t.vectors - 1) * kLanes;
      store(tail, first(t.columns - (t.vectors - 1) * kLanes, load(tail), masked));
      Vec largest = masked;
      for (int64_t v = 0; v < t.vectors; ++v) {
        const Vec logits = load(x + v * kLanes);
        largest = max(logits, largest);
        store(col_max + v * kLanes, max(logits, load(col_max + v * kLanes)));
      }
      row_max[i] = reduce_max(largest);
    }

    float largest = -kInfinity, smallest = kInfinity;
    for (int64_t i = 0; i < t.rows; ++i) include(row_max[i], smallest, largest);
    for (int64_t j = 0; j < t.columns; ++j) include(col_max[j], smallest, largest);
    // Not with only a positive, NaN or infinities.
    const bool shared = smallest <= largest && largest - smallest <= kReach<T>;
    make_finite(row_max, t.rows);
    make_finite(col_max, t.columns);
    for (int64_t i = 0; i < t.rows; ++i) {
      const float* x = s.logits + i * logits_step_;
      const Vec base = broadcast(shared ? largest : row_max[i]);
      Vec sum = zero();
      for (int64_t v = 0; v < t.vectors; ++v) {
        const Vec logits = load(x + v * kLanes), term = exp(sub(logits, base));
        sum = add(sum, term);
        const Vec own = shared ? term : exp(sub(logits, load(col_max + v * kLanes)));
        store(col_sum + v * kLanes, add(load(col_sum + v * kLanes), own));
      }
      row_sum[i] = reduce_add(sum);
    }
    const float* reference = shared ? &largest : nullptr;
    merge(row, t.i, t.rows, row_max, row_sum, reference);
    merge(col, t.j, t.columns, col_max, col_sum, reference);
  }

  static void include(float x, float& smallest, float& largest) {
    if (x == -kInfinity) return;
    if (x < smallest) smallest = x;
    if (x > largest) largest = x;
  }

  static void make_finite(float* maxima, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store(maxima + i, max(broadcast(kLowest), min(broadcast(kHighest), load(maxima + i))));
    }
  }

  static void merge(const Running& all, int64_t begin, int64_t n, const float* maxima,
                    const float* sums, const float* reference) {
    Running{all.maximum + begin, all.sum + begin}.merge(n, maxima, sums, reference);
  }

  // dlogit = grad_row·exp(logit − row_lse) + grad_col·exp(logit − col_lse), on the positive
  // grad_positive instead; in place of the logits, or as bf16 beside them.
  void differentiate(const Tile& t, const Scratch& s) const {
    const float *row_lse = p_.row_lse + t.i, *col_lse = p_.col_lse + t.j;
    float smallest = kInfinity, largest = -kInfinity;
    for (int64_t i = 0; i < t.rows; ++i) include(row_lse[i], smallest, largest);
    for (int64_t j = 0; j < t.columns; ++j) include(col_lse[j], smallest, largest);
    const bool shared = largest - smallest <= kReach<T>;
    // dlogit = (row_weight + col_weight)·exp(logit − smallest), or each weight with its own exp.
    const float reference = shared ? smallest : 0;
    weigh(t.rows, row_lse, p_.grad_row_lse + t.i, shared, reference, s.row[0], s.row[1]);
    weigh(t.columns, col_lse, p_.grad_col_lse + t.j, shared, reference, s.col[0], s.col[1]);
    // A row or column without any other entry has no gradient, whatever the incoming one is.
    if (columns_.length == 1) forget(-t.diagonal, t.rows, s.row[0], s.row[1]);
    if (rows_.length == 1) forget(t.diagonal, t.columns, s.col[0], s.col[1]);
    const Vec scale = broadcast(*p_.scale);
    double grad_scale = 0;
    for (int64_t i = 0; i < t.rows; ++i) {
      float* x = s.logits + i * logits_step_;
      const Vec row_base = broadcast(shared ? reference : s.row[0][i]);
      const Vec row_weight = broadcast(s.row[1][i]);
      const float positive = has_positive(t, i) ? x[i + t.diagonal] : 0;
      if (has_positive(t, i)) x[i + t.diagonal] = 0;
      clear_tail(t, x);  // infinity times the zeros that pad b is NaN
      Vec sum = zero();
      for (int64_t v = 0; v < t.vectors; ++v) {
        const Vec product = load(x + v * kLanes), col_weight = load(s.col[1] + v * kLanes);
        const Vec logits = mul(scale, product), term = exp_finite(sub(logits, row_base));
        Vec grad = mul(add(row_weight, col_weight), term);
        if (!shared) {
          const Vec own = exp_finite(sub(logits, load(s.col[0] + v * kLanes)));
          grad = fma(row_weight, term, mul(col_weight, own));
        }
        sum = fma(grad, product, sum);
        store(x + v * kLanes, mul(scale, grad));
      }
      clear_tail(t, x);
      grad_scale += reduce_add(sum);
      if (has_positive(t, i)) {
        const float grad = p_.grad_positive[t.i + i];
        grad_scale += double(grad) * positive;
        x[i + t.diagonal] = *p_.scale * grad;
      }
    }
    partial_[t.r] += grad_scale;
    narrow_gradient(t, s);
  }

  // Entries that count have x ≤ kReach; the others, whose product is 0, must stay finite.
  static CLIPVIP_INLINE Vec exp_finite(Vec x) { return exp(min(broadcast(80.f), x)); }

  static CLIPVIP_INLINE void clear_tail(const Tile& t, float* row) {
    float* tail = row + (t.vectors - 1) * kLanes;
    store(tail, first(t.columns - (t.vectors - 1) * kLanes, load(tail), zero()));
  }

  // Sets the gradient at `place` to 0, if that is one of n.
  static void forget(int64_t place, int64_t n, float* base, float* weight) {
    if (place >= 0 && place < n) base[place] = kInfinity, weight[place] = 0;
  }

  static void weigh(int64_t n, const float* lse, const float* grad, bool shared, float reference,
                    float* base, float* weight) {
    for (int64_t i = 0; i < n; i += kLanes) {
      store(base + i, load_first(lse + i, n - i));
      store(weight + i, load_first(grad + i, n - i));
      if (shared) {
        store(weight + i, mul(load(weight + i), exp(sub(broadcast(reference), load(base + i)))));
      }
    }
    for (int64_t i = n; i < round_up(n, kLanes); ++i) base[i] = kInfinity, weight[i] = 0;
  }

  void narrow_gradient(const Tile& t, const Scratch& s) const {
#if defined(__AVX512BF16__)
    if constexpr (Dot::kElements == 2) {
      for (int64_t i = 0; i < t.rows; i += 2) {
        const float* x = s.logits + i * logits_step_;
        for (int64_t v = 0; v < t.vectors; ++v) {
          const __m256i low = narrow(load(x + v * kLanes));
          const __m256i high = i + 1 < t.rows ? narrow(load(x + logits_step_ + v * kLanes))
                                              : _mm256_setzero_si256();
          uint32_t* by_row = s.by_row + i * logits_step_ + v * (kLanes / 2);
          _mm256_storeu_si256((__m256i*)by_row, low);
          _mm256_storeu_si256((__m256i*)(by_row + logits_step_), high);
          _mm512_storeu_si512(s.by_pair + i / 2 * logits_step_ + v * kLanes,
                              _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                              _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
        }
      }
    }
#else
    (void)t, (void)s;
#endif
  }

  void multiply_gradient(const Tile& t, const Scratch& s) const {
    const int64_t depth = p_.a.size[1];
    Operand<Dot> by_row{}, by_column{};
    if constexpr (Dot::kElements == 1) {
      by_row = {s.logits, logits_step_, 1};
      by_column = {s.logits, 1, logits_step_};
    } else {
      by_row = {s.by_row, logits_step_, 1};
      by_column = {s.by_pair, 1, logits_step_};
    }
    gemm<Dot>(t.rows, depth_ / kLanes, words(t.columns), by_row, b_packed_ + t.j * words_,
              AddWithin{p_.grad_a + t.i * depth, t.rows, depth});
    gemm<Dot>(t.columns, depth_ / kLanes, words(t.rows), by_column, a_packed_ + t.i * words_,
              AddWithin{p_.grad_b + t.j * depth, t.columns, depth});
  }

  static int64_t words(int64_t elements) {
    return (elements + Dot::kElements - 1) / Dot::kElements;
  }

  const PairwiseLogsumexpParams& p_;
  const bool backward_;
  const int64_t depth_, words_, row_step_;
  const Blocks rows_, columns_;
  const int64_t logits_step_;
  Arena arena_;
  Wavefront wavefront_;
  Word *a_rows_ = nullptr, *b_transposed_ = nullptr, *a_packed_ = nullptr, *b_packed_ = nullptr;
  double* partial_ = nullptr;
  float *row_sum_ = nullptr, *col_sum_ = nullptr;
  int64_t scratch_begin_ = 0, scratch_size_ = 0;
};

template <typename Dot, typename T>
int64_t run(const PairwiseLogsumexpParams& params, bool backward) {
  Core<Dot, T> core(params, backward);
  if (!params.workspace) return core.workspace_bytes();
  if (backward) {
    core.backward();
  } else {
    core.forward();
  }
  return 0;
}

int64_t dispatch(const PairwiseLogsumexpParams& params, bool backward) {
  switch (params.a.dtype) {
    case DType::bfloat16:
#if defined(__AVX512BF16__)
      return run<Bf16Dot, bfloat16>(params, backward);
#else
      return run<Fp32Dot, bfloat16>(params, backward);
#endif
    case DType::float16:
      return run<Fp32Dot, float16>(params, backward);
    default:
      return run<Fp32Dot, float>(params, backward);
  }
}

}  // namespace

int64_t pairwise_logsumexp_forward(const PairwiseLogsumexpParams& params) {
  return dispatch(params, false);
}
int64_t pairwise_logsumexp_backward(const PairwiseLogsumexpParams& params) {
  return dispatch(params, true);
}

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
