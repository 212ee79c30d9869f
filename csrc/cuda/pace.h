// Launches that follow one another at the pace of the GPU, so that the host can be asked to stop and knows
// how far the GPU is.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <stdexcept>
#include <thread>
#include <utility>

#include "core/threads.h"
#include "cuda/launch.h"
#include "cuda/runtime.h"

namespace fc::cuda {

// A place in a stream.
class Event {
 public:
  explicit Event(cudaStream_t stream) {
    check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event");
    const cudaError_t status = cudaEventRecord(event_, stream);
    if (status != cudaSuccess) cudaEventDestroy(event_);
    check(status, "recording an event");
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(event_, other.event_);
    return *this;
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }

  bool reached() const {
    const cudaError_t status = cudaEventQuery(event_);
    if (status == cudaErrorNotReady) {
      cudaGetLastError();  // otherwise it counts as an error, which the next launch would report as its own
      return false;
    }
    check(status, "work on the GPU");
    return true;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

class Pace {
 public:
  // `poll` is called about every 50 ms of waiting; returning true ends the work.
  Pace(cudaStream_t stream, std::function<bool()> poll) : stream_(stream), poll_(std::move(poll)) {}

  // To be called before work that is launched for one call.
  void check_running() const {
    if (cancelled_) throw std::runtime_error("this run was interrupted; start another");
  }

  // To be called after each launch, with how much will be done when the launch is; waits until no launch is
  // left but this one and the one before it. Throws Cancelled if the poll returns true.
  void launched(int64_t done) {
    under_way_.push_back({Event(stream_), done, Clock::now()});
    while (under_way_.size() > 2) finish_first();
  }

  // The same for a launch of `count` pieces of work; returns how many pieces the next launch should have,
  // given the time that the last one to end took: launches of 50 to 200 ms are short enough to stop and long
  // enough to cost nothing.
  int64_t next_count(int64_t done, int64_t count) {
    launched(done);
    if (last_took_ < std::chrono::milliseconds(50)) return 2 * count;
    return last_took_ > std::chrono::milliseconds(200) ? std::max<int64_t>(count / 2, 1) : count;
  }

  // Waits for everything.
  void wait() {
    while (!under_way_.empty()) finish_first();
  }

  // How much is known to be done.
  int64_t completed() const { return completed_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Launched {
    Event event;
    int64_t done;
    Clock::time_point begin;
  };

  void finish_first() {
    const Launched& first = under_way_.front();
    // Short waits are spun through: a sleep would cost more than the wait.
    for (const auto begin = Clock::now(); ask_to_stop(), !first.event.reached();) {
      if (Clock::now() - begin > std::chrono::microseconds(500)) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
    const auto now = Clock::now();
    last_took_ = now - std::max(first.begin, last_end_);
    last_end_ = now;
    completed_ = first.done;
    under_way_.pop_front();
  }

  void ask_to_stop() {
    const auto now = Clock::now();
    if (!poll_ || now - last_poll_ < std::chrono::milliseconds(50)) return;
    last_poll_ = now;
    if (!poll_()) return;
    cancelled_ = true;
    // The work under way reads arrays that the caller may free after this. Its errors are of no interest any
    // more.
    cudaStreamSynchronize(stream_);
    under_way_.clear();
    throw Cancelled();
  }

  const cudaStream_t stream_;
  const std::function<bool()> poll_;
  std::deque<Launched> under_way_;
  int64_t completed_ = 0;
  bool cancelled_ = false;
  Clock::time_point last_poll_ = Clock::now(), last_end_{};
  Clock::duration last_took_ = std::chrono::milliseconds(100);
};

}  // namespace fc::cuda
