// Optimizer steps on a CPU: weights and moments are renewed in one pass over the memory. In a subspace
// (`adam_projected`) the same pass makes of R and its moments the direction; products.h and lifts.h do the
// rest.
//
// A rule (Adam, Lion, Sgd) says what becomes of one element. A moment (Full, Coded) says how its values are
// kept: as they are, or as codes that are decoded, used and coded again while a block lies in the nearest
// cache. `walk` puts a rule and its moments together, block by block.
//
// The float operations are those of rules/adam.py, rules/lion.py and rules/sgd.py, one by one (the compiler
// must not contract them). Of the loop over a block the compiler has to be told (`omp simd`) that its
// iterations stand alone.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "adafactor.h"
#include "dynamic8.h"
#include "lifts.h"
#include "normal.h"

namespace scrimp {

// A rule's numbers are those of a step: rewarm, lr, weight decay, size, and its own.
using Tensors = at::TensorList;

int64_t blocks_of(int64_t total) { return (total + kBlock - 1) / kBlock; }

// ---- how a moment is kept ----------------------------------------------------------------------------

// As it is. Elements whose gradient is not finite keep their values.
struct Full {
  float* values;

  explicit Full(const at::Tensor& held) : values(held.mutable_data_ptr<float>()) {}

  struct Block {
    float* x;
    void fetch(int64_t, int64_t) {}
    void close(int64_t) {}
  };
  static constexpr int64_t kStrip = kBlock;
  static constexpr bool kIsWhole = false;
  Block open(int64_t block) const {
    fetch_next(values + block * kBlock);
    return {values + block * kBlock};
  }
};

// As dynamic 8-bit codes, and a scale for each block.
template <bool is_signed>
struct Coded {
  uint8_t* codes;
  float* scales;

  Coded(const at::Tensor& of_codes, const at::Tensor& of_scales)
      : codes(of_codes.mutable_data_ptr<uint8_t>()), scales(of_scales.mutable_data_ptr<float>()) {}

  struct Block {
    alignas(64) float x[kBlock];  // written before it is read
    uint8_t* codes;
    float* scale;
    Decoder<is_signed> decode;
    Block(uint8_t* first_code, float* of_block) : codes(first_code), scale(of_block), decode(*of_block) {}
    void fetch(int64_t first, int64_t count) { decode(codes + first, count, x + first); }
    void close(int64_t count) {
      *scale = absmax(x, count);
      encode_row<is_signed>(x, count, *scale, codes);
    }
  };
  static constexpr int64_t kStrip = 64;   // one is decoded while the one before waits for its quotients
  static constexpr bool kIsWhole = true;  // who updates codes has looked: one NaN would spoil its block
  Block open(int64_t block) const {
    return {codes + block * kBlock, scales + block};
  }
};

// ---- rules -------------------------------------------------------------------------------------------

template <bool is_hf>
struct Adam {
  float size, decay, beta1, rest1, beta2, rest2, eps, inv_c1, inv_root_c2;

  explicit Adam(Numbers n)
      : size(rounded(n[0] * n[3])), decay(rounded(n[1] * n[2])), beta1(rounded(n[4])),
        rest1(rounded(1 - n[4])), beta2(rounded(n[5])), rest2(rounded(1 - n[5])), eps(rounded(n[6])),
        inv_c1(rounded(n[7])), inv_root_c2(rounded(n[8])) {}

  float direction(float g, float& m, float& v) const {
    m = beta1 * m + rest1 * g;
    v = beta2 * v + rest2 * (g * g);
    return is_hf ? m / (std::sqrt(v) + eps) : (m * inv_c1) / (std::sqrt(v) * inv_root_c2 + eps);
  }
  void step(float g, float& w, float& m, float& v) const {
    const float moved = size * direction(g, m, v);
    if (!is_hf) w = w - decay * w;
    w = w - moved;
    if (is_hf) w = w - decay * w;
  }
};

// Adam's direction, in the place of weights.
template <bool is_hf>
struct Direction : Adam<is_hf> {
  using Adam<is_hf>::Adam;

  void step(float g, float& w, float& m, float& v) const { w = this->direction(g, m, v); }
};

struct Lion {
  float size, decay, beta1, rest1, beta2, rest2;

  explicit Lion(Numbers n)
      : size(rounded(n[0] * n[3])), decay(rounded(n[1] * n[2])), beta1(rounded(n[4])),
        rest1(rounded(1 - n[4])), beta2(rounded(n[5])), rest2(rounded(1 - n[5])) {}

