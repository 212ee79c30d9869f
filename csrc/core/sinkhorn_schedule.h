// The course of one Sinkhorn problem's iterations: when eps falls, by how much iterations are over-relaxed,
// and when to stop; and the numbers that potentials are moved and judged by.
// python/flashcoreset/sinkhorn/reference.py has the definition; every backend follows it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/host_device.h"

namespace fc {

// An error, or a bound of it: in L1, by which eps and omega go, and in the norm of the run, by which it ends.
struct SinkhornError {
  double l1, judged;  // without initial values, so that it can be in shared memory

  FC_HOST_DEVICE SinkhornError plus(const SinkhornError& other) const {
    return {l1 + other.l1, judged + other.judged};
  }
  FC_HOST_DEVICE SinkhornError plus(double more) const { return plus({more, more}); }
};

// The square of an amount as a share of the mass.
FC_HOST_DEVICE inline double sinkhorn_square(double off, double mass) { return (off / mass) * (off / mass); }

// The numbers of a run, on every device.
struct SinkhornSettings {
  double reg = 1;
  double rho_a = HUGE_VAL, rho_b = HUGE_VAL;  // infinite: a marginal that holds
  double tol = 1e-6;
  int64_t max_iter = 1000;
  bool symmetric = false;  // rows and columns are the same points with the same weights
  bool l2 = false;         // errors are sums of both sides' L2 norms, and not of their L1 norms

  // The error of a side from the sum of what its lines are off by, |r_l|, and from that of (r_l / mass)^2,
  // which is read for L2 alone. Shares of the side's mass have squares in the range of numbers.
  FC_HOST_DEVICE SinkhornError error_of(double sum, double squares, double mass) const {
    return {sum, l2 ? mass * sqrt(squares) : sum};
  }
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

// The share of the mass below which the rounding of a type may be all that is left of an error. (Errors that
// iterations came to rest at, for reg down to 5e-4 of the largest cost: 1.2e-7 to 7e-7 in float32, 3e-16 to
// 9e-15 in float64.)
template <class T>
inline constexpr double kSinkhornReach =
    static_cast<double>(std::numeric_limits<T>::epsilon()) * (sizeof(T) == 4 ? 8 : 64);

enum class SinkhornOrder { kGoOn, kNewEps, kCheck, kStop };

class SinkhornSchedule {
 public:
  static constexpr double kAnnealedFrom = 500, kFactor = 4, kStageError = 0.02, kMostOmega = 1.95;
  static constexpr int64_t kStageIterations = 200, kPeriod = 10;
  static constexpr double kStalled = 0.9, kReannealedFrom = 16, kLuck = 4;
  // Two steps of Chebyshev's iteration for eigenvalues 1 + lambda mu in [1, 2].
  static constexpr double kFirstSymmetric = 0.5395042867795848, kSecondSymmetric = 0.8722604191145028;
  static constexpr int64_t kWindow = 32, kRests = 6, kChecks = 8;

  SinkhornSchedule() = default;
  // warm: potentials are given; spread: a bound of the costs' range; mass_a, mass_b: of the weights; reach:
  // kSinkhornReach of the type that sums are taken in.
  FC_HOST_DEVICE SinkhornSchedule(const SinkhornSettings& settings, bool warm, double spread, double mass_a,
                                  double mass_b, double reach)
      : reg_(settings.reg), spread_(spread), mass_(mass_a), max_iter_(settings.max_iter) {
    const double mass = sinkhorn_mass(settings.rho_a, settings.rho_b, mass_a, mass_b), tol = settings.tol;
    tol_ = sinkhorn_tolerance(tol, mass);
    reach_ = tol_ > 0 && tol_ < reach * mass ? reach * mass : 0;
    int64_t stages = 0;
    if (!settings.symmetric && spread > kReannealedFrom * reg_ && spread < HUGE_VAL) {
      // The quotient of two doubles may leave their range. Its logarithm cannot: 1100 stages are the most.
      const double quotient = spread / reg_;
      const double logs = quotient < HUGE_VAL ? log(quotient) : log(spread) - log(reg_);
      stages = static_cast<int64_t>(ceil(logs / log(kFactor))) - 1;
    }
    const bool anneals = !warm && spread > kAnnealedFrom * reg_ && 2 * stages <= max_iter_;
    if (warm && tol > 0) trial_stages_ = stages;
    if (!anneals) stages = 0;
    eps_ = stages > 0 ? spread / kFactor : reg_;
    if (stages > 0) {
      stage_iterations_ = max_iter_ / (2 * stages);
      if (stage_iterations_ > kStageIterations) stage_iterations_ = kStageIterations;
    }
    symmetric_ = settings.symmetric;
    accelerated_ = tol > 0 || stages > 0;
    plain_omega_ = omega_ = settings.symmetric ? 0.5 : 1;
  }

  FC_HOST_DEVICE double eps() const { return eps_; }
  FC_HOST_DEVICE double omega() const { return omega_; }
  FC_HOST_DEVICE int64_t iterations() const { return iterations_; }
  FC_HOST_DEVICE double tol() const { return tol_; }

