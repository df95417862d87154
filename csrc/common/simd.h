// A vector of floats, as wide as the instruction set this file is compiled for: AVX-512, AVX2 with
// FMA and F16C, or plain C++ of four lanes that any compiler and processor accepts.
//
// Everything lives in the namespace of the instruction set (CLIPVIP_ISA) and is always inlined, so
// that no symbol compiled for one set can be linked into another.
//
//   Vec                        kLanes floats
//   bfloat16, float16          storage types; load and store convert (to nearest even)
//   uint8_t, uint16_t          the same, to be loaded; store clips to what uint8_t holds
//   load, load_first           load_first(p, n) reads lanes [0, n) only, the others are zero
//   store, store_first         store_first(p, v, n) writes lanes [0, n) only
//   stream_two(p, a, b)        stores a, then b, past the caches; p is aligned to 64 bytes.
//                              stream_fence() before anyone else reads what was written
//   fma(a, b, c)               a·b + c
//   first(n, a, b)             lanes [0, n) of a, the others of b
//   exp2                       2^x to about 1 ulp; 0 below -126, inf above 128, NaN stays NaN
//   reduce_add, reduce_max     over the lanes
//   transpose(rows)            kLanes × kLanes, in place
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers make "undefined" vectors by reading an uninitialised one.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define CLIPVIP_INLINE inline __attribute__((always_inline))

namespace clipvip {
namespace CLIPVIP_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A hint that `bytes` from p on will be read soon.
CLIPVIP_INLINE void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
  }
}

