// The CUDA kernels of random projections, run by the emulator under every schedule: the CPU kernels' sums,
// wherever launches are cut, and the same matrices.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/threads.h"
#include "cpu/sketch.h"
#include "cuda/sketch.h"
#include "emulator/device_array.h"
#include "emulator/schedules.h"
#include "samples.h"

namespace {

using fc::Projection;
using fc::SketchKind;
using fc::TensorView;
using fc::emulator::DeviceArray;

constexpr SketchKind kKinds[] = {SketchKind::kRademacher, SketchKind::kGaussian, SketchKind::kSjlt,
                                 SketchKind::kSrht, SketchKind::kGaussianBoxMuller};

struct Case {
  int64_t batch, d, dim, nnz, offset;
};

// Sizes of several tiles and Hadamard blocks, large offsets, and pieces that launches do not divide evenly.
constexpr Case kCases[] = {
    {1, 1, 1, 1, 0}, {3, 700, 133, 3, int64_t{1} << 40}, {17, 300, 9, 1, 4090}, {2, 9000, 40, 1, 1000}};
constexpr Case kWide[] = {{1, 300, 2000, 1, 7}, {2, 260, 17000, 2, 5}};

Projection projection_of(SketchKind kind, const Case& c) {
  return {kind, 0xFEDCBA9876543210u, c.offset, c.nnz};
}

// The largest error, as a share of the largest entry. Worst seen: float32 4e-7, float64 8e-16.
template <class T>
void check_close(const std::vector<T>& got, const std::vector<T>& want) {
  double most = 0, off = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    most = std::max(most, std::fabs(static_cast<double>(want[i])));
    off = std::max(off, std::fabs(static_cast<double>(got[i]) - static_cast<double>(want[i])));
  }
  CHECK(off <= (sizeof(T) == 4 ? 1e-5 : 1e-12) * most);
}

template <class T>
std::vector<T> on_cpu(const samples::Matrix<T>& x, const Projection& p, int64_t dim) {
  fc::ThreadTeam team(1);
  samples::Matrix<T> out(x.rows(), dim);
  fc::sketch<T>(x.view(), p, out.writable(), team);
  return out.values();
}

// Sketches of rows, in an odd layout if `odd`.
template <class T>
std::vector<T> on_device(const samples::Matrix<T>& x, const Projection& p, int64_t dim, bool odd,
                         double first_launch) {
  std::vector<T> storage = x.values();
  TensorView<const T, 2> view = x.view();
  if (odd) view = x.odd_view(storage);
  const T* const host = odd ? storage.data() : x.values().data();
  const DeviceArray<T> in(storage), out(x.rows() * dim);
  view.data = in.data() + (view.data - host);
  fc::cuda::sketch<T>(view, p, TensorView<T, 2>::compact(out.data(), x.rows(), dim), nullptr, nullptr,
                      first_launch);
  return out.values();
}

template <class T>
void test_sums(const Case& c, SketchKind kind) {
  const auto x = samples::normal<T>(c.batch, c.d, 5);
  const Projection p = projection_of(kind, c);
  const std::vector<T> got =
      fc::emulator::check_schedules([&] { return on_device(x, p, c.dim, false, 0x1p38); });
  check_close(got, on_cpu(x, p, c.dim));
  CHECK(on_device(x, p, c.dim, true, 0x1p38) == got);
  CHECK(on_device(x, p, c.dim, false, 1) == got);
}

template <class T>
void test_matrix(const Case& c, SketchKind kind) {
  const Projection p = projection_of(kind, c);
  const std::vector<T> got = fc::emulator::check_schedules([&] {
    const DeviceArray<T> out(c.d * c.dim);
    fc::cuda::projection_matrix<T>(p, TensorView<T, 2>::compact(out.data(), c.d, c.dim), nullptr);
    return out.values();
  });
  fc::ThreadTeam team(1);
  samples::Matrix<T> want(c.d, c.dim);
  fc::projection_matrix<T>(p, want.writable(), team);
  if (kind != SketchKind::kGaussianBoxMuller) {
    CHECK(got == want.values());
    return;
  }
  // The CPU kernels' logarithm is another; numbers are rounded to float32.
  for (size_t i = 0; i < got.size(); ++i) {
    const double number = want.values()[i];
    CHECK(std::fabs(got[i] - number) <= 2 * 0x1p-23 * std::fabs(number));
  }
}

// A long run ends when its poll returns true, and memory is given back.
void test_cancellation() {
  const auto x = samples::normal<float>(1, 20000, 1);
  const Projection p = projection_of(SketchKind::kRademacher, {1, 20000, 8, 1, 0});
  const size_t before = fc::emulator::allocated_bytes();
  {
    const DeviceArray<float> in(x.values()), out(8);
    const auto in_view = TensorView<const float, 2>::compact(in.data(), 1, 20000);
    const auto out_view = TensorView<float, 2>::compact(out.data(), 1, 8);
    fc::emulator::Device slow;
    slow.event_delay = 1000000;  // how often an event reports that it has not been reached
    fc::emulator::set_device(slow);
    CHECK_THROWS(
        fc::cuda::sketch<float>(in_view, p, out_view, nullptr, [] { return true; }, 1), fc::Cancelled);
    fc::emulator::set_device({});
  }
  CHECK_EQUAL(fc::emulator::allocated_bytes(), before);
}

template <class T>
void all() {
  for (const SketchKind kind : kKinds) {
    for (const Case& c : kCases) {
      test_sums<T>(c, kind);
      if (c.d * c.dim < 200000) test_matrix<T>(c, kind);
    }
  }
  // N of 2,048 and 4,096; more outputs than a block has sums of.
  for (const Case& c : kWide) {
    test_sums<T>(c, SketchKind::kSrht);
    test_sums<T>(c, SketchKind::kSjlt);
  }
  // A row has no columns.
  const Projection p = projection_of(SketchKind::kSrht, {1, 0, 5, 1, 3});
  CHECK(on_device(samples::Matrix<T>(2, 0), p, 5, false, 1) == std::vector<T>(10, T(0)));
}

}  // namespace

TEST_PROGRAM {
  all<float>();
  all<double>();
  test_cancellation();
  return check::verdict("cuda_sketch");
}
