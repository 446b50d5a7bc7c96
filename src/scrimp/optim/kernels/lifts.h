// What becomes of a matrix W when the step in the subspace is known (lifts/back.py, residual.py, scaling.py):
//
//     phi_i = before ||N_i|| / (||R_i|| + 1e-8)                  or one of the whole matrix
//     s_i   = sqrt(||G_i||^2 - inside ||R_i||^2)                 what is limited in growth: phi <- phi / q
//     left  = back (N - phi R)                                   in the subspace
//     W    -= factor phi G + left B^T                            here
//
// A channel is a row of the oriented W (k, d), hence a row of R and N (k, r); in memory W may be transposed,
// so that its channels are columns. G is read twice, once for R and the norms and once for the update: no
// norm of the whole is known before.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "dynamic8.h"
#include "products.h"

namespace scrimp {

using Numbers = at::ArrayRef<double>;
using Floats = std::vector<float>;

constexpr float kShort = 1e-8f;  // lifts/norms.py

// Products and differences of a step's numbers are taken in double and rounded once, as torch does.
inline float rounded(double x) { return static_cast<float>(x); }

// Whether to ask for memory ahead. Intel's own prefetchers stop at the end of a page, so that it saves a
// tenth of AdamW's time there; on AMD's (EPYC of the fourth generation) it costs two fifths more.
#if defined(__x86_64__)
inline const bool asks_ahead = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
inline const bool asks_ahead = false;
#endif

// Asks for the block after the one that begins at `x`.
inline void fetch_next(const float* x) {
  for (int64_t i = kBlock; i < 2 * kBlock && asks_ahead; i += 16) __builtin_prefetch(x + i, 1);
}

// A matrix in memory, and which of its sides are channels.
struct Layout {
  int64_t rows, columns;
  bool transposed;

  Layout(const at::Tensor& matrix, bool is_transposed)
      : rows(matrix.size(0)), columns(matrix.size(1)), transposed(is_transposed) {}
  int64_t channels() const { return transposed ? columns : rows; }
  int64_t length() const { return transposed ? rows : columns; }
};

// How many rows, or columns, of a length are worth a second thread.
inline int64_t at_once(int64_t length) { return kBlocksAtOnce * kBlock / (length + 1) + 1; }

// ---- sums over channels ------------------------------------------------------------------------------

// Finds the squares of the channels from `begin` to `end`, and their products with a column. Sums are sums of
// sums: blocks need not wait for each other, and one sum of thousands of floats would lose two digits.
template <bool has_column>
void sum_rows(const Layout& layout, const float* x, const float* column, int64_t begin, int64_t end,
              float* squares, float* dots) {
  for (int64_t i = begin; i < end; ++i) {
    const float* __restrict row = x + i * layout.columns;
    float square = 0, dot = 0;
    for (int64_t first = 0; first < layout.columns; first += kBlock) {
      float square_here = 0, dot_here = 0;
      fetch_next(row + first);
#pragma omp simd reduction(+ : square_here, dot_here)
      for (int64_t j = first; j < std::min(first + kBlock, layout.columns); ++j) {
        square_here += row[j] * row[j];
        if (has_column) dot_here += row[j] * column[j];
      }
      square += square_here;
      dot += dot_here;
    }
    squares[i] = square;
    if (has_column) dots[i] = dot;
  }
}

// Adds so many rows' squares, and their products with as many numbers.
template <int64_t rows, bool has_column>
void add_rows(const float* __restrict x, int64_t columns, const float* __restrict weights, int64_t count,
              float* __restrict squares, float* __restrict dots) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    float square = 0, dot = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const float value = x[i * columns + j];
      square += value * value;
      if (has_column) dot += value * weights[i];
    }
    squares[j] += square;
    if (has_column) dots[j] += dot;
  }
}

