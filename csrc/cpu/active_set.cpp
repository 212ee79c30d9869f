#include "cpu/active_set.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "core/simd.h"

namespace fc {

double dot(const double* a, const double* b, int64_t n) {
  using V = simd::Vec<double>;
  constexpr int64_t W = simd::kWidth<double>;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      sum[v] = simd::fma<double>(simd::load(a + i + v * W), simd::load(b + i + v * W), sum[v]);
    }
  }
  const V all[1] = {(sum[0] + sum[1]) + (sum[2] + sum[3])};
  double total;
  simd::lane_sums<1, double>(all, &total);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

namespace {

[[noreturn]] void refuse_products() {
  throw std::invalid_argument("g, target: products of their entries are not finite; scale them down");
}

// The loops below end only if every value is finite.
void require_finite(double value) {
  if (!std::isfinite(value)) refuse_products();
}

}  // namespace

bool ActiveSet::add(std::vector<double> products, double correlation) {
  for (const double product : products) require_finite(product);
  require_finite(correlation);
  norm_.push_back(std::sqrt(products.back()));
  gram_.push_back(std::move(products));
  correlation_.push_back(correlation);
  weight_.push_back(0);
  if (!enter(size() - 1)) {
    norm_.pop_back();
    gram_.pop_back();
    correlation_.pop_back();
    weight_.pop_back();
    return false;
  }
  refit();
  double sum = target_norm_;
  for (const int64_t p : used_) sum += std::abs(weight_[p]) * norm_[p];
  scale_ = sum;
  return true;
}

double ActiveSet::squared_residual() const {
  double sum = target_norm_ * target_norm_;
  for (const int64_t p : used_) sum -= weight_[p] * (correlation_[p] + ridge_ * weight_[p]);
  return sum;
}

bool ActiveSet::enter(int64_t p) {
  const int64_t s = static_cast<int64_t>(used_.size());
  const double square = gram(p, p) + ridge_;
  std::vector<double> row(s + 1);
  double rest = square;
  for (int64_t i = 0; i < s; ++i) {
    row[i] = (gram(p, used_[i]) - dot(factor_[i].data(), row.data(), i)) / factor_[i][i];
    rest -= row[i] * row[i];
  }
  if (!(rest > kDependent * square)) return false;
  row[s] = std::sqrt(rest);
  solved_.push_back((correlation_[p] - dot(row.data(), solved_.data(), s)) / row[s]);
  factor_.push_back(std::move(row));
  used_.push_back(p);
  return true;
}

void ActiveSet::leave(int64_t t) {
  used_.erase(used_.begin() + t);
  factor_.erase(factor_.begin() + t);
  const int64_t s = static_cast<int64_t>(used_.size());
  std::vector<double> cosine(s), sine(s);
  for (int64_t i = t; i < s; ++i) {
    double* const row = factor_[i].data();
    double carried = row[t];
    for (int64_t c = t; c < i; ++c) {
      const double next = row[c + 1];
      row[c] = cosine[c] * carried + sine[c] * next;
      carried = cosine[c] * next - sine[c] * carried;
    }
    const double length = std::hypot(carried, row[i + 1]);
    cosine[i] = carried / length;
    sine[i] = row[i + 1] / length;
    row[i] = length;
    factor_[i].resize(i + 1);
    const double y = solved_[i];
    solved_[i] = cosine[i] * y + sine[i] * solved_[i + 1];
    solved_[i + 1] = cosine[i] * solved_[i + 1] - sine[i] * y;
  }
  solved_.pop_back();
}

void ActiveSet::solve(std::vector<double>& z) const {
  z = solved_;
  using V = simd::Vec<double>;
  constexpr int64_t W = simd::kWidth<double>;
  for (int64_t i = static_cast<int64_t>(z.size()) - 1; i >= 0; --i) {
    const double* const row = factor_[i].data();
    const double value = z[i] /= row[i];
    const V minus = simd::broadcast(-value);
    int64_t c = 0;
    for (; c + W <= i; c += W) {
      simd::store(&z[c], simd::fma<double>(minus, simd::load(row + c), simd::load(&z[c])));
    }
    for (; c < i; ++c) z[c] -= value * row[c];
  }
}

void ActiveSet::refit() {
  std::vector<double> z;
  std::vector<char> barred(nonnegative_ ? size() : 0);
  // Every round lowers the objective, so that no set comes twice; with rounding, the bound makes sure.
  for (int64_t round = 0; round < 3 * size() + 3; ++round) {
    const int64_t entered = used_.empty() ? -1 : used_.back();
    while (true) {
      solve(z);
      if (!nonnegative_) break;
      // From w towards z, as far as no weight turns negative.
      double most = 1;
      bool blocked = false;
      for (size_t i = 0; i < used_.size(); ++i) {
        if (z[i] > 0) continue;
        const double w = weight_[used_[i]];
        most = std::min(most, w > 0 ? w / (w - z[i]) : 0.0);
        blocked = true;
      }
      if (!blocked) break;
      std::vector<int64_t> gone;
      for (size_t i = 0; i < used_.size(); ++i) {
        double& w = weight_[used_[i]];
        const bool hits = z[i] <= 0 && (w > 0 ? w / (w - z[i]) : 0.0) <= most;
        w = hits ? 0 : std::max(w + most * (z[i] - w), 0.0);
        if (hits) gone.push_back(static_cast<int64_t>(i));
      }
      // Unless there is a NaN, at least one weight hits the bound that they set together.
      if (gone.empty()) refuse_products();
      for (auto t = gone.rbegin(); t != gone.rend(); ++t) {
        barred[used_[*t]] = barred[used_[*t]] || (most == 0 && used_[*t] == entered);
        leave(*t);
      }
    }
    for (size_t i = 0; i < used_.size(); ++i) {
      require_finite(z[i]);
      weight_[used_[i]] = z[i];
    }
    if (static_cast<int64_t>(used_.size()) == size() || !come_back(barred)) return;
  }
}

bool ActiveSet::come_back(std::vector<char>& barred) {
  double scale = target_norm_;
  for (const int64_t p : used_) scale += weight_[p] * norm_[p];
  while (true) {
    std::vector<char> idle(size(), 1);
    for (const int64_t p : used_) idle[p] = 0;
    int64_t best = -1;
    double most = 0;
    for (int64_t p = 0; p < size(); ++p) {
      if (!idle[p] || barred[p]) continue;
      double left = correlation_[p];
      for (const int64_t q : used_) left -= weight_[q] * gram(p, q);
      if (left > kNoise * scale * norm_[p] && left > most) {
        most = left;
        best = p;
      }
    }
    if (best < 0) return false;
    if (enter(best)) return true;
    barred[best] = 1;
  }
}

}  // namespace fc
