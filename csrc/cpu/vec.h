// One small vector type per instruction set; every kernel body is a template over it.
//
// A kernel file defines exactly one of EPMQ_AVX512, EPMQ_AVX2 or neither (plain) after it has switched the compiler
// to that instruction set, and everything here has internal linkage: a function compiled for AVX2 must never be the
// copy that the linker keeps for a caller on an older CPU. For the same reason kernel files include no C++ library
// header that holds inline functions.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(EPMQ_AVX2) || defined(EPMQ_AVX512)
#include <immintrin.h>
#endif

#define EPMQ_INLINE inline __attribute__((always_inline))
// Tiles of accumulators stay in registers only when every index into them is a constant.
#define EPMQ_UNROLL _Pragma("GCC unroll 16")

namespace {

// fp16 -> fp32 for instruction sets without a conversion; exact, subnormals included.
EPMQ_INLINE float half_bits_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {  // Inf, NaN
    const uint32_t bits = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
    memcpy(&value, &bits, 4);
    return value;
  }
  // The exponent fields line up after a shift; 2^112 mends the bias and makes subnormals normal.
  const uint32_t bits = magnitude << 13;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;
  uint32_t out;
  memcpy(&out, &value, 4);
  out |= sign;
  memcpy(&value, &out, 4);
  return value;
}

EPMQ_INLINE float bfloat_bits_to_float(uint16_t bfloat) {
  const uint32_t bits = (uint32_t)bfloat << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

#if defined(EPMQ_AVX512)

struct Vec {
  static constexpr int lanes = 16;
  // Registers that a tile of accumulators may fill: outer products B x V, inner products M x N.
  static constexpr int outer_b = 8, outer_v = 3, inner_m = 4, inner_n = 6;
  __m512 r;

  static EPMQ_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static EPMQ_INLINE Vec broadcast(float v) { return {_mm512_set1_ps(v)}; }
  static EPMQ_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static EPMQ_INLINE Vec load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static EPMQ_INLINE Vec load_bfloat(const uint16_t* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
  }
  static EPMQ_INLINE Vec load_bytes(const uint8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
  }
  EPMQ_INLINE void store(float* p) const { _mm512_storeu_ps(p, r); }
  EPMQ_INLINE Vec operator+(Vec o) const { return {_mm512_add_ps(r, o.r)}; }
  EPMQ_INLINE Vec operator-(Vec o) const { return {_mm512_sub_ps(r, o.r)}; }
  EPMQ_INLINE Vec operator*(Vec o) const { return {_mm512_mul_ps(r, o.r)}; }
  // a * b + c
  static EPMQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
  // NaN stays NaN: max and min return their second operand when either is NaN.
  EPMQ_INLINE Vec clamp(Vec low, Vec high) const { return {_mm512_min_ps(high.r, _mm512_max_ps(low.r, r))}; }
  EPMQ_INLINE Vec round_even() const { return {_mm512_roundscale_ps(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // Whole numbers in [0, 255] to bytes; NaN becomes 0.
  EPMQ_INLINE void store_bytes(uint8_t* p) const {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(r)));
  }

  // One total per vector: four floats. The same tree for every caller.
  static EPMQ_INLINE void totals(const Vec (&v)[4], float* out) {
    __m256 h[4];
    EPMQ_UNROLL
    for (int i = 0; i < 4; i++) h[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i].r), _mm512_extractf32x8_ps(v[i].r, 1));
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
  }
};

#elif defined(EPMQ_AVX2)

struct Vec {
  static constexpr int lanes = 8;
  static constexpr int outer_b = 4, outer_v = 3, inner_m = 4, inner_n = 3;
  __m256 r;

