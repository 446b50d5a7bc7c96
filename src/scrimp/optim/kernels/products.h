// Products of a matrix with a basis of low rank, each in one pass over the matrix:
//
//     project     R = G B, and the squared norms of G's channels
//     merge       W(i, j) becomes what is made of it and of (X Y^T)(i, j)
//
// A product is found in tiles of kTall x kPanel sums, which stay in registers: step by step along the inner side,
// kTall numbers of one factor meet a panel's vectors of the other. Factors are packed in the order in which tiles
// read them; of G a block at a time, which stays in the nearest cache until every tile has met it. MKL multiplies
// as fast, but then W and G cross the memory once more for what else is to be done with them.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace scrimp {

using Lanes = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Lanes::size();
// Elsewhere torch multiplies: on Apple's chips, say, by a unit that no code but its maker's can reach.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr bool kMultiplies = true;
#else
constexpr bool kMultiplies = false;
#endif
constexpr int64_t kTall = kLanes == 8 ? 4 : 8;  // AVX2 has 16 registers, AVX-512 32
constexpr int64_t kWide = 3;
constexpr int64_t kPanel = kWide * kLanes;
constexpr int64_t kDepth = 128;  // of a block of G: 24 KiB at 16 lanes
constexpr int64_t kTile = kTall * kPanel;

inline int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }

inline Lanes load(const float* x, int64_t count) {
  return count >= kLanes ? Lanes::loadu(x) : Lanes::loadu(x, count);
}
inline void store(const Lanes& lanes, float* x, int64_t count) {
  count >= kLanes ? lanes.store(x) : lanes.store(x, count);
}

// A matrix as a product sees it: (across, along), the second side being summed over.
struct Factor {
  const float* values;
  int64_t across, along, stride;
  bool has_rows;  // whether what lies in order is what is summed over

  // `along` is the side of `matrix`, which lies row by row or column by column.
  Factor(const at::Tensor& matrix, int64_t side)
      : values(matrix.const_data_ptr<float>()), across(matrix.size(1 - side)), along(matrix.size(side)),
        stride(std::max<int64_t>(matrix.stride(0), matrix.stride(1))), has_rows(matrix.stride(side) == 1) {
    if (matrix.stride(0) == matrix.stride(1)) stride = 1;  // a column, or one number
  }
  const float* at(int64_t i, int64_t k) const { return values + (has_rows ? i * stride + k : k * stride + i); }
};

// Packs the part of a factor that begins at (i, k) as (depth, width), with zeros beyond its end.
inline void pack(const Factor& factor, int64_t i, int64_t k, int64_t depth, int64_t width, float* out) {
  const int64_t count = std::min(width, factor.across - i);
  if (factor.has_rows) {
    for (int64_t first = 0; first < depth; first += kLanes)
      for (int64_t c = 0; c < count; c += kLanes)
        at::vec::transpose_mxn<float>(factor.at(i + c, k + first), factor.stride, out + first * width + c, width,
                                      static_cast<int>(std::min(kLanes, count - c)),
                                      static_cast<int>(std::min(kLanes, depth - first)));
  } else {
    for (int64_t row = 0; row < depth; ++row) std::copy_n(factor.at(i, k + row), count, out + row * width);
  }
  for (int64_t row = 0; row < depth && count < width; ++row)
    std::fill(out + row * width + count, out + (row + 1) * width, 0.0f);
}

// Packs all of a factor, (parts, along, width).
inline at::Tensor packed(const Factor& factor, int64_t width, const at::TensorOptions& options) {
  const auto held = at::empty({parts(factor.across, width), factor.along, width}, options);
  auto* out = held.mutable_data_ptr<float>();
  at::parallel_for(0, held.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      pack(factor, part * width, 0, factor.along, width, out + part * factor.along * width);
  });
  return held;
}

using Sums = Lanes[kTall][kWide];

// Adds to a tile what `depth` steps of a packed (depth, kTall) and a packed (depth, kPanel) come to.
inline void multiply(const float* tall, const float* panel, int64_t depth, Sums& sums) {
  for (int64_t k = 0; k < depth; ++k) {
    Lanes row[kWide];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kWide; ++j) row[j] = Lanes::loadu(panel + k * kPanel + j * kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTall; ++i) {
      const Lanes each(tall[k * kTall + i]);
#pragma GCC unroll 4
      for (int64_t j = 0; j < kWide; ++j) sums[i][j] = at::vec::fmadd(each, row[j], sums[i][j]);
    }
  }
}

// Calls `use(i, j, sum)` for every vector of a tile.
template <class Use>
inline void each_of(Sums& sums, const Use& use) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTall; ++i)
#pragma GCC unroll 4
    for (int64_t j = 0; j < kWide; ++j) use(i, j, sums[i][j]);
}

// A thread's own: a block of G packed, and the sums of all tiles of a panel.
struct Workplace {
  std::vector<Lanes> held;  // which lie on the borders of cache lines
  float *panel, *sums;

