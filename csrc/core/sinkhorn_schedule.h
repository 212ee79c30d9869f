// The course of one Sinkhorn problem's iterations: when eps falls, by how much iterations are over-relaxed,
// and when to stop. python/flashcoreset/reference/sinkhorn.py has the definition; every backend follows it.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace fc {

enum class SinkhornOrder { kGoOn, kNewEps, kCheck, kStop };

class SinkhornSchedule {
 public:
  static constexpr double kAnnealedFrom = 500, kFactor = 4, kStageError = 0.02, kMostOmega = 1.95;
  static constexpr int64_t kStageIterations = 200, kPeriod = 10;

  SinkhornSchedule() = default;
  FC_HOST_DEVICE SinkhornSchedule(double reg, double spread, double tol, int64_t max_iter, bool balanced,
                                  bool warm, double mass = 1)
      : reg_(reg), tol_(tol), mass_(mass), max_iter_(max_iter) {
    int64_t stages = 0;
    if (!warm && spread > kAnnealedFrom * reg && spread < HUGE_VAL) {
      stages = static_cast<int64_t>(ceil(log(spread / reg) / log(kFactor))) - 1;
    }
    if (2 * stages > max_iter) stages = 0;
    eps_ = stages > 0 ? spread / kFactor : reg;
    if (stages > 0) {
      stage_iterations_ = max_iter / (2 * stages);
      if (stage_iterations_ > kStageIterations) stage_iterations_ = kStageIterations;
    }
    relaxed_ = balanced && (tol > 0 || stages > 0);
  }

  FC_HOST_DEVICE double eps() const { return eps_; }
  FC_HOST_DEVICE double omega() const { return omega_; }
  FC_HOST_DEVICE int64_t iterations() const { return iterations_; }
  FC_HOST_DEVICE double tol() const { return tol_; }

  // What to do after an iteration that began with this error.
  FC_HOST_DEVICE SinkhornOrder after(double error) {
    ++iterations_;
    ++in_stage_;
    if (eps_ > reg_) {
      if (error <= kStageError * mass_ || in_stage_ >= stage_iterations_) {
        eps_ = eps_ / kFactor > reg_ ? eps_ / kFactor : reg_;
        in_stage_ = 0;
        restart();
        return SinkhornOrder::kNewEps;
      }
    } else if (error <= tol_ && tol_ > 0) {
      return SinkhornOrder::kCheck;
    }
    if (iterations_ >= max_iter_ || error != error) return SinkhornOrder::kStop;
    if (relaxed_) adapt(error);
    if (iterations_ + 1 == max_iter_) omega_ = 1;
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
        // Of plain iterations, by Young's relation between their rate and that at omega.
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
  bool relaxed_ = false;
};

}  // namespace fc