CLIPVIP_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
CLIPVIP_INLINE float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// One element at a time: tails, and the plain build.
CLIPVIP_INLINE float to_float(float x) { return x; }
CLIPVIP_INLINE float to_float(bfloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
CLIPVIP_INLINE float to_float(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the product also normalises subnormals.
  return from_bits(sign | bits_of(from_bits(magnitude << 13) * from_bits(0x77800000)));
}
CLIPVIP_INLINE float to_float(uint8_t x) { return x; }
CLIPVIP_INLINE float to_float(uint16_t x) { return x; }
CLIPVIP_INLINE void from_float(float x, uint8_t& to) {
  x = x < 255.f ? x : 255.f;
  to = uint8_t((x > 0.f ? x : 0.f) + 12582912.f - 12582912.f);  // rounded to nearest even
}
CLIPVIP_INLINE void from_float(float x, float& to) { to = x; }
CLIPVIP_INLINE void from_float(float x, bfloat16& to) {
  const uint32_t bits = bits_of(x);
  to.bits = x != x ? uint16_t(bits >> 16 | 0x40)
                   : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
CLIPVIP_INLINE void from_float(float x, float16& to) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000;
  uint32_t bits = bits_of(x) & 0x7fffffff;
  if (bits > 0x7f800000) {
    to.bits = uint16_t(sign | 0x7e00);
  } else if (bits >= 0x477ff000) {  // rounds beyond 65504
    to.bits = uint16_t(sign | 0x7c00);
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds at the right bit
    to.bits = uint16_t(sign | (bits_of(from_bits(bits) + 0.5f) - 0x3f000000));
  } else {
    to.bits = uint16_t(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
  }
}

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

CLIPVIP_INLINE __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? __mmask16(0xffff) : __mmask16((1u << n) - 1);
}
CLIPVIP_INLINE Vec zero() { return _mm512_setzero_ps(); }
CLIPVIP_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
CLIPVIP_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
CLIPVIP_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
CLIPVIP_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
CLIPVIP_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
CLIPVIP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
CLIPVIP_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
CLIPVIP_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
CLIPVIP_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
CLIPVIP_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
CLIPVIP_INLINE Vec first(int64_t n, Vec a, Vec b) {
  return _mm512_mask_blend_ps(first_lanes(n), b, a);
}

CLIPVIP_INLINE Vec widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
CLIPVIP_INLINE __m256i narrow(Vec a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a);
#else
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

CLIPVIP_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
CLIPVIP_INLINE Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
CLIPVIP_INLINE Vec load(const float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
CLIPVIP_INLINE Vec load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
CLIPVIP_INLINE Vec load(const uint16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}
CLIPVIP_INLINE Vec load_first(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
CLIPVIP_INLINE Vec load_first(const uint8_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
}
CLIPVIP_INLINE Vec load_first(const uint16_t* p, int64_t n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
}
CLIPVIP_INLINE Vec load_first(const bfloat16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
CLIPVIP_INLINE Vec load_first(const float16* p, int64_t n) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
CLIPVIP_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a); }
CLIPVIP_INLINE void store(bfloat16* p, Vec a) { _mm256_storeu_si256((__m256i*)p, narrow(a)); }
CLIPVIP_INLINE void store(float16* p, Vec a) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
CLIPVIP_INLINE __m128i to_bytes(Vec a) {
  return _mm512_cvtusepi32_epi8(_mm512_max_epi32(_mm512_cvtps_epi32(a), _mm512_setzero_si512()));
}
CLIPVIP_INLINE void store(uint8_t* p, Vec a) { _mm_storeu_si128((__m128i*)p, to_bytes(a)); }
CLIPVIP_INLINE void store_first(float* p, Vec a, int64_t n) {
  _mm512_mask_storeu_ps(p, first_lanes(n), a);
}
CLIPVIP_INLINE void store_first(uint8_t* p, Vec a, int64_t n) {
  _mm_mask_storeu_epi8(p, first_lanes(n), to_bytes(a));
}
CLIPVIP_INLINE void store_first(bfloat16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(a));
}
CLIPVIP_INLINE void store_first(float16* p, Vec a, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

CLIPVIP_INLINE void stream_two(float* p, Vec a, Vec b) {
  _mm512_stream_ps(p, a);
  _mm512_stream_ps(p + kLanes, b);
}
CLIPVIP_INLINE void stream_two(bfloat16* p, Vec a, Vec b) {
  const __m512i low = _mm512_castsi256_si512(narrow(a));
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(low, narrow(b), 1));
}
CLIPVIP_INLINE void stream_two(float16* p, Vec a, Vec b) {
  const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// The integer nearest to x; p·2^n for such an n, which is 0 for n = kZeroExponent.
constexpr float kZeroExponent = -200.f;
CLIPVIP_INLINE Vec round(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CLIPVIP_INLINE Vec times_exp2(Vec p, Vec n) { return _mm512_scalef_ps(p, n); }

CLIPVIP_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const Vec a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const Vec c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
    const Vec b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const Vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
    const Vec d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;

CLIPVIP_INLINE __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
CLIPVIP_INLINE Vec zero() { return _mm256_setzero_ps(); }
CLIPVIP_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
CLIPVIP_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
CLIPVIP_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
CLIPVIP_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
CLIPVIP_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
CLIPVIP_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
CLIPVIP_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
CLIPVIP_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
CLIPVIP_INLINE float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
CLIPVIP_INLINE float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
CLIPVIP_INLINE Vec first(int64_t n, Vec a, Vec b) {
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(first_lanes(n)));
}

CLIPVIP_INLINE __m128i narrow(Vec a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

CLIPVIP_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
CLIPVIP_INLINE Vec load(const bfloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
CLIPVIP_INLINE Vec load(const float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
CLIPVIP_INLINE Vec load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
CLIPVIP_INLINE Vec load(const uint16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)));
}
CLIPVIP_INLINE Vec load_first(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, first_lanes(n));
}
template <typename T>
CLIPVIP_INLINE Vec load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, size_t(n < kLanes ? n : kLanes) * sizeof(T));
  return load(padded);
}
CLIPVIP_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a); }
CLIPVIP_INLINE void store(bfloat16* p, Vec a) { _mm_storeu_si128((__m128i*)p, narrow(a)); }
CLIPVIP_INLINE void store(float16* p, Vec a) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
CLIPVIP_INLINE void store(uint8_t* p, Vec a) {
  const __m256i wide = _mm256_cvtps_epi32(a);
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(half, half));
}
CLIPVIP_INLINE void store_first(float* p, Vec a, int64_t n) {
  _mm256_maskstore_ps(p, first_lanes(n), a);
}
template <typename T>
CLIPVIP_INLINE void store_first(T* p, Vec a, int64_t n) {
  T padded[kLanes];
  store(padded, a);
  std::memcpy(p, padded, size_t(n < kLanes ? n : kLanes) * sizeof(T));
}

CLIPVIP_INLINE void stream_two(float* p, Vec a, Vec b) {
  _mm256_stream_ps(p, a);
  _mm256_stream_ps(p + kLanes, b);
}
CLIPVIP_INLINE void stream_two(bfloat16* p, Vec a, Vec b) {
  _mm256_stream_si256((__m256i*)p, _mm256_set_m128i(narrow(b), narrow(a)));
}
CLIPVIP_INLINE void stream_two(float16* p, Vec a, Vec b) {
  const __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  _mm256_stream_si256((__m256i*)p, _mm256_set_m128i(high, low));
}