  explicit Workplace(int64_t tiles)
      : held(kDepth * kWide + tiles * kTall * kWide), panel(reinterpret_cast<float*>(held.data())),
        sums(panel + kDepth * kPanel) {}
};

// Finds R = G B and, where `squares` is given, the squared norms of G's channels.
//
// g: G as (channels, length). basis: B as (rank, length). r: (channels, rank), row by row.
inline void project(const Factor& g, const Factor& basis, const at::Tensor& r, float* squares) {
  const int64_t tiles = parts(basis.across, kTall), rank = basis.across, length = g.along;
  const auto tall = packed(basis, kTall, r.options());
  const auto* of_basis = tall.const_data_ptr<float>();
  auto* out = r.mutable_data_ptr<float>();
  // Threads share panels and tiles as one range: panels alone may be too few to be shared evenly.
  at::parallel_for(0, parts(g.across, kPanel) * tiles, tiles, [&](int64_t begin, int64_t end) {
    const Workplace work(tiles);
    for (int64_t next = begin, last; next < end; next = last) {
      const int64_t channel = next / tiles * kPanel, from = next % tiles;
      const int64_t to = std::min(tiles, from + end - next), count = std::min(kPanel, g.across - channel);
      last = next + to - from;
      const bool finds_squares = squares && from == 0;
      Lanes square[kWide] = {Lanes(0.0f), Lanes(0.0f), Lanes(0.0f)};
      std::fill(work.sums + from * kTile, work.sums + to * kTile, 0.0f);
      for (int64_t k = 0; k < length; k += kDepth) {
        const int64_t depth = std::min(kDepth, length - k);
        pack(g, channel, k, depth, kPanel, work.panel);
        for (int64_t row = 0; row < depth && finds_squares; ++row)
          for (int64_t j = 0; j < kWide; ++j) {
            const auto x = Lanes::loadu(work.panel + row * kPanel + j * kLanes);
            square[j] = at::vec::fmadd(x, x, square[j]);
          }
        for (int64_t tile = from; tile < to; ++tile) {
          float* held = work.sums + tile * kTile;
          Sums sums;
          each_of(sums, [&](int64_t i, int64_t j, Lanes& sum) { sum = Lanes::loadu(held + i * kPanel + j * kLanes); });
          multiply(of_basis + (tile * length + k) * kTall, work.panel, depth, sums);
          each_of(sums, [&](int64_t i, int64_t j, Lanes& sum) { sum.store(held + i * kPanel + j * kLanes); });
        }
      }
      for (int64_t row = from * kTall; row < std::min(rank, to * kTall); row += kLanes)
        for (int64_t c = 0; c < count; c += kLanes)
          at::vec::transpose_mxn<float>(work.sums + row * kPanel + c, kPanel, out + (channel + c) * rank + row, rank,
                                        static_cast<int>(std::min({kLanes, rank - row, to * kTall - row})),
                                        static_cast<int>(std::min(kLanes, count - c)));
      for (int64_t j = 0; j < kWide && finds_squares && j * kLanes < count; ++j)
        store(square[j], squares + channel + j * kLanes, count - j * kLanes);
    }
  });
}

// Calls `use(i, j, count, product)` for every vector of X Y^T, `count` elements of row i from column j on, and
// `fetch(i, j)` for it before its product is begun.
template <class Fetch, class Use>
void merge(const Factor& x, const Factor& y, const at::TensorOptions& options, const Fetch fetch, const Use use) {
  constexpr int64_t kAtOnce = 8;  // tiles and panels that stay in the second cache
  const auto tall = packed(x, kTall, options), wide = packed(y, kPanel, options);
  const auto *of_x = tall.const_data_ptr<float>(), *of_y = wide.const_data_ptr<float>();
  const int64_t panels = wide.size(0), depth = x.along;
  const auto at_tile = [&](int64_t tile, int64_t panel) {
    const int64_t row = tile * kTall, column = panel * kPanel;
    const int64_t rows = std::min(kTall, x.across - row), columns = std::min(kPanel, y.across - column);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += kLanes) fetch(row + i, column + j);
    Sums sums;
    each_of(sums, [](int64_t, int64_t, Lanes& sum) { sum = Lanes(0.0f); });
    multiply(of_x + tile * depth * kTall, of_y + panel * depth * kPanel, depth, sums);
    if (rows == kTall && columns == kPanel)
      each_of(sums, [&](int64_t i, int64_t j, const Lanes& sum) { use(row + i, column + j * kLanes, kLanes, sum); });
    else
      each_of(sums, [&](int64_t i, int64_t j, const Lanes& sum) {
        if (i < rows && j * kLanes < columns)
          use(row + i, column + j * kLanes, std::min(kLanes, columns - j * kLanes), sum);
      });
  };
  at::parallel_for(0, tall.size(0), kAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t low = begin; low < end; low += kAtOnce)
      for (int64_t left = 0; left < panels; left += kAtOnce)
        for (int64_t tile = low; tile < std::min(end, low + kAtOnce); ++tile)
          for (int64_t panel = left; panel < std::min(panels, left + kAtOnce); ++panel) at_tile(tile, panel);
  });
}

}  // namespace scrimp
