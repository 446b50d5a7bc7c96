// The dynamic 8-bit code on a CPU: bit for bit what dynamic_map.py computes, from one table look-up a number.
//
// A bin is what the upper 16 bits of a float32 in [0, 1] leave open: sign, exponent and 7 bits of mantissa.
// Bins are narrower than the cells of the code, so that a bin holds one threshold at most. An entry of the
// table holds the rank below it (lower half) and the bits of the threshold that the bin leaves open, less one
// (upper half; all ones where there is none). Python makes the tables from the reference, and sets them once.
//
// `adam` and `lion` update weights and coded moments in one pass: each block is decoded, used and coded
// again while it lies in the nearest cache. Their float operations are those of rules/adam.py and
// rules/lion.py, one by one (the compiler must not contract them), so that the moments are the same to the
// bit. Compilers make vectors of the loops over a block, plain look-ups and arithmetic; of the longest they
// have to be told (`omp simd`) that its iterations stand alone. Its roots and quotients take no port from its
// look-ups, so that the two overlap.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

constexpr float kTiny = 1.17549435e-38f, kLargest = 3.40282347e+38f;
constexpr int32_t kOne = 0x3f800000;
constexpr int64_t kRowsAtOnce = 64, kBlock = 256;

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

int32_t first_bin(const Tables& of) { return (kOne >> 16) + 1 - static_cast<int32_t>(of.bins.size()); }

// Magnitudes compare as their bits do. Integer maxima become vectors; those of floats do not, for NaN's sake.
int32_t magnitude(float x) { return std::bit_cast<int32_t>(x) & 0x7fffffff; }

float absmax(const float* x, int64_t count) {
  int32_t peak = 0;
  for (int64_t i = 0; i < count; ++i) peak = std::max(peak, magnitude(x[i]));
  return std::bit_cast<float>(peak);
}

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

