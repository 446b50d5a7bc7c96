// The dynamic 8-bit code on a CPU: bit for bit what dynamic_map.py computes, from one table look-up a number.
//
// A bin is what the upper 16 bits of a float32 in [0, 1] leave open: sign, exponent and 7 bits of mantissa.
// Bins are narrower than the cells of the code, so that a bin holds one threshold at most. An entry of the
// table holds the rank below it (lower half) and the bits of the threshold that the bin leaves open, less one
// (upper half; all ones where there is none). Python makes the tables from the reference, and sets them once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <vector>

namespace {

constexpr float kTiny = 1.17549435e-38f;
constexpr int32_t kOne = 0x3f800000;
constexpr int64_t kLanes = 16, kRowsAtOnce = 64;

struct Tables {
  std::vector<uint32_t> bins;  // the last one begins at 1
  std::vector<float> values;   // of the codes
};
Tables tables[2];  // without sign, with sign

void set_tables(const at::Tensor& bins, const at::Tensor& values, bool is_signed) {
  const auto* entries = reinterpret_cast<const uint32_t*>(bins.const_data_ptr<int32_t>());
  const auto* of_codes = values.const_data_ptr<float>();
  tables[is_signed] = {{entries, entries + bins.numel()}, {of_codes, of_codes + values.numel()}};
}

float absmax(const float* x, int64_t count) {
  float lanes[kLanes] = {};  // independent maxima, which become one vector
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = std::max(lanes[j], std::fabs(x[i + j]));
  for (; i < count; ++i) lanes[0] = std::max(lanes[0], std::fabs(x[i]));
  return *std::max_element(lanes, lanes + kLanes);
}

template <bool is_signed>
void encode_row(const float* __restrict x, int64_t count, float inverse, const uint32_t* __restrict table,
                int32_t first_bin, uint8_t* __restrict codes) {
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = x[i] * inverse;
    int32_t bits;
    std::memcpy(&bits, &scaled, sizeof bits);
    const int32_t size = std::min(bits & 0x7fffffff, kOne);
    const uint32_t entry = table[std::max((size >> 16) - first_bin, 0)];
    const int32_t above = static_cast<uint32_t>(size & 0xffff) > (entry >> 16);
    const int32_t rank = static_cast<int32_t>(entry & 0xffff) + above;
    if (is_signed)
      codes[i] = static_cast<uint8_t>(bits < 0 ? 127 - std::min(rank, 127) : 127 + rank);
    else
      codes[i] = static_cast<uint8_t>(bits < 0 ? 0 : rank);
  }
}

std::tuple<at::Tensor, at::Tensor> encode(const at::Tensor& rows, bool is_signed) {
  const auto x = rows.contiguous();
  const int64_t count = x.size(0), width = x.size(1);
  auto codes = at::empty({count, width}, x.options().dtype(at::kByte));
  auto scale = at::empty({count, 1}, x.options());
  const auto* from = x.const_data_ptr<float>();
  const auto& bins = tables[is_signed].bins;
  const auto first_bin = (kOne >> 16) + 1 - static_cast<int32_t>(bins.size());
  auto* to = codes.mutable_data_ptr<uint8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  const auto row = is_signed ? encode_row<true> : encode_row<false>;
  at::parallel_for(0, count, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scales[i] = absmax(from + i * width, width);
      row(from + i * width, width, 1.0f / std::max(scales[i], kTiny), bins.data(), first_bin, to + i * width);
    }
  });
  return {codes, scale};
}

at::Tensor decode(const at::Tensor& codes, const at::Tensor& scale, bool is_signed) {
  const auto rows = codes.contiguous();
  const auto scale_rows = scale.contiguous();
  const int64_t count = rows.size(0), width = rows.size(1);
  auto values = at::empty({count, width}, scale.options());
  const auto* from = rows.const_data_ptr<uint8_t>();
  const auto* scales = scale_rows.const_data_ptr<float>();
  const auto* value_of = tables[is_signed].values.data();
  auto* to = values.mutable_data_ptr<float>();
  at::parallel_for(0, count, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = i * width; j < (i + 1) * width; ++j) to[j] = value_of[from[j]] * scales[i];
  });
  return values;
}

}  // namespace

TORCH_LIBRARY(scrimp_dynamic8, m) {
  m.def("encode(Tensor rows, bool signed) -> (Tensor, Tensor)");
  m.def("decode(Tensor codes, Tensor scale, bool signed) -> Tensor");
  m.def("set_tables(Tensor bins, Tensor values, bool signed) -> ()");
}

TORCH_LIBRARY_IMPL(scrimp_dynamic8, CPU, m) {
  m.impl("encode", encode);
  m.impl("decode", decode);
  m.impl("set_tables", set_tables);
}
