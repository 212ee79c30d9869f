// The course of one Sinkhorn problem's iterations: when eps falls, by how much iterations are over-relaxed,
// and when to stop; and the numbers that potentials are moved and judged by.
// python/flashcoreset/sinkhorn/reference.py has the definition; every backend follows it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace fc {

// The numbers of a run, on every device.
struct SinkhornSettings {
  double reg = 1;
  double rho_a = HUGE_VAL, rho_b = HUGE_VAL;  // infinite: a marginal that holds
  double tol = 1e-6;
  int64_t max_iter = 1000;
};

// The mass that errors are a share of: the plan's if a marginal holds, else the larger one of the weights'.
FC_HOST_DEVICE inline double sinkhorn_mass(double rho_a, double rho_b, double mass_a, double mass_b) {
  const bool rows_hold = rho_a == HUGE_VAL, columns_hold = rho_b == HUGE_VAL;
  if (rows_hold != columns_hold) return rows_hold ? mass_a : mass_b;
  return mass_a > mass_b ? mass_a : mass_b;
}

// The error at which a problem is solved: tol, but no larger a share of `mass` than tol or 1e-6.
FC_HOST_DEVICE inline double sinkhorn_tolerance(double tol, double mass) {
  const double share = (tol > 1e-6 ? tol : 1e-6) * mass;
  return share < tol ? share : tol;
}

enum class SinkhornOrder { kGoOn, kNewEps, kCheck, kStop };

class SinkhornSchedule {
 public:
  static constexpr double kAnnealedFrom = 500, kFactor = 4, kStageError = 0.02, kMostOmega = 1.95;
  static constexpr int64_t kStageIterations = 200, kPeriod = 10;

  SinkhornSchedule() = default;
  // mass_a: the mass of the rows' weights, which errors of the stages are compared with; mass: see
  // sinkhorn_mass().
  FC_HOST_DEVICE SinkhornSchedule(double reg, double spread, double tol, int64_t max_iter, bool warm,
                                  double mass_a, double mass)
      : reg_(reg), tol_(sinkhorn_tolerance(tol, mass)), mass_(mass_a), max_iter_(max_iter) {
    int64_t stages = 0;
    if (!warm && spread > kAnnealedFrom * reg && spread < HUGE_VAL) {
      // The quotient of two doubles may leave their range. Its logarithm cannot: 1100 stages are the most.
      const double quotient = spread / reg;
      const double logs = quotient < HUGE_VAL ? log(quotient) : log(spread) - log(reg);
      stages = static_cast<int64_t>(ceil(logs / log(kFactor))) - 1;
    }
    if (2 * stages > max_iter) stages = 0;
    eps_ = stages > 0 ? spread / kFactor : reg;
    if (stages > 0) {
      stage_iterations_ = max_iter / (2 * stages);
      if (stage_iterations_ > kStageIterations) stage_iterations_ = kStageIterations;
    }
    accelerated_ = tol > 0 || stages > 0;
  }

  FC_HOST_DEVICE double eps() const { return eps_; }
  FC_HOST_DEVICE double omega() const { return omega_; }
  FC_HOST_DEVICE int64_t iterations() const { return iterations_; }
  FC_HOST_DEVICE double tol() const { return tol_; }

  // Whether iterations move a constant from one side's potentials to the other's.
  FC_HOST_DEVICE bool translates(double rho_a, double rho_b) const {
    const bool rows = rho_a < HUGE_VAL, columns = rho_b < HUGE_VAL;
    return (rows || columns) && (accelerated_ || !columns);
  }

  // What to do after an iteration that began with this error.
  FC_HOST_DEVICE SinkhornOrder after(double error) {
    ++iterations_;
    ++in_stage_;
    if (eps_ > reg_ && iterations_ < max_iter_) {
      if (error <= kStageError * mass_ || in_stage_ >= stage_iterations_) {
        eps_ = eps_ / kFactor > reg_ ? eps_ / kFactor : reg_;
        in_stage_ = 0;
        restart();
        return SinkhornOrder::kNewEps;
      }
    } else if (!(eps_ > reg_) && error <= tol_ && tol_ > 0) {
      return SinkhornOrder::kCheck;
    }
    if (iterations_ >= max_iter_ || error != error) return SinkhornOrder::kStop;
    if (accelerated_) adapt(error);
    if (iterations_ == max_iter_ - 1) omega_ = 1;
    return SinkhornOrder::kGoOn;
  }