std::tuple<at::Tensor, at::Tensor> encode(const at::Tensor& rows, bool is_signed) {
  const auto x = rows.contiguous();
  const int64_t count = x.size(0), width = x.size(1);
  auto codes = at::empty({count, width}, x.options().dtype(at::kByte));
  auto scale = at::empty({count, 1}, x.options());
  const auto* from = x.const_data_ptr<float>();
  auto* to = codes.mutable_data_ptr<uint8_t>();
  auto* scales = scale.mutable_data_ptr<float>();
  const auto row = is_signed ? encode_row<true> : encode_row<false>;
  at::parallel_for(0, count, kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      scales[i] = absmax(from + i * width, width);
      row(from + i * width, width, scales[i], to + i * width);
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

int64_t blocks_of(int64_t total) { return (total + kBlock - 1) / kBlock; }

// What a rule needs of a moment that is kept as codes: its values by code, and to be coded again.
template <bool is_signed>
struct Coded {
  uint8_t* codes;
  float* scales;
  const float* values = tables[is_signed].values.data();

  Coded(const at::Tensor& of_codes, const at::Tensor& of_scales)
      : codes(of_codes.mutable_data_ptr<uint8_t>()), scales(of_scales.mutable_data_ptr<float>()) {}

  void encode(const float* x, int32_t peak, int64_t block, int64_t count) const {
    scales[block] = std::bit_cast<float>(peak);
    encode_row<is_signed>(x, count, scales[block], codes + block * kBlock);
  }
};

void check(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& codes,
           const at::Tensor& scales) {
  const int64_t total = weight.numel();
  for (const auto& tensor : {weight, grad, codes, scales})
    TORCH_CHECK(tensor.is_contiguous(), "the numbers of a tensor do not lie in order");
  TORCH_CHECK(grad.numel() == total && codes.numel() == total && scales.numel() == blocks_of(total),
              "codes, scales and gradient do not belong to ", total, " weights in blocks of ", kBlock);
}

// Calls `step(block, count)` for each block of `total` elements; the last one may be short.
template <class Step>
void each_block(int64_t total, const Step& step) {
  at::parallel_for(0, blocks_of(total), kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step(i, std::min(kBlock, total - i * kBlock));
  });
}

// The numbers of a step. Differences are taken in double and rounded once, as torch does with its scalars.
struct Adam {
  float beta1, rest1, beta2, rest2, inv_c1, inv_root_c2, eps, size, decay;

  template <bool is_hf>
  float moved(float w, float m, float v) const {
    if (is_hf) {
      w = w - size * (m / (std::sqrt(v) + eps));
      return w - decay * w;
    }
    w = w - decay * w;
    return w - size * ((m * inv_c1) / (std::sqrt(v) * inv_root_c2 + eps));
  }
};

template <bool is_hf>
void adam_block(const Adam n, float* __restrict w, const float* __restrict g, Coded<true> first,
                Coded<false> second, int64_t block, int64_t count) {
  alignas(64) float m[kBlock], v[kBlock];
  const uint8_t* __restrict m_codes = first.codes + block * kBlock;
  const uint8_t* __restrict v_codes = second.codes + block * kBlock;
  const float m_scale = first.scales[block], v_scale = second.scales[block];
  int32_t m_peak = 0, v_peak = 0;
#pragma omp simd reduction(max : m_peak, v_peak)
  for (int64_t i = 0; i < count; ++i) {
    m[i] = n.beta1 * (first.values[m_codes[i]] * m_scale) + n.rest1 * g[i];
    v[i] = n.beta2 * (second.values[v_codes[i]] * v_scale) + n.rest2 * (g[i] * g[i]);
    m_peak = std::max(m_peak, magnitude(m[i]));
    v_peak = std::max(v_peak, magnitude(v[i]));
    w[i] = n.moved<is_hf>(w[i], m[i], v[i]);
  }
  first.encode(m, m_peak, block, count);
  second.encode(v, v_peak, block, count);
}

void adam(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& m_codes,
          const at::Tensor& m_scale, const at::Tensor& v_codes, const at::Tensor& v_scale,
          const at::Tensor& ok, bool is_hf, double beta1, double beta2, double inv_c1, double inv_root_c2,
          double eps, double size, double decay) {
  check(weight, grad, m_codes, m_scale);
  check(weight, grad, v_codes, v_scale);
  if (!*ok.const_data_ptr<bool>()) return;
  const auto f = [](double x) { return static_cast<float>(x); };
  const Adam n{f(beta1),       f(1 - beta1), f(beta2), f(1 - beta2), f(inv_c1),
               f(inv_root_c2), f(eps),       f(size),  f(decay)};
  auto* w = weight.mutable_data_ptr<float>();
  const auto* g = grad.const_data_ptr<float>();
  const Coded<true> first(m_codes, m_scale);
  const Coded<false> second(v_codes, v_scale);
  const auto step = is_hf ? adam_block<true> : adam_block<false>;
  each_block(weight.numel(), [&](int64_t block, int64_t count) {
    step(n, w + block * kBlock, g + block * kBlock, first, second, block, count);
  });
}

struct Lion {
  float beta1, rest1, beta2, rest2, size, decay;
};

void lion_block(const Lion n, float* __restrict w, const float* __restrict g, Coded<true> moment,
                int64_t block, int64_t count) {
  alignas(64) float m[kBlock];
  const uint8_t* __restrict codes = moment.codes + block * kBlock;
  const float scale = moment.scales[block];
  int32_t peak = 0;
#pragma omp simd reduction(max : peak)
  for (int64_t i = 0; i < count; ++i) {
    const float old = moment.values[codes[i]] * scale;
    const float blend = n.beta1 * old + n.rest1 * g[i];
    const float sign = static_cast<float>((blend > 0) - (blend < 0));
    m[i] = n.beta2 * old + n.rest2 * g[i];
    peak = std::max(peak, magnitude(m[i]));
    w[i] = w[i] - n.decay * w[i] - n.size * sign;
  }
  moment.encode(m, peak, block, count);
}

void lion(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& codes, const at::Tensor& scale,
          const at::Tensor& ok, double beta1, double beta2, double size, double decay) {
  check(weight, grad, codes, scale);
  if (!*ok.const_data_ptr<bool>()) return;
  const auto f = [](double x) { return static_cast<float>(x); };
  const Lion n{f(beta1), f(1 - beta1), f(beta2), f(1 - beta2), f(size), f(decay)};
  auto* w = weight.mutable_data_ptr<float>();
  const auto* g = grad.const_data_ptr<float>();
  const Coded<true> moment(codes, scale);
  each_block(weight.numel(), [&](int64_t block, int64_t count) {
    lion_block(n, w + block * kBlock, g + block * kBlock, moment, block, count);
  });
}

// Whether all of a gradient is finite, as fast as it can be read.
at::Tensor is_finite(const at::Tensor& grad) {
  const auto x = grad.is_non_overlapping_and_dense() ? grad : grad.contiguous();
  const auto* values = x.const_data_ptr<float>();
  std::atomic<bool> found = true;
  at::parallel_for(0, x.numel(), kRowsAtOnce * kBlock, [&](int64_t begin, int64_t end) {
    if (!(absmax(values + begin, end - begin) <= kLargest)) found = false;  // NaN, too
  });
  return at::scalar_tensor(found.load(), x.options().dtype(at::kBool));
}

}  // namespace

TORCH_LIBRARY(scrimp_dynamic8, m) {
  m.def("encode(Tensor rows, bool signed) -> (Tensor, Tensor)");
  m.def("decode(Tensor codes, Tensor scale, bool signed) -> Tensor");
  m.def(
      "adam(Tensor(a!) weight, Tensor grad, Tensor(b!) m_codes, Tensor(c!) m_scale, Tensor(d!) v_codes, "
      "Tensor(e!) v_scale, Tensor ok, bool is_hf, float beta1, float beta2, float inv_c1, float inv_root_c2, "
      "float eps, float size, float decay) -> ()");
  m.def(
      "lion(Tensor(a!) weight, Tensor grad, Tensor(b!) codes, Tensor(c!) scale, Tensor ok, float beta1, "
      "float beta2, float size, float decay) -> ()");
  m.def("is_finite(Tensor grad) -> Tensor");
  m.def("set_tables(Tensor bins, Tensor values, bool signed) -> ()");
}

TORCH_LIBRARY_IMPL(scrimp_dynamic8, CPU, m) {
  m.impl("encode", encode);
  m.impl("decode", decode);
  m.impl("adam", adam);
  m.impl("lion", lion);
  m.impl("is_finite", is_finite);
  m.impl("set_tables", set_tables);
}