  void step(float g, float& w, float& m) const {
    const float blend = beta1 * m + rest1 * g;
    m = beta2 * m + rest2 * g;
    w = w - decay * w - size * static_cast<float>((blend > 0) - (blend < 0));
  }
};

template <bool is_nesterov>
struct Sgd {
  float size, decay, momentum, intake;

  explicit Sgd(Numbers n)
      : size(rounded(n[0] * n[3])), decay(rounded(n[1] * n[2])), momentum(rounded(n[4])),
        intake(rounded(n[5])) {}

  void step(float g, float& w, float& m) const {
    m = momentum * m + intake * g;
    w = w - decay * w - size * (is_nesterov ? g + momentum * m : m);
  }
};

// ---- the pass over the memory ------------------------------------------------------------------------

// `x` are the values of the moments. Inlined, a strip's length is known: a loop less.
template <bool is_whole, class Rule, class... Values>
[[gnu::always_inline]] inline void step_strip(const Rule& rule, float* __restrict w,
                                              const float* __restrict g, int64_t count,
                                              Values* __restrict... x) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const bool is_fine = is_whole || std::abs(g[i]) <= kLargest;
    float moved = w[i];
    [&](auto... values) {
      rule.step(g[i], moved, values...);
      ((x[i] = is_fine ? values : x[i]), ...);
    }(x[i]...);
    w[i] = is_fine ? moved : w[i];
  }
}

template <class Rule, class... Moments>
void step_block(const Rule rule, float* w, const float* g, int64_t count,
                typename Moments::Block... moments) {
  constexpr int64_t kStrip = std::min({Moments::kStrip...});
  constexpr bool kIsWhole = (Moments::kIsWhole || ...);
  const int64_t full = count - count % kStrip;
  for (int64_t i = 0; i < full; i += kStrip) {
    (moments.fetch(i, kStrip), ...);
    step_strip<kIsWhole>(rule, w + i, g + i, kStrip, moments.x + i...);
  }
  if (full < count) {
    (moments.fetch(full, count - full), ...);
    step_strip<kIsWhole>(rule, w + full, g + full, count - full, moments.x + full...);
  }
  (moments.close(count), ...);
}

template <class Rule, class... Moments>
void walk(const Rule rule, const at::Tensor& weight, const at::Tensor& grad, const Moments... moments) {
  auto* w = weight.mutable_data_ptr<float>();
  const auto* g = grad.const_data_ptr<float>();
  const int64_t total = weight.numel();
  at::parallel_for(0, blocks_of(total), kBlocksAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, total - first);
      fetch_next(w + first);
      fetch_next(g + first);
      step_block<Rule, Moments...>(rule, w + first, g + first, count, moments.open(block)...);
    }
  });
}

// Whether all of a gradient is finite, as fast as it can be read.
bool is_finite(const at::Tensor& grad) {
  const auto* values = grad.const_data_ptr<float>();
  std::atomic<bool> found = true;
  at::parallel_for(0, grad.numel(), kBlocksAtOnce * kBlock, [&](int64_t begin, int64_t end) {
    if (!(absmax(values + begin, end - begin) <= kLargest)) found = false;  // NaN, too
  });
  return found;
}

void check(const at::Tensor& weight, Tensors moments, bool is_coded) {
  const int64_t total = weight.numel();
  TORCH_CHECK(weight.is_contiguous(), "the weights do not lie in order");
  for (size_t i = 0; i < moments.size(); ++i) {
    const bool is_scale = is_coded && i % 2 == 1;
    TORCH_CHECK(moments[i].is_contiguous() && moments[i].numel() == (is_scale ? blocks_of(total) : total),
                "moment ", i, " does not belong to ", total, " weights in blocks of ", kBlock);
  }
}

// Updates by a rule whose moments are all kept as they are, or all as codes.
template <class Rule, class... CodedMoments>
void update(const at::Tensor& weight, const at::Tensor& grad, Tensors moments, bool whole, Numbers numbers) {
  const bool is_coded = moments.size() == 2 * sizeof...(CodedMoments);
  check(weight, moments, is_coded);
  const auto g = grad.to(at::kFloat).contiguous();
  TORCH_CHECK(g.numel() == weight.numel(), "the gradient is not that of the weights");
  if (whole && !is_finite(g)) return;
  const Rule rule(numbers);
  [&]<size_t... i>(std::index_sequence<i...>) {
    if (is_coded)
      walk(rule, weight, g, CodedMoments(moments[2 * i], moments[2 * i + 1])...);
    else
      walk(rule, weight, g, Full(moments[i])...);
  }(std::index_sequence_for<CodedMoments...>{});
}

