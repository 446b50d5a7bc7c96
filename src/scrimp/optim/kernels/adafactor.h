// Adafactor's step on a matrix without momentum (rules/adafactor.py), in three reads of G:
//
//     its squares by rows and columns      renew both factors a, b of the second moment
//     its squares over both                give RMS(U), U_ij = G_ij / sqrt(a_i / mean(a)) / sqrt(b_j)
//     itself                               moves W
//
// Sums are made of chunks of rows whose number does not depend on that of threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "lifts.h"

namespace scrimp {

constexpr int64_t kRowsAtOnce = 64;

// Calls `use(chunk, row)` for every row.
template <class Use>
void by_chunks(int64_t rows, int64_t columns, const Use& use) {
  const int64_t grain = std::max<int64_t>(1, at_once(columns) / kRowsAtOnce);
  at::parallel_for(0, parts(rows, kRowsAtOnce), grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      for (int64_t i = chunk * kRowsAtOnce; i < std::min(rows, (chunk + 1) * kRowsAtOnce); ++i) use(chunk, i);
  });
}

// Returns the sums of squares of all rows and of all columns.
inline std::pair<Floats, Floats> squares_by_both(const float* x, int64_t rows, int64_t columns) {
  Floats of_rows(rows), of_columns(columns), held(parts(rows, kRowsAtOnce) * columns);
  by_chunks(rows, columns, [&](int64_t chunk, int64_t i) {
    const float* __restrict row = x + i * columns;
    float* __restrict column = held.data() + chunk * columns;
    float total = 0;
    for (int64_t first = 0; first < columns; first += kBlock) {
      float here = 0;
      fetch_next(row + first);
#pragma omp simd reduction(+ : here)
      for (int64_t j = first; j < std::min(first + kBlock, columns); ++j) {
        const float square = row[j] * row[j];
        column[j] += square;
        here += square;
      }
      total += here;
    }
    of_rows[i] = total;
  });
  for (size_t first = 0; first < held.size(); first += columns)
    for (int64_t j = 0; j < columns; ++j) of_columns[j] += held[first + j];
  return {of_rows, of_columns};
}

// Returns the sum over a matrix of x^2 times the squares of its row's and its column's number.
inline double weighted_squares(const float* x, const Floats& of_rows, const Floats& of_columns) {
  const auto rows = static_cast<int64_t>(of_rows.size()), columns = static_cast<int64_t>(of_columns.size());
  std::vector<double> sums(parts(rows, kRowsAtOnce));
  by_chunks(rows, columns, [&](int64_t chunk, int64_t i) {
    const float* __restrict row = x + i * columns;
    const float* __restrict weight = of_columns.data();
    double total = 0;
    for (int64_t first = 0; first < columns; first += kBlock) {
      float here = 0;
#pragma omp simd reduction(+ : here)
      for (int64_t j = first; j < std::min(first + kBlock, columns); ++j)
        here += (row[j] * weight[j]) * (row[j] * weight[j]);
      total += here;
    }
    sums[chunk] += total * of_rows[i] * of_rows[i];
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// Renews a factor of the second moment by means of squares.
inline void renew(float* factor, const Floats& squares, int64_t count, double beta2, float eps) {
  const float old = rounded(beta2), fresh = rounded(1 - beta2);
  for (size_t i = 0; i < squares.size(); ++i)
    factor[i] = old * factor[i] + fresh * (squares[i] / static_cast<float>(count) + eps);
}

// numbers: rewarm, weight decay, beta2, rho, what is added to squares, the least RMS(W), the largest RMS(U).
inline void adafactor(const at::Tensor& weight, const at::Tensor& grad, at::TensorList moments,
                      Numbers numbers, bool scales) {
  const auto g = grad.to(at::kFloat).contiguous();
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == 2, "the weights do not lie in order");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  TORCH_CHECK(g.sizes() == weight.sizes() && moments[0].is_contiguous() && moments[1].is_contiguous() &&
                  moments[0].numel() == rows && moments[1].numel() == columns,
              "gradient or factors are not those of the weights");
  const auto* x = g.const_data_ptr<float>();
  auto* w = weight.mutable_data_ptr<float>();
  auto *row = moments[0].mutable_data_ptr<float>(), *column = moments[1].mutable_data_ptr<float>();
  const auto [of_rows, of_columns] = squares_by_both(x, rows, columns);
  if (!(absmax(of_rows.data(), rows) <= kLargest)) return;  // NaN, too
  renew(row, of_rows, columns, numbers[2], rounded(numbers[4]));
  renew(column, of_columns, rows, numbers[2], rounded(numbers[4]));

  const auto middle = static_cast<float>(std::accumulate(row, row + rows, 0.0) / static_cast<double>(rows));
  Floats a(rows), b(columns);
  for (int64_t i = 0; i < rows; ++i) a[i] = 1.0f / std::sqrt(row[i] / middle);
  for (int64_t j = 0; j < columns; ++j) b[j] = 1.0f / std::sqrt(column[j]);

  const auto count = static_cast<double>(weight.numel());
  const double rms = std::sqrt(weighted_squares(x, a, b) / count);
  double size = numbers[3];
  if (scales) {
    const Floats squares = squares_of(weight, false);
    size *= std::max(std::sqrt(std::accumulate(squares.begin(), squares.end(), 0.0) / count), numbers[5]);
  }
  const float decay = rounded(size * numbers[1]);
  const double step = numbers[0] * size / std::max(rms / numbers[6], 1.0);
  by_chunks(rows, columns, [&](int64_t, int64_t i) {
    float* __restrict to = w + i * columns;
    const float* __restrict from = x + i * columns;
    const float* __restrict of_column = b.data();
    const float of_row = rounded(step * a[i]);
    for (int64_t first = 0; first < columns; first += kBlock) {
      fetch_next(to + first), fetch_next(from + first);
#pragma omp simd
      for (int64_t j = first; j < std::min(first + kBlock, columns); ++j)
        to[j] = moved<false>(to[j], of_row * (of_column[j] * from[j]), decay);
    }
  });
}

}  // namespace scrimp
