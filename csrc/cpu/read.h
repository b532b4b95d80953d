// Elements of a tensor of any of the accepted types, as fp32.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

EPMQ_INLINE float read_element(const void* data, epmq::Dtype dtype, int64_t at) {
  if (dtype == epmq::Dtype::kFloat) return ((const float*)data)[at];
  const uint16_t bits = ((const uint16_t*)data)[at];
  return dtype == epmq::Dtype::kHalf ? half_bits_to_float(bits) : bfloat_bits_to_float(bits);
}

EPMQ_INLINE Vec read_vector(const void* data, epmq::Dtype dtype, int64_t at) {
  if (dtype == epmq::Dtype::kFloat) return Vec::load((const float*)data + at);
  const uint16_t* bits = (const uint16_t*)data + at;
  return dtype == epmq::Dtype::kHalf ? Vec::load_half(bits) : Vec::load_bfloat(bits);
}

}  // namespace