  // Whether iterations move a constant from one side's potentials to the other's.
  FC_HOST_DEVICE bool translates(const SinkhornSettings& settings) const {
    const bool rows = settings.rho_a < HUGE_VAL, columns = settings.rho_b < HUGE_VAL;
    return !settings.symmetric && (rows || columns) && (accelerated_ || !columns);
  }

  // What to do after an iteration that began with this error.
  FC_HOST_DEVICE SinkhornOrder after(const SinkhornError& begun) {
    const double error = begun.l1;
    ++iterations_;
    ++in_stage_;
    if (eps_ > reg_ && iterations_ < max_iter_) {
      if (error <= kStageError * mass_ || in_stage_ >= stage_iterations_) {
        new_eps(eps_ / kFactor > reg_ ? eps_ / kFactor : reg_);
        return SinkhornOrder::kNewEps;
      }
    } else if (!(eps_ > reg_) && begun.judged <= tol_ && tol_ > 0) {
      return SinkhornOrder::kCheck;
    }
    if (iterations_ >= max_iter_ || ends_ || error != error) return SinkhornOrder::kStop;
    if (stalls(error)) {
      trial_stages_ = 0;
      stage_iterations_ = 1;
      new_eps(spread_ / kFactor);
      return SinkhornOrder::kNewEps;
    }
    if (accelerated_) adapt(error);
    ends_ = rests(begun.judged);
    if (iterations_ == max_iter_ - 1 || ends_) omega_ = plain_omega_;
    return SinkhornOrder::kGoOn;
  }

  // After a check that found this error, above tol(): go on with plain iterations. Returns whether any are
  // left.
  FC_HOST_DEVICE bool disappointed(double error) {
    restart();
    if (hopeless(error)) ends_ = ++checks_ >= kChecks;
    return iterations_ < max_iter_ && !ends_;
  }

 private:
  FC_HOST_DEVICE void new_eps(double eps) {
    eps_ = eps;
    in_stage_ = in_window_ = rests_ = 0;
    best_ = 0;
    restart();
  }

  FC_HOST_DEVICE void restart() {
    omega_ = plain_omega_;
    since_ = 0;
  }

  // Whether the start that was given has turned out to be one from which iterations hardly come on: a plain
  // one, or a period of over-relaxed ones, has left the error nearly what it was. A start from a larger eps
  // then costs less.
  FC_HOST_DEVICE bool stalls(double error) {
    if (trial_stages_ == 0 || error <= reach_ || max_iter_ - iterations_ < 2 * trial_stages_) return false;
    if (omega_ != 1) return since_ == kPeriod && error >= kStalled * base_;
    const double before = before_;
    before_ = error;
    return iterations_ > 2 && error >= kStalled * before;
  }

  // Whether an error may be rounding alone, and is not one that the luck of rounding brings to the tolerance.
  FC_HOST_DEVICE bool hopeless(double error) const { return error <= reach_ && error > kLuck * tol_; }

  // Whether rounding is all that is left of the error: kRests windows in a row whose least errors fall so
  // little below the least one before that the iterations left do not come to the tolerance at this rate.
  // (Over-relaxation may let errors grow for a few windows.)
  FC_HOST_DEVICE bool rests(double error) {
    if (reach_ == 0) return false;
    least_ = in_window_ == 0 || error < least_ ? error : least_;
    if (++in_window_ < kWindow) return false;
    in_window_ = 0;
    bool is_rest = best_ > 0 && hopeless(least_);
    if (is_rest) {
      const double windows = static_cast<double>((max_iter_ - iterations_) / kWindow);
      is_rest = log(best_ / least_) * windows < log(least_ / tol_);
    }
    rests_ = is_rest ? rests_ + 1 : 0;
    if (best_ == 0 || least_ < best_) best_ = least_;
    return rests_ >= kRests;
  }

  FC_HOST_DEVICE void adapt(double error) {
    if (symmetric_) {
      omega_ = error >= 0.5 * mass_        ? plain_omega_
               : omega_ == kFirstSymmetric ? kSecondSymmetric
                                           : kFirstSymmetric;
      return;
    }
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

  double reg_ = 1, spread_ = 0, tol_ = 0, mass_ = 1, eps_ = 1, omega_ = 1, plain_omega_ = 1, base_ = 0;
  int64_t max_iter_ = 0, stage_iterations_ = 0, iterations_ = 0, in_stage_ = 0, since_ = 0;
  int64_t trial_stages_ = 0;  // of the annealing that a start which was given may be exchanged for
  double before_ = 0;         // the error before the last one, while that is open
  // The errors up to which rests() looks, the least one of this window and of those before.
  double reach_ = 0, least_ = 0, best_ = 0;
  int64_t in_window_ = 0, rests_ = 0, checks_ = 0;  // checks_: those that failed within reach
  bool symmetric_ = false, accelerated_ = false, ends_ = false;
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
