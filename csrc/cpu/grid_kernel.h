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
  typedef int32_t Ints __attribute__((vector_size(sizeof(int32_t) * L)));

  static EPMQ_INLINE Floats all(float value) { return Floats{} + value; }

  // v^p for v >= 0 by polynomials of log2 and exp2, within 2e-7 each; zero gives 2^-126.
  static EPMQ_INLINE Floats power_of(Floats v, float p) {
    const Ints bits = (Ints)v;
    const Floats exponent = __builtin_convertvector((bits >> 23) - 127, Floats);
    const Floats t = (Floats)((bits & 0x7fffff) | 0x3f800000) - 1.0f;
    Floats log = all(0.00739540206f);
    log = log * t - 0.0419450104f;
    log = log * t + 0.111832075f;
    log = log * t - 0.19623895f;
    log = log * t + 0.275221199f;
    log = log * t - 0.358299077f;
    log = log * t + 0.480678886f;
    log = log * t - 0.721339524f;
    log = log * t + 1.44269502f;
    Floats y = p * (exponent + log * t);
    y = y < -126.0f ? all(-126.0f) : y;
    y = y > 127.0f ? all(127.0f) : y;
    const Ints whole = __builtin_convertvector(y + 256.0f, Ints) - 256;
    const Floats f = y - __builtin_convertvector(whole, Floats);
    Floats exp = all(0.000218657850f);
    exp = exp * f + 0.00123913318f;
    exp = exp * f + 0.00968418643f;
    exp = exp * f + 0.0554806292f;
    exp = exp * f + 0.240230456f;
    exp = exp * f + 0.693146944f;
    exp = exp * f + 1.0f;
    return exp * (Floats)((whole + 127) << 23);
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
      const float half = 0.5f * a.power;
      for (int64_t j = 0; j < size; j += L) {
        Floats* place = (Floats*)(cost + j);
        *place = power_of(*place, half);
      }
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