template <bool has_column>
void sum_columns(const Layout& layout, const float* x, const float* column, int64_t begin, int64_t end,
                 float* squares, float* dots) {
  constexpr int64_t kRows = 64, kTogether = 8;  // sums are loaded and stored once for eight rows
  const int64_t count = end - begin;
  std::fill_n(squares + begin, count, 0.0f);
  if (has_column) std::fill_n(dots + begin, count, 0.0f);
  Floats square(count), dot(has_column ? count : 0);
  for (int64_t first = 0; first < layout.rows; first += kRows) {
    const int64_t last = std::min(first + kRows, layout.rows), full = last - (last - first) % kTogether;
    std::fill(square.begin(), square.end(), 0.0f);
    std::fill(dot.begin(), dot.end(), 0.0f);
    const auto add = [&](auto many, int64_t i) {
      const float* weights = has_column ? column + i : nullptr;
      add_rows<many(), has_column>(x + i * layout.columns + begin, layout.columns, weights, count,
                                   square.data(), dot.data());
    };
    for (int64_t i = first; i < full; i += kTogether) add(std::integral_constant<int64_t, kTogether>(), i);
    for (int64_t i = full; i < last; ++i) add(std::integral_constant<int64_t, 1>(), i);
    for (int64_t j = 0; j < count; ++j) squares[begin + j] += square[j];
    for (int64_t j = 0; has_column && j < count; ++j) dots[begin + j] += dot[j];
  }
}

// Returns the sum of squares of each channel; with a column also R = G column, in the same pass.
inline Floats squares_of(const at::Tensor& matrix, bool transposed, const float* column = nullptr,
                         float* r = nullptr) {
  const Layout layout(matrix, transposed);
  const auto* x = matrix.const_data_ptr<float>();
  Floats squares(layout.channels());
  const auto by_rows = column ? sum_rows<true> : sum_rows<false>;
  const auto by_columns = column ? sum_columns<true> : sum_columns<false>;
  const auto run = transposed ? by_columns : by_rows;
  at::parallel_for(0, layout.channels(), at_once(layout.length()), [&](int64_t begin, int64_t end) {
    run(layout, x, column, begin, end, squares.data(), r);
  });
  return squares;
}

// Finds R = G B, and the sum of squares of each channel of G where that is asked for or costs nothing.
inline Floats projected(const at::Tensor& g, const at::Tensor& basis, bool transposed, const at::Tensor& r,
                        bool with_squares) {
  if (basis.size(1) == 1)
    return squares_of(g, transposed, basis.contiguous().const_data_ptr<float>(), r.mutable_data_ptr<float>());
  if (!kMultiplies) {
    at::Tensor out = r;
    at::mm_out(out, transposed ? g.t() : g, basis);
    return with_squares ? squares_of(g, transposed) : Floats();
  }
  Floats squares(with_squares ? r.size(0) : 0);
  project(Factor(g, transposed ? 0 : 1), Factor(basis, 0), r, with_squares ? squares.data() : nullptr);
  return squares;
}

// ---- the lift ----------------------------------------------------------------------------------------

struct Lift {
  bool per_matrix, pulls;  // whether phi is one number, and whether anything is projected back
  float before, inside, gamma, factor, back;

  Lift(Numbers n, bool is_per_matrix, bool is_pulling)
      : per_matrix(is_per_matrix), pulls(is_pulling), before(rounded(n[0])), inside(rounded(n[1])),
        gamma(rounded(n[2])), factor(rounded(n[3])), back(rounded(n[4])) {}
};

inline float ratio(double of_direction, double of_r) {
  return static_cast<float>(std::sqrt(of_direction)) / (static_cast<float>(std::sqrt(of_r)) + kShort);
}

// Returns phi of every channel, before the limiter.
inline Floats ratios(const Lift& lift, const Floats& direction, const Floats& r) {
  Floats phi(r.size());
  if (lift.per_matrix) {
    double of_direction = 0, of_r = 0;
    for (size_t i = 0; i < r.size(); ++i) of_direction += direction[i], of_r += r[i];
    std::fill(phi.begin(), phi.end(), lift.before * ratio(of_direction, of_r));
  } else {
    for (size_t i = 0; i < r.size(); ++i) phi[i] = lift.before * ratio(direction[i], r[i]);
  }
  return phi;
}