void adam(const at::Tensor& weight, const at::Tensor& grad, Tensors moments, bool whole, Numbers numbers,
          bool is_hf) {
  const auto run = is_hf ? update<Adam<true>, Coded<true>, Coded<false>>
                         : update<Adam<false>, Coded<true>, Coded<false>>;
  run(weight, grad, moments, whole, numbers);
}

void lion(const at::Tensor& weight, const at::Tensor& grad, Tensors moments, bool whole, Numbers numbers) {
  update<Lion, Coded<true>>(weight, grad, moments, whole, numbers);
}

void sgd(const at::Tensor& weight, const at::Tensor& grad, Tensors moments, bool whole, Numbers numbers,
         bool is_nesterov) {
  const auto run = is_nesterov ? update<Sgd<true>, Coded<true>> : update<Sgd<false>, Coded<true>>;
  run(weight, grad, moments, whole, numbers);
}

// ---- blocks with one second moment -------------------------------------------------------------------

// Adam-mini: a second moment is one number for a block of consecutive elements, the mean of their squares.
void adam_mini(const at::Tensor& weight, const at::Tensor& grad, Tensors moments, Numbers numbers) {
  const auto g = grad.to(at::kFloat).contiguous();
  const int64_t blocks = moments[1].numel(), length = weight.numel() / blocks;
  TORCH_CHECK(weight.is_contiguous() && moments[0].is_contiguous(), "the weights do not lie in order");
  TORCH_CHECK(blocks * length == weight.numel() && g.numel() == weight.numel() &&
                  moments[0].numel() == weight.numel(),
              "the moments do not belong to ", weight.numel(), " weights in ", blocks, " blocks");
  const auto squares = squares_of(g.view({blocks, length}), false);
  if (!(absmax(squares.data(), blocks) <= kLargest)) return;  // NaN, too
  const Adam<false> rule(numbers);
  auto* weights = weight.mutable_data_ptr<float>();
  auto* firsts = moments[0].mutable_data_ptr<float>();
  auto* seconds = moments[1].mutable_data_ptr<float>();
  const auto* grads = g.const_data_ptr<float>();
  at::parallel_for(0, blocks, at_once(length), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float& v = seconds[block];
      v = rule.beta2 * v + rule.rest2 * (squares[block] / static_cast<float>(length));
      const float bottom = std::sqrt(v) * rule.inv_root_c2 + rule.eps;
      for (int64_t first = block * length; first < (block + 1) * length; first += kBlock) {
        float* __restrict w = weights + first;
        float* __restrict m = firsts + first;
        const float* __restrict x = grads + first;
        const int64_t count = std::min(kBlock, (block + 1) * length - first);
        fetch_next(w), fetch_next(m), fetch_next(x);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          m[i] = rule.beta1 * m[i] + rule.rest1 * x[i];
          w[i] = w[i] - rule.decay * w[i] - rule.size * ((m[i] * rule.inv_c1) / bottom);
        }
      }
    }
  });
}

// ---- in a subspace -----------------------------------------------------------------------------------

// Renews moments, limiter and weights. `of_g` and `of_r` are the squared norms of channels, the first for the
// limiter alone, whose last norm is `last`; `g` is given where the lift reads it.
template <bool is_hf>
void step_projected(const at::Tensor& weight, const at::Tensor& g, const at::Tensor& r,
                    const at::Tensor& basis, const Floats& of_g, const Floats& of_r, Tensors moments,
                    float* last, Numbers numbers, const Lift& lift, bool transposed) {
  const auto direction = at::empty_like(r);
  update<Direction<is_hf>, Coded<true>, Coded<false>>(direction, r, moments, false, numbers);
  const float decay = Adam<is_hf>(numbers).decay;
  Floats phi;
  if (g.defined()) {
    phi = ratios(lift, squares_of(direction, false), of_r);
    if (last) limit_growth(lift, phi, of_g, of_r, *last);
  }
  if (lift.pulls) pull_back(lift, direction, r, phi);
  for (float& each : phi) each *= lift.factor;
  if (!lift.pulls)
    move<is_hf>(weight, g, transposed, phi, decay);
  else if (g.defined())
    move_back<is_hf, true>(weight, g, direction, basis, transposed, phi, decay);
  else
    move_back<is_hf, false>(weight, g, direction, basis, transposed, phi, decay);
}

