// Matrix products C = A·B on blocks that lie in cache: register-blocked micro-kernels and the
// packing they need.
//
// The unit of the inner dimension k is a *word* of 4 bytes: one float (Fp32Dot), or two
// neighbouring bf16 (Bf16Dot, where there is AVX512-BF16), multiplied and summed in fp32. Both use
// the same code and the same layouts:
//
//   A  any matrix of words: A(i, k) at a[i·row_step + k·k_step]. Each word is broadcast, so A needs
//      no packing: rows in place, or transposed, or the output of another product.
//   B  packed: columns in groups of `vectors` × kLanes, cut into panels of at most
//      kMaxPanelVectors vectors (for_each_panel); the panel that starts at vector v begins at
//      b + v·kLanes·k_words and holds, for each k, its vectors side by side.
//      pack_rows: B(k, n) = source[k][n]. pack_transposed: B(k, n) = source[n][k].
//   C  fp32. gemm hands each finished tile, still in registers, to an epilogue
//        epilogue(i, v, acc)     acc[r][c] is row i + r, vector v + c of C
//      of which StoreTile and AddTile are the simplest.
//
// gemm computes whole tiles: rows are rounded up to at most kRowPadding, so A must be readable
// there (its values matter only to those rows) and C writable. Word count of a packed B:
// packed_words(k_words, vectors).
//
//   pack_transposed<Dot>(b, [&](int64_t n) { return y + n * D; }, m, D / Dot::kElements, vectors);
//   gemm<Dot>(rows, vectors, k_words, Operand<Dot>{x, D, 1}, b, StoreTile{c, ldc});
//
// Sources are given as functions from a row's index to its first element (T*), so that rows may
// come from several places.
#pragma once

#include "common/simd.h"

namespace clipvip {
namespace CLIPVIP_ISA {

template <int N>
struct Constant {
  static constexpr int value = N;
};

#if defined(__AVX512F__)
constexpr int kMaxPanelVectors = 4;  // 24 accumulators in 32 registers
constexpr int tile_rows(int vectors) { return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int kMaxPanelVectors = 2;  // 12 accumulators in 16 registers
constexpr int tile_rows(int vectors) { return vectors == 2 ? 6 : 12; }
#else
constexpr int kMaxPanelVectors = 2;
constexpr int tile_rows(int) { return 4; }
#endif
constexpr int kRowPadding = 24;  // a multiple of every tile_rows

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t packed_words(int64_t k_words, int64_t vectors) {
  return k_words * vectors * kLanes;
}

struct Fp32Dot {
  using Word = float;
  static constexpr int kElements = 1;
  static CLIPVIP_INLINE Vec step(Vec acc, const float* a, Vec b) {
    return fma(broadcast(*a), b, acc);
  }
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
  using Word = uint32_t;
  static constexpr int kElements = 2;
  static CLIPVIP_INLINE Vec step(Vec acc, const uint32_t* a, Vec b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(int(*a)), (__m512bh)b);
  }
};
#endif

CLIPVIP_INLINE Vec load_words(const float* p) { return load(p); }
CLIPVIP_INLINE Vec load_words(const uint32_t* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename Dot>
struct Operand {
  const typename Dot::Word* data;
  int64_t row_step;
  int64_t k_step;
};

// acc += A·B for one tile: MR rows of A, one panel of NV vectors of B.
template <typename Dot, int MR, int NV>
CLIPVIP_INLINE void multiply_tile(Vec (&acc)[MR][NV], int64_t k_words, Operand<Dot> a,
                                  const typename Dot::Word* b) {
  for (int64_t k = 0; k < k_words; ++k) {
    Vec column[NV];
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) column[c] = load_words(b + c * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) {
        acc[r][c] = Dot::step(acc[r][c], a.data + r * a.row_step, column[c]);
      }
    }
    a.data += a.k_step;
    b += NV * kLanes;
  }
}

// Calls body(v, Constant<NV>) for every panel of a matrix of `vectors` vectors: as few and as equal
// panels as possible, the wider ones first.
template <typename Body>
CLIPVIP_INLINE void for_each_panel(int64_t vectors, const Body& body) {
  const int64_t panels = (vectors + kMaxPanelVectors - 1) / kMaxPanelVectors;
  for (int64_t panel = 0, v = 0; panel < panels; ++panel) {
    const int64_t width = vectors / panels + (panel < vectors % panels);
    switch (width) {
      case 1: body(v, Constant<1>()); break;
      case 2: body(v, Constant<2>()); break;
#if defined(__AVX512F__)
      case 3: body(v, Constant<3>()); break;
      case 4: body(v, Constant<4>()); break;
#endif
    }
    v += width;
  }
}

template <typename Dot, typename Epilogue>
__attribute__((noinline)) void gemm(int64_t rows, int64_t vectors, int64_t k_words, Operand<Dot> a,
                         const typename Dot::Word* b, const Epilogue& epilogue) {
  for_each_panel(vectors, [&](int64_t v, auto width) {
    constexpr int NV = decltype(width)::value, MR = tile_rows(NV);
    const typename Dot::Word* panel = b + packed_words(k_words, v);
    for (int64_t i = 0; i < rows; i += MR) {
      Vec acc[MR][NV];
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) acc[r][c] = zero();
      }
      multiply_tile<Dot>(acc, k_words, {a.data + i * a.row_step, a.row_step, a.k_step}, panel);
      epilogue(i, v, acc);
    }
  });
}

