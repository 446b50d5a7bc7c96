// Products of a matrix with a basis of low rank, each in one pass over the matrix:
//
//     project     R = G B, and the squared norms of G's channels
//     merge       W(i, j) becomes what is made of it and of (X Y^T)(i, j)
//
// A product is found in tiles of kTall x kPanel sums, which stay in registers: step by step along the inner
// side, kTall numbers of one factor meet a panel's vectors of the other. Factors are packed in the order in
// which tiles read them; of G a block at a time, which stays in the nearest cache until every tile has met
// it. MKL multiplies as fast, but then W and G cross the memory once more for what else is to be done.

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
  const float* at(int64_t i, int64_t k) const {
    return values + (has_rows ? i * stride + k : k * stride + i);
  }
};

// Copies a matrix (rows, columns), of kLanes at most, as its transpose.
inline void turn(const float* x, int64_t stride, float* out, int64_t out_stride, int64_t rows,
                 int64_t columns) {
  at::vec::transpose_mxn<float>(x, stride, out, out_stride, static_cast<int>(rows),
                                static_cast<int>(columns));
}

// Packs the part of a factor that begins at (i, k) as (depth, width), with zeros beyond its end.
inline void pack(const Factor& factor, int64_t i, int64_t k, int64_t depth, int64_t width, float* out) {
  const int64_t count = std::min(width, factor.across - i);
  if (factor.has_rows) {
    for (int64_t first = 0; first < depth; first += kLanes)
      for (int64_t c = 0; c < count; c += kLanes)
        turn(factor.at(i + c, k + first), factor.stride, out + first * width + c, width,
             std::min(kLanes, count - c), std::min(kLanes, depth - first));
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

// A thread's own: a block of a panel of G packed, the sums of all its tiles, (rank, kPanel), and its squares.
struct Panel {
  std::vector<Lanes> held;  // which lie on the borders of cache lines
  float *block, *sums;
  Lanes squares[kWide];

  explicit Panel(int64_t tiles)
      : held(kDepth * kWide + tiles * kTall * kWide), block(reinterpret_cast<float*>(held.data())),
        sums(block + kDepth * kPanel) {}

  void clear(int64_t from, int64_t to) {
    std::fill(sums + from * kTile, sums + to * kTile, 0.0f);
    std::fill(squares, squares + kWide, Lanes(0.0f));
  }
  void add_squares(int64_t depth) {
    for (int64_t row = 0; row < depth; ++row)
      for (int64_t j = 0; j < kWide; ++j) {
        const auto x = Lanes::loadu(block + row * kPanel + j * kLanes);
        squares[j] = at::vec::fmadd(x, x, squares[j]);
      }
  }
  void add_product(int64_t tile, const float* tall, int64_t depth) {
    float* of_tile = sums + tile * kTile;
    const auto place = [of_tile](int64_t i, int64_t j) { return of_tile + i * kPanel + j * kLanes; };
    Sums found;
    each_of(found, [&](int64_t i, int64_t j, Lanes& sum) { sum = Lanes::loadu(place(i, j)); });
    multiply(tall, block, depth, found);
    each_of(found, [&](int64_t i, int64_t j, Lanes& sum) { sum.store(place(i, j)); });
  }
  // Writes rows `from` to `to` of the sums as columns of R, whose rows for the panel's channels begin at `r`.
  void hand_out(int64_t from, int64_t to, int64_t count, float* r, int64_t rank) const {
    for (int64_t row = from; row < to; row += kLanes)
      for (int64_t c = 0; c < count; c += kLanes)
        turn(sums + row * kPanel + c, kPanel, r + c * rank + row, rank, std::min(kLanes, to - row),
             std::min(kLanes, count - c));
  }
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
    Panel panel(tiles);
    for (int64_t next = begin, last; next < end; next = last) {
      const int64_t channel = next / tiles * kPanel, from = next % tiles;
      const int64_t to = std::min(tiles, from + end - next), count = std::min(kPanel, g.across - channel);
      last = next + to - from;
      panel.clear(from, to);
      for (int64_t k = 0; k < length; k += kDepth) {
        const int64_t depth = std::min(kDepth, length - k);
        pack(g, channel, k, depth, kPanel, panel.block);
        if (squares && from == 0) panel.add_squares(depth);
        for (int64_t tile = from; tile < to; ++tile)
          panel.add_product(tile, of_basis + (tile * length + k) * kTall, depth);
      }
      panel.hand_out(from * kTall, std::min(rank, to * kTall), count, out + channel * rank, rank);
      for (int64_t j = 0; j * kLanes < count && squares && from == 0; ++j)
        store(panel.squares[j], squares + channel + j * kLanes, count - j * kLanes);
    }
  });
}

// Calls `use(i, j, count, product)` for every vector of X Y^T, `count` elements of row i from column j on,
// and `fetch(i, j)` for it before its product is begun.
template <class Fetch, class Use>
void merge(const Factor& x, const Factor& y, const at::TensorOptions& options, const Fetch fetch,
           const Use use) {
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
      each_of(sums, [&](int64_t i, int64_t j, const Lanes& sum) {
        use(row + i, column + j * kLanes, kLanes, sum);
      });
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
