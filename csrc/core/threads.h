// A team of threads that lives as long as the object that needs it.
//
// Why not one pool for the process: a fork (PyTorch's DataLoader workers) would leave the child with a pool
// whose threads are gone. Threads start on the first parallel region, so small problems never pay for them.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fc {

// Thrown out of a parallel region when the caller's poll asks to stop (Ctrl-C).
struct Cancelled : std::exception {
  const char* what() const noexcept override { return "cancelled"; }
};

class ThreadTeam {
 public:
  // `poll` is called on the calling thread, about every 50 ms of work; returning true cancels the region.
  explicit ThreadTeam(int n_threads, std::function<bool()> poll = nullptr)
      : size_(n_threads < 1 ? 1 : n_threads), poll_(std::move(poll)) {}

  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  ~ThreadTeam() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      quit_.store(true, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int size() const { return size_; }

  void set_poll(std::function<bool()> poll) { poll_ = std::move(poll); }

  // Throws Cancelled if the caller's poll asks to stop. For serial stretches between regions.
  void check() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_poll_ < std::chrono::milliseconds(50)) return;
    last_poll_ = now;
    if (poll_ && poll_()) throw Cancelled();
  }

  // Additions that are worth a region of their own: a thread starts in a tenth of a millisecond.
  static constexpr int64_t kWorthwhile = int64_t{1} << 16;

  // How many of `threads` so many additions are worth.
  static int for_work(int threads, double additions) { return additions < kWorthwhile ? 1 : threads; }

  // fn(thread, begin, end) over [0, n) in chunks handed out in order as threads become free. Which thread
  // gets which chunk is not fixed, so results must not depend on it: integer sums and disjoint writes do not.
  template <class Fn>
  void parallel_for(int64_t n, int64_t chunk, Fn&& fn) {
    if (n <= 0) return;
    if (chunk < 1) chunk = 1;
    const int64_t chunks = (n + chunk - 1) / chunk;
    stop_.store(false, std::memory_order_relaxed);
    if (size_ == 1 || chunks == 1) {
      for (int64_t begin = 0; begin < n; begin += chunk) {
        fn(0, begin, begin + chunk < n ? begin + chunk : n);
        check();
      }
      return;
    }
    next_.store(0, std::memory_order_relaxed);
    std::exception_ptr error;
    std::mutex error_mutex;
    const auto guarded = [&](auto&& part) {
      try {
        part();
      } catch (...) {
        stop_.store(true, std::memory_order_relaxed);
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    };
    const auto body = [&](int thread) {
      guarded([&] {
        while (!stop_.load(std::memory_order_relaxed)) {
          const int64_t begin = next_.fetch_add(1, std::memory_order_relaxed) * chunk;
          if (begin >= n) break;
          fn(thread, begin, begin + chunk < n ? begin + chunk : n);
          if (thread == 0) check();
        }
      });
    };
    run(body, [&] {
      if (!stop_.load(std::memory_order_relaxed)) guarded([&] { check(); });
    });
    if (error) std::rethrow_exception(error);
  }

  // Whether the region that runs now is to end: no further chunk begins, and a long one may look and end too.
  const std::atomic<bool>& stopping() const { return stop_; }

 private:
  // A region, open from run() until its calling thread has found no work left. A worker takes part only if it
  // arrives in that time, so nobody waits for a thread that the system has not woken yet. While it waits for
  // workers that are still at it, the calling thread calls `meanwhile` about every 50 ms.
  template <class Meanwhile>
  void run(const std::function<void(int)>& body, Meanwhile&& meanwhile) {
    start();
    body_.store(&body, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      state_.store(++region_ * kRegion + kOpen, std::memory_order_release);
    }
    wake_.notify_all();
    body(0);
    state_.fetch_sub(kOpen, std::memory_order_acq_rel);
    const auto all_left = [&] { return state_.load(std::memory_order_acquire) % kRegion == 0; };
    spin_until(all_left);
    if (all_left()) return;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!done_.wait_for(lock, std::chrono::milliseconds(50), all_left)) {
      lock.unlock();
      meanwhile();
      lock.lock();
    }
  }

  void start() {
    if (!workers_.empty()) return;
    workers_.reserve(size_ - 1);
    for (int i = 1; i < size_; ++i) {
      try {
        workers_.emplace_back([this, i] { work(i); });
      } catch (const std::system_error&) {
        return;  // the system gives no more: those that there are do the work
      }
      leave_this_processor(workers_.back());
    }
  }

  void work(int thread) {
    int64_t seen = 0;  // the last region that this worker looked at
    while (true) {
      const auto news = [&] { return quit_.load(std::memory_order_acquire) || region() != seen; };
      spin_until(news);
      if (!news()) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, news);
      }
      if (quit_.load(std::memory_order_acquire)) return;
      int64_t state = state_.load(std::memory_order_acquire);
      seen = state / kRegion;
      while (state / kRegion == seen && state & kOpen) {
        if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
        (*body_.load(std::memory_order_relaxed))(thread);
        state = state_.fetch_sub(1, std::memory_order_acq_rel) - 1;
        if (state % kRegion == 0) {
          // Under the lock, lest the caller looks before and sleeps after.
          {
            std::lock_guard<std::mutex> lock(mutex_);
          }
          done_.notify_one();
        }
        break;
      }
    }
  }

  int64_t region() const { return state_.load(std::memory_order_acquire) / kRegion; }

  // Some kernels start a thread on its creator's processor, where it waits for milliseconds beside another
  // that is idle. Forbidding that processor for a moment moves it.
  static void leave_this_processor([[maybe_unused]] std::thread& worker) {
#if defined(__linux__)
    cpu_set_t allowed, others;
    if (pthread_getaffinity_np(worker.native_handle(), sizeof allowed, &allowed) != 0) return;
    others = allowed;
    const int here = sched_getcpu();
    if (here < 0 || here >= CPU_SETSIZE) return;
    CPU_CLR(here, &others);
    if (CPU_COUNT(&others) == 0) return;
    pthread_setaffinity_np(worker.native_handle(), sizeof others, &others);
    pthread_setaffinity_np(worker.native_handle(), sizeof allowed, &allowed);
#endif
  }

  // A short spin before sleeping: regions follow each other within microseconds inside a greedy loop.
  template <class Done>
  static void spin_until(Done done) {
    for (int i = 0; i < 2000 && !done(); ++i) {
#if defined(__x86_64__)
      _mm_pause();
#else
      std::this_thread::yield();
#endif
    }
  }

  // state_ is region number * kRegion + kOpen while it is open + the workers inside.
  static constexpr int64_t kOpen = int64_t{1} << 20, kRegion = kOpen * 2;

  const int size_;
  std::function<bool()> poll_;
  std::chrono::steady_clock::time_point last_poll_ = std::chrono::steady_clock::now();
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int64_t> state_{0};
  int64_t region_ = 0;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false};
  std::atomic<const std::function<void(int)>*> body_{nullptr};
  std::atomic<bool> quit_{false};
};

}  // namespace fc