  static EPMQ_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static EPMQ_INLINE Vec broadcast(float v) { return {_mm256_set1_ps(v)}; }
  static EPMQ_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static EPMQ_INLINE Vec load_half(const uint16_t* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static EPMQ_INLINE Vec load_bfloat(const uint16_t* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16))};
  }
  static EPMQ_INLINE Vec load_bytes(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
  }
  EPMQ_INLINE void store(float* p) const { _mm256_storeu_ps(p, r); }
  EPMQ_INLINE Vec operator+(Vec o) const { return {_mm256_add_ps(r, o.r)}; }
  EPMQ_INLINE Vec operator-(Vec o) const { return {_mm256_sub_ps(r, o.r)}; }
  EPMQ_INLINE Vec operator*(Vec o) const { return {_mm256_mul_ps(r, o.r)}; }
  // a * b + c
  static EPMQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
  // NaN stays NaN: max and min return their second operand when either is NaN.
  EPMQ_INLINE Vec clamp(Vec low, Vec high) const { return {_mm256_min_ps(high.r, _mm256_max_ps(low.r, r))}; }
  EPMQ_INLINE Vec round_even() const { return {_mm256_round_ps(r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // Whole numbers in [0, 255] to bytes; NaN becomes 0.
  EPMQ_INLINE void store_bytes(uint8_t* p) const {
    const __m256i low_bytes = _mm256_set1_epi32(0x0c080400);
    const __m256i packed = _mm256_shuffle_epi8(_mm256_cvttps_epi32(r), low_bytes);
    const uint32_t first = (uint32_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(packed));
    const uint32_t second = (uint32_t)_mm_cvtsi128_si32(_mm256_extracti128_si256(packed, 1));
    memcpy(p, &first, 4);
    memcpy(p + 4, &second, 4);
  }

  // One total per vector: four floats. The same tree for every caller.
  static EPMQ_INLINE void totals(const Vec (&v)[4], float* out) {
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(v[0].r, v[1].r), _mm256_hadd_ps(v[2].r, v[3].r));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
  }
};

#else

// Portable: GCC and Clang lower a 16-byte vector to whatever the base instruction set has (SSE2, NEON, scalars).
struct Vec {
  static constexpr int lanes = 4;
  static constexpr int outer_b = 4, outer_v = 2, inner_m = 4, inner_n = 2;
  typedef float Reg __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  Reg r;

  static EPMQ_INLINE Vec zero() { return {Reg{0, 0, 0, 0}}; }
  static EPMQ_INLINE Vec broadcast(float v) { return {Reg{v, v, v, v}}; }
  static EPMQ_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v.r, p, 16);
    return v;
  }
  static EPMQ_INLINE Vec load_half(const uint16_t* p) {
    return {Reg{half_bits_to_float(p[0]), half_bits_to_float(p[1]), half_bits_to_float(p[2]), half_bits_to_float(p[3])}};
  }
  static EPMQ_INLINE Vec load_bfloat(const uint16_t* p) {
    return {Reg{bfloat_bits_to_float(p[0]), bfloat_bits_to_float(p[1]), bfloat_bits_to_float(p[2]),
                bfloat_bits_to_float(p[3])}};
  }
  static EPMQ_INLINE Vec load_bytes(const uint8_t* p) {
    return {Reg{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}};
  }
  EPMQ_INLINE void store(float* p) const { memcpy(p, &r, 16); }
  EPMQ_INLINE Vec operator+(Vec o) const { return {r + o.r}; }
  EPMQ_INLINE Vec operator-(Vec o) const { return {r - o.r}; }
  EPMQ_INLINE Vec operator*(Vec o) const { return {r * o.r}; }
  static EPMQ_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.r * b.r + c.r}; }
  // NaN stays NaN: a comparison with it is false.
  EPMQ_INLINE Vec clamp(Vec low, Vec high) const {
    const Reg raised = select(r < low.r, low.r, r);
    return {select(raised > high.r, high.r, raised)};
  }
  // Adding 1.5 * 2^23 leaves no fraction bits. Larger numbers are cut first: callers clamp codes to a byte anyway.
  EPMQ_INLINE Vec round_even() const {
    const Reg magic = broadcast(12582912.0f).r;
    const Reg cut = clamp(broadcast(-2097152.0f), broadcast(2097152.0f)).r;
    return {(cut + magic) - magic};
  }
  EPMQ_INLINE void store_bytes(uint8_t* p) const {
    for (int i = 0; i < lanes; i++) p[i] = r[i] == r[i] ? (uint8_t)(int32_t)r[i] : (uint8_t)0;
  }

  // One total per vector: four floats. The same tree for every caller.
  static EPMQ_INLINE void totals(const Vec (&v)[4], float* out) {
    for (int i = 0; i < 4; i++) out[i] = (v[i].r[0] + v[i].r[1]) + (v[i].r[2] + v[i].r[3]);
  }

 private:
  static EPMQ_INLINE Reg select(Mask mask, Reg a, Reg b) {
    Mask x, y;
    memcpy(&x, &a, 16);
    memcpy(&y, &b, 16);
    const Mask z = (mask & x) | (~mask & y);
    Reg out;
    memcpy(&out, &z, 16);
    return out;
  }
};

#endif

// Accumulators of a B x V tile of outer products: acc[b][v] += bcast[b] * vec[v], step by step.
//
// bcast: steps x bcast_step floats, the first B of each step are used. vec: V streams of one vector per step,
// `vec_tile` floats apart, `vec_step` floats from step to step.
template <int B, int V>
struct OuterTile {
  Vec acc[B][V];

  EPMQ_INLINE void clear() {
    EPMQ_UNROLL
    for (int b = 0; b < B; b++)
      EPMQ_UNROLL
      for (int v = 0; v < V; v++) acc[b][v] = Vec::zero();
  }

  EPMQ_INLINE void add(int64_t steps, const float* bcast, int64_t bcast_step, const float* vec, int64_t vec_step,
                       int64_t vec_tile) {
    for (int64_t i = 0; i < steps; i++) {
      Vec x[V];
      EPMQ_UNROLL
      for (int v = 0; v < V; v++) x[v] = Vec::load(vec + v * vec_tile);
      EPMQ_UNROLL
      for (int b = 0; b < B; b++) {
        const Vec y = Vec::broadcast(bcast[b]);
        EPMQ_UNROLL
        for (int v = 0; v < V; v++) acc[b][v] = Vec::fma(y, x[v], acc[b][v]);
      }
      bcast += bcast_step;
      vec += vec_step;
    }
  }
};

}  // namespace