// Divides phi by the limiter's q, and renews the norm that the limiter keeps.
inline void limit_growth(const Lift& lift, Floats& phi, const Floats& g, const Floats& r, float& last) {
  double square = 0;
  for (size_t i = 0; i < phi.size(); ++i)
    square += static_cast<double>(phi[i]) * phi[i] * std::max(g[i] - lift.inside * r[i], 0.0f);
  const auto norm = static_cast<float>(std::sqrt(square));
  const float growth = norm / (last + kShort);
  const float q = last > 0 ? std::max(growth, lift.gamma) / lift.gamma : 1.0f;
  for (float& each : phi) each /= q;
  last = norm / q;
}

// Makes of the direction N what is to be projected back and subtracted.
inline void pull_back(const Lift& lift, const at::Tensor& direction, const at::Tensor& r, const Floats& phi) {
  const int64_t width = r.size(1);
  auto* of_step = direction.mutable_data_ptr<float>();
  const auto* of_r = r.const_data_ptr<float>();
  at::parallel_for(0, r.size(0), at_once(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float share = phi.empty() ? 0.0f : phi[i];
      float* __restrict step = of_step + i * width;
      const float* __restrict sketch = of_r + i * width;
      for (int64_t j = 0; j < width; ++j) step[j] = lift.back * (step[j] - share * sketch[j]);
    }
  });
}

// ---- the weights -------------------------------------------------------------------------------------

// What becomes of weights when they change: W -= change, and W -= decay W before or after it.
template <bool decays_last, class T>
T moved(T w, T change, T decay) {
  if (!decays_last) w = w - decay * w;
  w = w - change;
  return decays_last ? w - decay * w : w;
}

// W's update where nothing is projected back: the change is factor G.
template <bool decays_last>
void move(const at::Tensor& weight, const at::Tensor& grad, bool transposed, const Floats& factor,
          float decay) {
  const Layout layout(weight, transposed);
  auto* of_weight = weight.mutable_data_ptr<float>();
  const auto* of_grad = grad.const_data_ptr<float>();
  at::parallel_for(0, layout.rows, at_once(layout.columns), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* __restrict w = of_weight + i * layout.columns;
      const float* __restrict g = of_grad + i * layout.columns;
      const float* __restrict f = factor.data();
      for (int64_t first = 0; first < layout.columns; first += kBlock) {
        const int64_t last = std::min(first + kBlock, layout.columns);
        fetch_next(w + first);
        fetch_next(g + first);
        if (transposed)
          for (int64_t j = first; j < last; ++j) w[j] = moved<decays_last>(w[j], f[j] * g[j], decay);
        else
          for (int64_t j = first; j < last; ++j) w[j] = moved<decays_last>(w[j], f[i] * g[j], decay);
      }
    }
  });
}

// W's update where something is: the change is left B^T, and factor G where there is a gradient.
template <bool decays_last, bool has_gradient>
void move_back(const at::Tensor& weight, const at::Tensor& grad, const at::Tensor& left,
               const at::Tensor& basis, bool transposed, const Floats& factor, float decay) {
  if (!kMultiplies) {
    if (has_gradient)
      move<false>(weight, grad, transposed, factor, decays_last ? 0.0f : decay);
    else if (!decays_last)
      weight.sub_(weight, decay);
    weight.addmm_(transposed ? basis : left, transposed ? left.t() : basis.t(), 1, -1);
    if (decays_last) weight.sub_(weight, decay);
    return;
  }
  const int64_t columns = weight.size(1);
  auto* w = weight.mutable_data_ptr<float>();
  const auto* g = has_gradient ? grad.const_data_ptr<float>() : nullptr;
  const auto* f = factor.data();
  const Factor of_channels(left, 1), of_length(basis, 1);
  merge(
      transposed ? of_length : of_channels, transposed ? of_channels : of_length, weight.options(),
      [=](int64_t i, int64_t j) {
        __builtin_prefetch(w + i * columns + j);
        if (has_gradient) __builtin_prefetch(g + i * columns + j);
      },
      [=](int64_t i, int64_t j, int64_t count, Lanes change) {
        float* to = w + i * columns + j;
        if (has_gradient) {
          const Lanes factors = transposed ? load(f + j, count) : Lanes(f[i]);
          change = change + factors * load(g + i * columns + j, count);
        }
        store(moved<decays_last>(load(to, count), change, Lanes(decay)), to, count);
      });
}

}  // namespace scrimp
