// The small products of several LoRAs over one batch on a CPU: rows of x, of the output y and of their
// gradients belong to jobs, whose factors are A (rank, in) and B (out, rank).
//
//     forward     s = scale x A^T        y += s B^T
//     backward    t = scale gy B         gx = t A        gA = t^T x        gB = gy^T s
//
// One such product of a few rows is over before two threads have met, so that each is one thread's own, and
// threads take the next as they come. Rows are cut into pieces of one size whatever the number of threads,
// so that results do not depend on it. A job reads nothing of another's: what diverges stays its own.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <vector>

namespace scrimp {

constexpr int64_t kPiece = 32;  // rows

// Rows of a batch that are one job's, whose own rows begin at `base`.
struct Piece {
  int64_t job, first, rows, base;

  at::Tensor of(const at::Tensor& batch) const { return batch.narrow(0, first, rows); }
  at::Tensor of_own(const at::Tensor& own) const { return own.narrow(0, first - base, rows); }
};

// `edges` holds the first row of every job and the one after its last, in turn.
inline std::vector<Piece> cut(at::IntArrayRef edges, int64_t size) {
  std::vector<Piece> pieces;
  for (int64_t job = 0; 2 * job < static_cast<int64_t>(edges.size()); ++job) {
    const int64_t begin = edges[2 * job], end = edges[2 * job + 1];
    for (int64_t row = begin; row < end; row += size)
      pieces.push_back({job, row, std::min(size, end - row), begin});
  }
  return pieces;
}

template <typename Work>
void take_in_turn(int64_t count, const Work& work) {
  std::atomic<int64_t> next = 0;
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView below;  // a thread of the pool would record the products
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

void add_rows(const at::Tensor& y, const at::Tensor& x, at::IntArrayRef edges, at::ArrayRef<double> scales,
              at::TensorList factors, at::TensorList small) {
  const auto pieces = cut(edges, kPiece);
  take_in_turn(pieces.size(), [&](int64_t i) {
    const auto& piece = pieces[i];
    auto s = piece.of_own(small[piece.job]), rows = piece.of(y);
    at::mm_out(s, piece.of(x), factors[2 * piece.job].t());
    s.mul_(scales[piece.job]);
    rows.addmm_(s, factors[2 * piece.job + 1].t());
  });
}

void rows_backward(const at::Tensor& gy, const at::Tensor& x, at::IntArrayRef edges,
                   at::ArrayRef<double> scales, at::TensorList factors, at::TensorList small,
                   at::TensorList between, at::TensorList found, const std::optional<at::Tensor>& gx) {
  const auto pieces = cut(edges, kPiece);
  take_in_turn(pieces.size(), [&](int64_t i) {
    const auto& piece = pieces[i];
    auto t = piece.of_own(between[piece.job]);
    at::mm_out(t, piece.of(gy), factors[2 * piece.job + 1]);
    t.mul_(scales[piece.job]);
    if (!gx) return;
    auto rows = piece.of(*gx);
    at::mm_out(rows, t, factors[2 * piece.job]);
  });
  const auto jobs = cut(edges, x.size(0));
  take_in_turn(2 * jobs.size(), [&](int64_t i) {
    const auto& whole = jobs[i / 2];
    auto out = found[2 * whole.job + i % 2];
    if (i % 2 == 0)
      at::mm_out(out, between[whole.job].t(), whole.of(x));
    else
      at::mm_out(out, whole.of(gy).t(), small[whole.job]);
  });
}

}  // namespace scrimp

TORCH_LIBRARY(scrimp_together, m) {
  m.def(
      "add_rows(Tensor(a!) y, Tensor x, int[] edges, float[] scales, Tensor[] factors, Tensor(b!)[] small) "
      "-> ()");
  m.def(
      "rows_backward(Tensor gy, Tensor x, int[] edges, float[] scales, Tensor[] factors, Tensor[] small, "
      "Tensor(a!)[] between, Tensor(b!)[] found, Tensor(c!)? gx) -> ()");
}

TORCH_LIBRARY_IMPL(scrimp_together, CPU, m) {
  m.impl("add_rows", scrimp::add_rows);
  m.impl("rows_backward", scrimp::rows_backward);
}
