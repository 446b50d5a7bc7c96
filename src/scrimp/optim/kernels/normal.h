// Normal numbers on a CPU: bit for bit what base/counter_random.py draws, from table look-ups.
//
// A hash of (seed, index) gives two numbers, of 2^16 radii (upper half) and 2^16 angles (lower half). Python
// makes the tables with torch's own logarithm and cosine, and sets them once.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace scrimp {

struct Normals {
  std::vector<float> radii, points;  // points: cosine and sine of each angle, side by side
};
inline Normals normals;

inline void set_normals(const at::Tensor& radii, const at::Tensor& points) {
  const auto copied = [](const at::Tensor& t) {
    const auto* values = t.const_data_ptr<float>();
    return std::vector<float>(values, values + t.numel());
  };
  normals = {copied(radii), copied(points)};
}

inline uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x7FEB352D;
  x = (x ^ x >> 15) * 0x846CA68B;
  return x ^ x >> 16;
}

// Fills a basis (d, r) with N(0, 1 / r): cosines in its first half, sines in the second.
inline void draw(const at::Tensor& basis, int64_t seed) {
  constexpr int64_t kAtOnce = 1 << 12;
  const auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const int64_t total = basis.numel(), half = (total + 1) / 2;
  const auto root = static_cast<float>(std::sqrt(static_cast<double>(basis.size(-1))));
  const float* __restrict radii = normals.radii.data();
  const float* __restrict points = normals.points.data();
  float* __restrict first = basis.mutable_data_ptr<float>();
  float* __restrict second = first + half;
  at::parallel_for(0, half, kAtOnce, [&](int64_t begin, int64_t end) {
    const auto hashed = [=](int64_t i) {
      return mixed(mixed(static_cast<uint32_t>(i) * 0x9E3779B1 + low) ^ high);
    };
    const int64_t paired = std::min(end, total - half);  // an odd number lacks the last sine
#pragma omp simd
    for (int64_t i = begin; i < paired; ++i) {
      const uint32_t bits = hashed(i);
      const float radius = radii[bits >> 16];
      first[i] = points[2 * (bits & 0xffff)] * radius / root;
      second[i] = points[2 * (bits & 0xffff) + 1] * radius / root;
    }
    for (int64_t i = paired; i < end; ++i) {
      const uint32_t bits = hashed(i);
      first[i] = points[2 * (bits & 0xffff)] * radii[bits >> 16] / root;
    }
  });
}

}  // namespace scrimp
