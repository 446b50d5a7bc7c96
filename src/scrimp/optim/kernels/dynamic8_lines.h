// The dynamic 8-bit code with AVX-512: sixteen numbers at once, by the lines of dynamic_map.py.
//
// A line holds the numbers of a decade; 0 and 1 have flat ones of their own. No two lines end in one binade,
// so that the exponent of |x| tells the line but for one comparison, and what belongs to a line or an
// exponent is a permutation of one or two registers: look-ups in memory take three times as long on AMD's
// processors. The float operations are those of the reference, one by one.

#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace scrimp {

constexpr int64_t kRegister = 16;  // numbers

struct Lines {
  // For each of the last 32 exponents up to that of 1, counted modulo 32: its line (the low 9 bits, of which
  // permutations read four) and the mantissa, less one, from which on it is the next (all ones: never).
  alignas(64) int32_t ends[32];
  // For each line: u = slope |x| + start, and the largest rank.
  alignas(64) float slopes[kRegister], starts[kRegister], lasts[kRegister];
  // For each exponent of a rank + 1/2, modulo 16: |x| = step (rank + 1/2) - shift.
  alignas(64) float steps[kRegister], shifts[kRegister];
};
inline Lines lines_of[2];  // without sign, with sign

inline void set_tables(const at::Tensor&, const at::Tensor&, const at::Tensor& ends, const at::Tensor& lines,
                       bool is_signed) {
  Lines& of = lines_of[is_signed];
  std::copy_n(ends.const_data_ptr<int32_t>(), 2 * kRegister, of.ends);
  const auto* from = lines.const_data_ptr<float>();
  for (float* to : {of.slopes, of.starts, of.lasts, of.steps, of.shifts}) {
    std::copy_n(from, kRegister, to);
    from += kRegister;
  }
}

inline __m512 with_sign_of(__m512 magnitude, __m512 x) {
  return _mm512_or_ps(magnitude, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

template <bool is_signed>
struct Coder {
  __m512i ends_low, ends_high;
  __m512 slopes, starts, lasts, inverse;

  explicit Coder(float scale) : inverse(_mm512_set1_ps(1.0f / std::max(scale, kTiny))) {
    const Lines& of = lines_of[is_signed];
    ends_low = _mm512_load_si512(of.ends), ends_high = _mm512_load_si512(of.ends + kRegister);
    slopes = _mm512_load_ps(of.slopes), starts = _mm512_load_ps(of.starts), lasts = _mm512_load_ps(of.lasts);
  }

  __m128i operator()(__m512 x) const {
    constexpr int kSmallerMagnitude = 0b1000 | 0b10;  // without sign; of a NaN and a number, the number
    const __m512 scaled = _mm512_mul_ps(x, inverse), one = _mm512_set1_ps(1.0f);
    const __m512 bounded =
        is_signed ? _mm512_range_ps(scaled, one, kSmallerMagnitude) : _mm512_min_ps(scaled, one);
    const __m512 size = _mm512_max_ps(bounded, _mm512_set1_ps(0x1p-30f));
    const __m512i bits = _mm512_castps_si512(size);
    const __m512i end = _mm512_permutex2var_epi32(ends_low, _mm512_srli_epi32(bits, 23), ends_high);
    const __mmask16 is_beyond = _mm512_cmpgt_epu32_mask(_mm512_slli_epi32(bits, 9), end);
    const __m512i line = _mm512_mask_add_epi32(end, is_beyond, end, _mm512_set1_epi32(1));
    const __m512 rise = _mm512_mul_ps(_mm512_permutexvar_ps(line, slopes), size);
    const __m512 u = _mm512_add_ps(rise, _mm512_permutexvar_ps(line, starts));
    const __m512 place = _mm512_min_ps(u, _mm512_permutexvar_ps(line, lasts));
    if (!is_signed)
      return _mm_sub_epi8(_mm512_cvtepi32_epi8(_mm512_cvttps_epi32(place)), _mm_set1_epi8(1));
    // From -128 to 127, where -1 saturates: it has no code.
    const __m512i rank = _mm512_cvttps_epi32(with_sign_of(place, scaled));
    const __m128i code = _mm512_cvtsepi32_epi8(_mm512_sub_epi32(rank, _mm512_set1_epi32(1)));
    return _mm_xor_si128(code, _mm_set1_epi8(-128));
  }
};

template <bool is_signed>
void encode_row(const float* __restrict x, int64_t count, float scale, uint8_t* __restrict codes) {
  const Coder<is_signed> coded(scale);
  const int64_t full = count - count % kRegister;
  for (int64_t i = 0; i < full; i += kRegister)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), coded(_mm512_loadu_ps(x + i)));
  const __mmask16 rest = (1 << (count - full)) - 1;
  if (rest) _mm_mask_storeu_epi8(codes + full, rest, coded(_mm512_maskz_loadu_ps(rest, x + full)));
}

// The values of a block.
template <bool is_signed>
class Decoder {
  __m512 steps, shifts, scale;

  __m512 sixteen(__m128i codes) const {
    const __m512i code = _mm512_cvtepu8_epi32(codes);
    const __m512i place = is_signed ? _mm512_sub_epi32(code, _mm512_set1_epi32(127)) : code;
    const __m512 rank = _mm512_cvtepi32_ps(is_signed ? _mm512_abs_epi32(place) : place);
    const __m512 middle = _mm512_add_ps(rank, _mm512_set1_ps(is_signed ? 0.5f : 1.5f));
    const __m512i line = _mm512_srli_epi32(_mm512_castps_si512(middle), 23);
    const __m512 risen = _mm512_mul_ps(middle, _mm512_permutexvar_ps(line, steps));
    const __m512 size = _mm512_sub_ps(risen, _mm512_permutexvar_ps(line, shifts));
    return _mm512_mul_ps(is_signed ? with_sign_of(size, _mm512_castsi512_ps(place)) : size, scale);
  }

 public:
  explicit Decoder(float of_block) : scale(_mm512_set1_ps(of_block)) {
    const Lines& of = lines_of[is_signed];
    steps = _mm512_load_ps(of.steps), shifts = _mm512_load_ps(of.shifts);
  }

  void operator()(const uint8_t* __restrict codes, int64_t count, float* __restrict x) const {
    const int64_t full = count - count % kRegister;
    for (int64_t i = 0; i < full; i += kRegister)
      _mm512_storeu_ps(x + i, sixteen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i))));
    const __mmask16 rest = (1 << (count - full)) - 1;
    if (rest) _mm512_mask_storeu_ps(x + full, rest, sixteen(_mm_maskz_loadu_epi8(rest, codes + full)));
  }
};

}  // namespace scrimp
