// How much rounding to each of several grids costs, group by group. Included once per instruction set.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

struct GridKernel {
  static constexpr int L = Vec::lanes;
  static constexpr int64_t piece = 512;  // weights that stay in the first cache while every grid is tried on them
  static_assert(piece % L == 0, "a piece is whole vectors");

  typedef float Floats __attribute__((vector_size(sizeof(float) * L)));
  typedef decltype(Vec::r) Register;
  typedef int32_t Ints __attribute__((vector_size(sizeof(int32_t) * L)));

  // a[0] t^n + ... + a[n]
  template <int Count>
  static EPMQ_INLINE Vec polynomial(const float (&a)[Count], Vec t) {
    Vec value = Vec::broadcast(a[0]);
    EPMQ_UNROLL
    for (int i = 1; i < Count; i++) value = Vec::fma(value, t, Vec::broadcast(a[i]));
    return value;
  }

  // v^p for v >= 0 by polynomials of log2, for numbers between the roots of 1/2 and 2, and of exp2 between -1/2 and
  // 1/2, within 3e-6 in all; zero gives 2^-126. What is not finite stays as it is.
  static EPMQ_INLINE Vec power_of(Vec v, Vec p) {
    static constexpr float log2[] = {0.170658488f, -0.272686605f, 0.297250453f, -0.358963202f,
                                     0.480466248f, -0.721375828f, 1.4426997f};
    constexpr int32_t root_half = 0x3f3504f3;
    const Ints bits = (Ints)v.r, exponent = (bits - root_half) >> 23;
    const Vec t = Vec{(Register)(bits - (exponent << 23))} - Vec::broadcast(1.0f);
    const Vec log = Vec::fma(polynomial(log2, t), t, Vec{(Register)__builtin_convertvector(exponent, Floats)});
    const Vec power = power_of_two(p * log);
    const Ints finite = (bits & 0x7fffffff) < 0x7f800000;  // NaN may carry a sign
    return Vec{(Register)((finite & (Ints)power.r) | (~finite & bits))};
  }

  // 2^y, y at least -126: below, results would be denormal, which costs.
  static EPMQ_INLINE Vec power_of_two(Vec y) {
    static constexpr float exp2[] = {0.00957010186f, 0.0559178603f, 0.240247448f, 0.693121815f, 0.999999261f};
#if defined(EPMQ_AVX512)
    y = Vec{_mm512_max_ps(y.r, _mm512_set1_ps(-126.0f))};
    const Vec whole = y.round_even();
    return {_mm512_scalef_ps(polynomial(exp2, y - whole).r, whole.r)};
#else
    y = y.clamp(Vec::broadcast(-126.0f), Vec::broadcast(127.0f));
    const Vec whole = y.round_even();
    const Ints power = (__builtin_convertvector((Floats)whole.r, Ints) + 127) << 23;
    return polynomial(exp2, y - whole) * Vec{(Register)power};
#endif
  }

  // Losses of one piece of a group under grid s, added to `total`.
  static EPMQ_INLINE float loss(const epmq::GridArgs& a, const float* weight, const float* importance, int64_t size,
                                float scale, float zero) {
    const Vec s = Vec::broadcast(scale), inverse = Vec::broadcast(1.0f / scale), z = Vec::broadcast(zero);
    const Vec none = Vec::zero(), top = Vec::broadcast(a.top);
    alignas(64) float cost[piece];
    for (int64_t j = 0; j < size; j += L) {
      const Vec w = Vec::load(weight + j);
      const Vec code = ((w * inverse).round_even() + z).clamp(none, top);
      const Vec error = (code - z) * s - w;
      (error * error).store(cost + j);
    }
    if (a.power != 2.0f) {
      const Vec half = Vec::broadcast(0.5f * a.power);
      for (int64_t j = 0; j < size; j += L) power_of(Vec::load(cost + j), half).store(cost + j);
    }
    Vec sum = Vec::zero();
    for (int64_t j = 0; j < size; j += L) sum = Vec::fma(Vec::load(cost + j), Vec::load(importance + j), sum);
    float lanes[L], total = 0.0f;
    sum.store(lanes);
    for (int l = 0; l < L; l++) total += lanes[l];
    return total;
  }

  static void losses(const epmq::GridArgs& a, int64_t row_begin, int64_t row_end) {
    alignas(64) float weight[piece], importance[piece];
    for (int64_t row = row_begin; row < row_end; row++)
      for (int64_t g = 0; g < a.groups; g++) {
        const int64_t end = (g + 1) * a.group_size < a.columns ? (g + 1) * a.group_size : a.columns;
        for (int64_t begin = g * a.group_size; begin < end; begin += piece) {
          const int64_t count = end - begin < piece ? end - begin : piece, size = (count + L - 1) / L * L;
          for (int64_t j = 0; j < size; j++) {
            weight[j] = j < count ? a.weight[row * a.weight_stride + begin + j] : 0.0f;
            importance[j] = j >= count ? 0.0f : a.importance ? a.importance[begin + j] : 1.0f;
          }
          for (int64_t s = 0; s < a.grids; s++) {
            const int64_t at = (s * a.rows + row) * a.groups + g;
            const float found = loss(a, weight, importance, size, a.scales[at], a.zeros[at]);
            a.losses[at] = begin == g * a.group_size ? found : a.losses[at] + found;
          }
        }
      }
  }
};

}  // namespace