struct StoreTile {
  float* c;
  int64_t row_step;

  template <int MR, int NV>
  CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
    float* to = c + i * row_step + v * kLanes;
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(to + r * row_step + j * kLanes, acc[r][j]);
    }
  }
};

struct AddTile {
  float* c;
  int64_t row_step;

  template <int MR, int NV>
  CLIPVIP_INLINE void operator()(int64_t i, int64_t v, const Vec (&acc)[MR][NV]) const {
    float* to = c + i * row_step + v * kLanes;
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* p = to + r * row_step + j * kLanes;
        store(p, add(load(p), acc[r][j]));
      }
    }
  }
};

// C = A·B, or C += A·B.
template <typename Dot>
CLIPVIP_INLINE void gemm_into(int64_t rows, int64_t vectors, int64_t k_words, Operand<Dot> a,
                              const typename Dot::Word* b, float* c, int64_t row_step, bool add) {
  if (add) {
    gemm<Dot>(rows, vectors, k_words, a, b, AddTile{c, row_step});
  } else {
    gemm<Dot>(rows, vectors, k_words, a, b, StoreTile{c, row_step});
  }
}

// Words of a row of elements of type T: floats converted from any T; or pairs of bf16, as they are or
// rounded from floats.
template <typename Dot>
struct Words;

template <>
struct Words<Fp32Dot> {
  template <typename T>
  static CLIPVIP_INLINE Vec load_first(const T* row, int64_t word, int64_t n) {
    return n >= kLanes ? load(row + word) : CLIPVIP_ISA::load_first(row + word, n);
  }
  // B's row k from source row k, lanes [n, n + kLanes), of which `left` are there.
  template <typename T>
  static CLIPVIP_INLINE Vec load_rows(const T* const (&rows)[1], int64_t n,
                                      int64_t left = kLanes) {
    return load_first(rows[0], n, left);
  }
  static CLIPVIP_INLINE void store_first(float* to, Vec words, int64_t n) {
    CLIPVIP_ISA::store_first(to, words, n);
  }
  static CLIPVIP_INLINE void store(float* to, Vec words) { CLIPVIP_ISA::store(to, words); }
};