  // After a check that failed: go on with plain iterations. Returns whether any are left.
  FC_HOST_DEVICE bool disappointed() {
    restart();
    return iterations_ < max_iter_;
  }

 private:
  FC_HOST_DEVICE void restart() {
    omega_ = 1;
    since_ = 0;
  }

  FC_HOST_DEVICE void adapt(double error) {
    if (since_ == 0) {
      if (error >= 0.5 * mass_) return;
      base_ = error;
    } else if (since_ == kPeriod) {
      const double rate = base_ > 0 ? pow(error / base_, 1.0 / kPeriod) : 0.0;
      if (rate >= 1) {
        omega_ = 1 + 0.7 * (omega_ - 1);
      } else if (rate > omega_ - 1) {
        // The rate of plain iterations, by Young's relation between that rate and the one at omega.
        double plain = (rate + omega_ - 1) * (rate + omega_ - 1) / (rate * omega_ * omega_);
        if (plain > 0.9999) plain = 0.9999;
        const double best = 2 / (1 + sqrt(1 - plain));
        if (best > omega_) omega_ = best < kMostOmega ? best : kMostOmega;
      } else {
        omega_ = 1 + 0.95 * (omega_ - 1);
      }
      base_ = error;
      since_ = 0;
    }
    ++since_;
  }

  double reg_ = 1, tol_ = 0, mass_ = 1, eps_ = 1, omega_ = 1, base_ = 0;
  int64_t max_iter_ = 0, stage_iterations_ = 0, iterations_ = 0, in_stage_ = 0, since_ = 0;
  bool accelerated_ = false;
};

// Costs that range over more than this times reg and the largest number of their type have exponents that
// overflow.
inline constexpr double kSinkhornExponents = 1e-3;

// The cost of a forbidden pair, in the place of infinity: exponents with it are numbers, and their exp() is 0
// for every reg that is taken.
template <class T>
inline constexpr T kSinkhornForbidden =
    std::numeric_limits<T>::max() * static_cast<T>(sizeof(T) == 4 ? 0.5 : 0.8);

// A new potential; if all pairs of its line are forbidden: 0 for a line without weight, and NaN, with which
// the run ends, for one that has weight and no place to go.
template <class T>
FC_HOST_DEVICE inline double sinkhorn_allowed(double potential, double weight) {
  if (fabs(potential) < static_cast<double>(kSinkhornForbidden<T>) / 2) return potential;
  return weight > 0 ? std::numeric_limits<double>::quiet_NaN() : 0.0;
}

// The next potential of a line from the logarithm of its sum.
FC_HOST_DEVICE inline double sinkhorn_moved(double potential, double log_sum, double eps, double omega,
                                            double damp) {
  return (1 - omega) * (1 - damp) * potential + damp * (potential - omega * eps * log_sum);
}

// exp(-f / rho): the share of its weight that a potential asks for. It is kept below infinity, which a plan
// may reach too.
FC_HOST_DEVICE inline double sinkhorn_asked(double potential, double rho) {
  const double exponent = -potential / rho;
  return exp(exponent < 700 ? exponent : 700.0);
}

// The best constant for f to gain and g to lose, from the sums of the weights of each side and of weight
// (exp(-potential / rho) - 1); 0 if that is no number.
FC_HOST_DEVICE inline double sinkhorn_translation(double rho_a, double rho_b, double mass_a, double mass_b,
                                                  double lost_a, double lost_b) {
  const double logs = log(mass_a) + log1p(lost_a / mass_a) - (log(mass_b) + log1p(lost_b / mass_b));
  const double constant = logs / (1 / rho_a + 1 / rho_b);
  return constant - constant == 0 ? constant : 0.0;
}

}  // namespace fc
