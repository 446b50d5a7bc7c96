// The dynamic 8-bit code on a CPU: bit for bit what dynamic_map.py computes. With AVX-512 dynamic8_lines.h
// does its arithmetic; elsewhere a number is one look-up in a table:
//
// A bin is what the upper 16 bits of a float32 in [0, 1] leave open: sign, exponent and 7 bits of mantissa.
// Bins are narrower than the cells of the code, so that a bin holds one threshold at most. An entry of the
// table holds the rank below it (lower half) and the bits of the threshold that the bin leaves open, less one
// (upper half; all ones where there is none). Python makes the tables from the reference, and sets them once.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <tuple>
#include <vector>

namespace scrimp {

constexpr float kTiny = 1.17549435e-38f, kLargest = 3.40282347e+38f;
constexpr int32_t kOne = 0x3f800000;
constexpr int64_t kBlock = 256;         // elements that share a scale
constexpr int64_t kBlocksAtOnce = 128;  // fewer are not worth a second thread

// Magnitudes compare as their bits do. Integer maxima become vectors; those of floats do not, for NaN's sake.
inline float absmax(const float* x, int64_t count) {
  int32_t peak = 0;
  for (int64_t i = 0; i < count; ++i) peak = std::max(peak, std::bit_cast<int32_t>(x[i]) & 0x7fffffff);
  return std::bit_cast<float>(peak);
}

}  // namespace scrimp

#ifdef CPU_CAPABILITY_AVX512
#include "dynamic8_lines.h"
#else

namespace scrimp {

struct Tables {
  std::vector<uint32_t> bins;  // the last one begins at 1
  std::vector<float> values;   // of the codes
};
inline Tables tables[2];  // without sign, with sign

inline void set_tables(const at::Tensor& bins, const at::Tensor& values, const at::Tensor&, const at::Tensor&,
                       bool is_signed) {
  const auto* entries = reinterpret_cast<const uint32_t*>(bins.const_data_ptr<int32_t>());
  const auto* of_codes = values.const_data_ptr<float>();
  tables[is_signed] = {{entries, entries + bins.numel()}, {of_codes, of_codes + values.numel()}};
}

inline int32_t first_bin(const Tables& of) { return (kOne >> 16) + 1 - static_cast<int32_t>(of.bins.size()); }

template <bool is_signed>
void encode_row(const float* __restrict x, int64_t count, float scale, uint8_t* __restrict codes) {
  const uint32_t* __restrict table = tables[is_signed].bins.data();
  const int32_t first = first_bin(tables[is_signed]);
  const float inverse = 1.0f / std::max(scale, kTiny);
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = x[i] * inverse;
    const auto bits = std::bit_cast<int32_t>(scaled);
    const int32_t size = std::min(bits & 0x7fffffff, kOne);
    const uint32_t entry = table[std::max((size >> 16) - first, 0)];
    const int32_t above = static_cast<uint32_t>(size & 0xffff) > (entry >> 16);
    const int32_t rank = static_cast<int32_t>(entry & 0xffff) + above;
    if (is_signed)
      codes[i] = static_cast<uint8_t>(bits < 0 ? 127 - std::min(rank, 127) : 127 + rank);
    else
      codes[i] = static_cast<uint8_t>(bits < 0 ? 0 : rank);
  }
}

// The values of a block.
template <bool is_signed>
class Decoder {
  const float* value_of = tables[is_signed].values.data();
  float scale;

 public:
  explicit Decoder(float of_block) : scale(of_block) {}

  void operator()(const uint8_t* __restrict codes, int64_t count, float* __restrict x) const {
    for (int64_t i = 0; i < count; ++i) x[i] = value_of[codes[i]] * scale;
  }
};

}  // namespace scrimp

#endif

namespace scrimp {

inline std::tuple<at::Tensor, at::Tensor> encode(const at::Tensor& rows, bool is_signed) {
  const auto x = rows.contiguous();
  const int64_t count = x.size(0), width = x.size(1);
  auto codes = at::empty({count, width}, x.options().dtype(at::kByte));
  auto scale = at::empty({count, 1}, x.options());
  const auto* from = x.const_data_ptr<float>();
  auto* to = codes.mutable_data_ptr<uint8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  const auto row = is_signed ? encode_row<true> : encode_row<false>;
  at::parallel_for(0, count, kBlocksAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scales[i] = absmax(from + i * width, width);
      row(from + i * width, width, scales[i], to + i * width);
    }
  });
  return {codes, scale};
}

template <bool is_signed>
void decode_rows(const uint8_t* codes, const float* scales, int64_t count, int64_t width, float* x) {
  at::parallel_for(0, count, kBlocksAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      Decoder<is_signed>{scales[i]}(codes + i * width, width, x + i * width);
  });
}

inline at::Tensor decode(const at::Tensor& codes, const at::Tensor& scale, bool is_signed) {
  const auto rows = codes.contiguous();
  const auto scales = scale.contiguous();
  auto values = at::empty({rows.size(0), rows.size(1)}, scale.options());
  const auto decode_all = is_signed ? decode_rows<true> : decode_rows<false>;
  decode_all(rows.const_data_ptr<uint8_t>(), scales.const_data_ptr<float>(), rows.size(0), rows.size(1),
             values.mutable_data_ptr<float>());
  return values;
}

}  // namespace scrimp