constexpr float kZeroExponent = -127.f;
CLIPVIP_INLINE Vec round(Vec x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CLIPVIP_INLINE Vec times_exp2(Vec p, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

CLIPVIP_INLINE void transpose(Vec (&r)[kLanes]) {
  Vec t[kLanes];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Vec a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const Vec c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

#else

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));  // GCC and clang, on any processor

#define CLIPVIP_EACH_LANE(expression)                   \
  Vec r;                                                \
  for (int i = 0; i < kLanes; ++i) r[i] = (expression); \
  return r;

CLIPVIP_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
CLIPVIP_INLINE Vec zero() { return broadcast(0); }
CLIPVIP_INLINE Vec add(Vec a, Vec b) { return a + b; }
CLIPVIP_INLINE Vec sub(Vec a, Vec b) { return a - b; }
CLIPVIP_INLINE Vec mul(Vec a, Vec b) { return a * b; }
CLIPVIP_INLINE Vec div(Vec a, Vec b) { return a / b; }
CLIPVIP_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
CLIPVIP_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
CLIPVIP_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
CLIPVIP_INLINE Vec first(int64_t n, Vec a, Vec b) { CLIPVIP_EACH_LANE(i < n ? a[i] : b[i]) }
CLIPVIP_INLINE float reduce_add(Vec a) {
  return (a[0] + a[2]) + (a[1] + a[3]);
}
CLIPVIP_INLINE float reduce_max(Vec a) {
  float m = a[0];
  for (int i = 1; i < kLanes; ++i) m = m > a[i] ? m : a[i];
  return m;
}
template <typename T>
CLIPVIP_INLINE Vec load(const T* p) { CLIPVIP_EACH_LANE(to_float(p[i])) }
// Conversions of a whole vector are one or two instructions; lane by lane they would be many.
template <typename T>
CLIPVIP_INLINE Vec load_integers(const T* p) {
  typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
  return __builtin_convertvector(Integers{p[0], p[1], p[2], p[3]}, Vec);
}
CLIPVIP_INLINE Vec load(const uint8_t* p) { return load_integers(p); }
CLIPVIP_INLINE Vec load(const uint16_t* p) { return load_integers(p); }
template <typename T>
CLIPVIP_INLINE Vec load_first(const T* p, int64_t n) {
  CLIPVIP_EACH_LANE(i < n ? to_float(p[i]) : 0)
}
template <typename T>
CLIPVIP_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) from_float(a[i], p[i]);
}
CLIPVIP_INLINE void store(uint8_t* p, Vec a) {
  typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  const Vec rounded = min(max(a, zero()), broadcast(255.f)) + 12582912.f;  // in the lowest bits
  const Bytes bytes = __builtin_convertvector((Integers)rounded & 255, Bytes);
  std::memcpy(p, &bytes, kLanes);
}
template <typename T>
CLIPVIP_INLINE void store_first(T* p, Vec a, int64_t n) {
  for (int i = 0; i < kLanes && i < n; ++i) from_float(a[i], p[i]);
}
template <typename T>
CLIPVIP_INLINE void stream_two(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

constexpr float kZeroExponent = -127.f;
// Adding and taking away 1.5·2^23 leaves the nearest integer.
CLIPVIP_INLINE Vec round(Vec x) { return (x + 12582912.f) - 12582912.f; }
CLIPVIP_INLINE Vec times_exp2(Vec p, Vec n) {
  CLIPVIP_EACH_LANE(p[i] * from_bits((bits_of(n[i] + 12582912.f) + 127) << 23))
}
CLIPVIP_INLINE void transpose(Vec (&r)[kLanes]) {
  const Vec a = r[0], b = r[1], c = r[2], d = r[3];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; ++i) r[i] = Vec{a[i], b[i], c[i], d[i]};
}
#undef CLIPVIP_EACH_LANE

#endif

CLIPVIP_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// 2^x = 2^n · 2^f with n the nearest integer; the polynomial is the minimax one of degree 5 for
// 2^f over [-1/2, 1/2], relative error 9e-8. The limits come first in max and min, which give the
// second operand where either is NaN.
CLIPVIP_INLINE Vec exp2_of_sum(Vec n, Vec f) {
  Vec p = broadcast(1.326472719e-3f);
  p = fma(p, f, broadcast(9.671512640e-3f));
  p = fma(p, f, broadcast(5.550733743e-2f));
  p = fma(p, f, broadcast(2.402224209e-1f));
  p = fma(p, f, broadcast(6.931469776e-1f));
  p = fma(p, f, broadcast(1.f));
  return times_exp2(p, n);
}

CLIPVIP_INLINE Vec exp2(Vec x) {
  x = min(broadcast(128.f), max(broadcast(kZeroExponent), x));
  const Vec n = round(x);
  return exp2_of_sum(n, sub(x, n));
}

// To about 2 ulp for any x: log2(e) in two parts, as a product rounded once would be |x| ulp off.
CLIPVIP_INLINE Vec exp(Vec x) {
  x = min(broadcast(128 * kLn2), max(broadcast(kZeroExponent * kLn2), x));
  const Vec n = round(mul(x, broadcast(kLog2E)));
  const Vec f = fma(x, broadcast(kLog2E), sub(zero(), n));
  return exp2_of_sum(n, fma(x, broadcast(1.925963033500011e-8f), f));
}

}  // namespace CLIPVIP_ISA
}  // namespace clipvip
