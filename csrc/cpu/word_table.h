// The table of an instruction set that multiplies bf16 numbers; what has no form of its own runs as AVX-512. Included last
// by such a kernel file.
#pragma once

#include "kernels.h"

namespace {

// most_parts: bf16 parts of an operand that Statistics takes. rounded: null without matrix tiles.
template <class Statistics, class Matmul>
epmq::Kernels word_kernels(const char* name, int most_parts, const epmq::RoundedProduct* rounded) {
  static const epmq::PairStatistics pairs = {most_parts, parts_of, Statistics::pack, Statistics::product};
  static const epmq::WordMatmul word_matmul = {
      Matmul::takes,   Matmul::shape,   Matmul::column_words, Matmul::panel_rows,
      Matmul::scratch, Matmul::prepare, Matmul::run};
  epmq::Kernels all = epmq::avx512_kernels();
  all.name = name;
  all.pairs = &pairs;
  all.word_matmul = &word_matmul;
  all.rounded = rounded;
  return all;
}

}  // namespace