void adam_projected(const at::Tensor& weight, const std::optional<at::Tensor>& grad,
                    const std::optional<at::Tensor>& sketch, const at::Tensor& basis_given, Tensors moments,
                    const std::optional<at::Tensor>& limiter, Numbers numbers, Numbers lift_numbers,
                    bool is_hf, bool per_matrix, bool pulls, bool reads, bool transposed) {
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2, "the weights do not lie in order");
  TORCH_CHECK(grad || (sketch && !reads), "the gradient is missing");
  const auto g = grad ? grad->to(at::kFloat).contiguous() : at::Tensor();
  TORCH_CHECK(!grad || g.sizes() == weight.sizes(), "the gradient is not that of the weights");
  const Layout layout(weight, transposed);
  auto basis = basis_given.to(at::kFloat);
  TORCH_CHECK(basis.dim() == 2 && basis.size(0) == layout.length(), "the basis is not that of the weights");
  if (basis.stride(0) != 1 && basis.stride(1) != 1) basis = basis.contiguous();
  const auto r = sketch ? sketch->to(at::kFloat).contiguous()
                        : at::empty({layout.channels(), basis.size(1)}, weight.options());
  TORCH_CHECK(r.dim() == 2 && r.size(0) == layout.channels(), "R has not the channels of the weights");
  TORCH_CHECK(r.size(1) == basis.size(1), "R has not the rank of the basis");
  const Floats of_g = sketch ? Floats() : projected(g, basis, transposed, r, limiter.has_value());
  const Floats of_r = reads ? squares_of(r, false) : Floats();
  // Squares beyond float32 count as not finite: they would stay in the limiter's norm for ever.
  if (!(reads ? absmax(of_r.data(), layout.channels()) <= kLargest : is_finite(r))) return;
  auto* last = limiter ? limiter->mutable_data_ptr<float>() : nullptr;
  const auto run = is_hf ? step_projected<true> : step_projected<false>;
  run(weight, reads ? g : at::Tensor(), r, basis, of_g, of_r, moments, last, numbers,
      Lift(lift_numbers, per_matrix, pulls), transposed);
}

}  // namespace scrimp

TORCH_LIBRARY(scrimp_cpu, m) {
  m.def("encode(Tensor rows, bool signed) -> (Tensor, Tensor)");
  m.def("decode(Tensor codes, Tensor scale, bool signed) -> Tensor");
  m.def(
      "adam(Tensor(a!) weight, Tensor grad, Tensor(b!)[] moments, bool whole, float[] numbers, bool hf) "
      "-> ()");
  m.def(
      "adafactor(Tensor(a!) weight, Tensor grad, Tensor(b!)[] moments, float[] numbers, bool scales) -> ()");
  m.def("adam_mini(Tensor(a!) weight, Tensor grad, Tensor(b!)[] moments, float[] numbers) -> ()");
  m.def("lion(Tensor(a!) weight, Tensor grad, Tensor(b!)[] moments, bool whole, float[] numbers) -> ()");
  m.def(
      "sgd(Tensor(a!) weight, Tensor grad, Tensor(b!)[] moments, bool whole, float[] numbers, bool nesterov) "
      "-> ()");
  m.def(
      "adam_projected(Tensor(a!) weight, Tensor? grad, Tensor? sketch, Tensor basis, Tensor(b!)[] moments, "
      "Tensor(c!)? limiter, float[] numbers, float[] lift, bool hf, bool per_matrix, bool pulls, bool reads, "
      "bool transposed) -> ()");
  m.def("draw(Tensor(a!) basis, int seed) -> ()");
  m.def("set_normals(Tensor radii, Tensor points) -> ()");
  m.def("set_tables(Tensor bins, Tensor values, Tensor ends, Tensor lines, bool signed) -> ()");
}

TORCH_LIBRARY_IMPL(scrimp_cpu, CPU, m) {
  m.impl("encode", scrimp::encode);
  m.impl("decode", scrimp::decode);
  m.impl("adam", scrimp::adam);
  m.impl("adafactor", scrimp::adafactor);
  m.impl("adam_mini", scrimp::adam_mini);
  m.impl("lion", scrimp::lion);
  m.impl("sgd", scrimp::sgd);
  m.impl("adam_projected", scrimp::adam_projected);
  m.impl("draw", scrimp::draw);
  m.impl("set_normals", scrimp::set_normals);
  m.impl("set_tables", scrimp::set_tables);
}