#if defined(__AVX512BF16__)
template <>
struct Words<Bf16Dot> {
  static CLIPVIP_INLINE Vec load_first(const bfloat16* row, int64_t word, int64_t n) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(first_lanes(n), row + word * 2));
  }
  static CLIPVIP_INLINE Vec load_first(const float* row, int64_t word, int64_t n) {
    const int64_t second = 2 * n < kLanes ? 0 : 2 * n - kLanes;
    const Vec low = CLIPVIP_ISA::load_first(row + word * 2, 2 * n);
    const Vec high = CLIPVIP_ISA::load_first(row + word * 2 + kLanes, second);
    return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  // Source rows 2k and 2k + 1 (the second may be missing), interleaved.
  template <typename T>
  static CLIPVIP_INLINE Vec load_rows(const T* const (&rows)[2], int64_t n,
                                      int64_t left = kLanes) {
    const __m512i low = _mm512_cvtepu16_epi32(bf16_lanes(rows[0] + n, left));
    if (!rows[1]) return _mm512_castsi512_ps(low);
    const __m512i high = _mm512_cvtepu16_epi32(bf16_lanes(rows[1] + n, left));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static CLIPVIP_INLINE void store_first(uint32_t* to, Vec words, int64_t n) {
    _mm512_mask_storeu_epi32(to, first_lanes(n), _mm512_castps_si512(words));
  }
  static CLIPVIP_INLINE void store(uint32_t* to, Vec words) {
    _mm512_storeu_si512(to, _mm512_castps_si512(words));
  }

 private:
  // Lanes [0, n) as bf16, the others 0.
  static CLIPVIP_INLINE __m256i bf16_lanes(const bfloat16* p, int64_t n) {
    return n >= kLanes ? _mm256_loadu_si256((const __m256i*)p)
                       : _mm256_maskz_loadu_epi16(first_lanes(n), p);
  }
  static CLIPVIP_INLINE __m256i bf16_lanes(const float* p, int64_t n) {
    return narrow(n >= kLanes ? load(p) : CLIPVIP_ISA::load_first(p, n));
  }
};
#endif

// A(i, k) = row(i)[k], stored at to[i·row_step + k]; zeros in rows [rows, padded_rows).
template <typename Dot, typename Row>
CLIPVIP_INLINE void copy_rows(typename Dot::Word* to, int64_t row_step, const Row& row,
                              int64_t rows, int64_t padded_rows, int64_t k_words) {
  for (int64_t i = 0; i < rows; ++i) {
    const auto* from = row(i);
    for (int64_t k = 0; k < k_words; k += kLanes) {
      const int64_t n = k_words - k;
      const Vec words = Words<Dot>::load_first(from, k, n);
      if (n >= kLanes) {
        Words<Dot>::store(to + i * row_step + k, words);
      } else {
        Words<Dot>::store_first(to + i * row_step + k, words, n);
      }
    }
  }
  for (int64_t i = rows; i < padded_rows; ++i) {
    std::memset(to + i * row_step, 0, size_t(k_words) * sizeof(typename Dot::Word));
  }
}

// B(k, n) = row(n)[k] for n in [0, rows), zeros in the columns after. Reads k_words words per row.
template <typename Dot, typename Row>
CLIPVIP_INLINE void pack_transposed(typename Dot::Word* b, const Row& row, int64_t rows,
                                    int64_t k_words, int64_t vectors) {
  for_each_panel(vectors, [&](int64_t v, auto width) {
    constexpr int NV = decltype(width)::value;
    typename Dot::Word* panel = b + packed_words(k_words, v);
    for (int c = 0; c < NV; ++c) {
      const int64_t n = (v + c) * kLanes;
      for (int64_t k = 0; k < k_words; k += kLanes) {
        const int64_t depth = k_words - k < kLanes ? k_words - k : kLanes;
        Vec block[kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          block[r] = n + r < rows ? Words<Dot>::load_first(row(n + r), k, depth) : zero();
        }
        transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          if (r < depth) Words<Dot>::store(panel + ((k + r) * NV + c) * kLanes, block[r]);
        }
      }
    }
  });
}

// Whether pack_rows and copy_rows with adjacent rows give the same: for one panel of whole vectors
// of floats.
template <typename Dot>
CLIPVIP_INLINE bool packs_like_copy(int64_t columns) {
  return Dot::kElements == 1 && columns % kLanes == 0 && columns <= kMaxPanelVectors * kLanes;
}

// B(k, n) = row(k)[n] for element rows k in [0, rows) and n in [0, columns), zeros in the rest of
// the last vector. With Bf16Dot an odd last row is paired with zeros.
template <typename Dot, typename Row>
CLIPVIP_INLINE void pack_rows(typename Dot::Word* b, const Row& row, int64_t rows,
                              int64_t columns) {
  const int64_t k_words = (rows + Dot::kElements - 1) / Dot::kElements;
  for_each_panel((columns + kLanes - 1) / kLanes, [&](int64_t v, auto width) {
    constexpr int NV = decltype(width)::value;
    typename Dot::Word* panel = b + packed_words(k_words, v);
    for (int64_t k = 0; k < k_words; ++k) {
      decltype(row(0)) sources[Dot::kElements];
      for (int e = 0; e < Dot::kElements; ++e) {
        const int64_t i = k * Dot::kElements + e;
        sources[e] = i < rows ? row(i) : nullptr;
      }
#pragma GCC unroll 4
      for (int c = 0; c < NV; ++c) {
        const int64_t n = (v + c) * kLanes;
        Words<Dot>::store(panel + (k * NV + c) * kLanes,
                          Words<Dot>::load_rows(sources, n, columns - n));
      }
    }
  });
}

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
