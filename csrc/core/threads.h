// A team of threads that lives as long as the object that needs it.
//
// Why not one pool for the process: a fork (PyTorch's DataLoader workers) would leave the child with a pool
// whose threads are gone. Threads start on the first parallel region, so small problems never pay for them.
// An object that a child inherits starts threads anew.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
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

// How many forks lie between the process that loaded this and the one that runs.
inline const std::atomic<int>& forks() {
  static std::atomic<int> count{0};
#if defined(__unix__) || defined(__APPLE__)
  static const int status = pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1); });
  (void)status;
#endif
  return count;
}

class ThreadTeam {
 public:
  // `poll` is called on the calling thread, about every 50 ms of work; returning true cancels the region.
  explicit ThreadTeam(int n_threads, std::function<bool()> poll = nullptr)
      : size_(n_threads < 1 ? 1 : n_threads), poll_(std::move(poll)), forks_(forks()) {}

  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  ~ThreadTeam() {
    leave_to_parent();
    if (!crew_) return;
    {
      std::lock_guard<std::mutex> lock(crew_->mutex);
      crew_->quit.store(true, std::memory_order_release);
    }
    crew_->wake.notify_all();
    for (auto& worker : crew_->workers) worker.join();
  }

  int size() const { return size_; }

  void set_poll(std::function<bool()> poll) { poll_ = std::move(poll); }

  // The share of the region in progress that is done, for the poll; 1 between regions.
  double share() const {
    const int64_t chunks = chunks_, begun = next_.load(std::memory_order_relaxed);
    return chunks > 0 && begun < chunks ? static_cast<double>(begun) / static_cast<double>(chunks) : 1;
  }

  // Throws Cancelled if the caller's poll asks to stop. For serial stretches between regions.
  void check() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_poll_ < std::chrono::milliseconds(50)) return;
    const bool stops = poll_ && poll_();
    last_poll_ = std::chrono::steady_clock::now();  // what the poll itself takes is no work
    if (stops) throw Cancelled();
  }

  // Additions that are worth a region of their own: a thread starts in a tenth of a millisecond.
  static constexpr int64_t kWorthwhile = int64_t{1} << 16;

  // How many of `threads` are worth starting for so many additions.
  static int for_work(int threads, double additions) { return additions < kWorthwhile ? 1 : threads; }

  // fn(thread, begin, end) over [0, n) in chunks handed out in order as threads become free. Which thread
  // gets which chunk is not fixed, so results must not depend on it: integer sums and disjoint writes do not.
  template <class Fn>
  void parallel_for(int64_t n, int64_t chunk, Fn&& fn) {
    if (n <= 0) return;
    if (chunk < 1) chunk = 1;
    const int64_t chunks = (n + chunk - 1) / chunk;
    stop_.store(false, std::memory_order_relaxed);
    next_.store(0, std::memory_order_relaxed);
    chunks_ = chunks;
    if (size_ == 1 || chunks == 1) {
      for (int64_t begin = 0; begin < n; begin += chunk) {
        fn(0, begin, begin + chunk < n ? begin + chunk : n);
        next_.store(begin / chunk + 1, std::memory_order_relaxed);
        check();
      }
      return;
    }
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

  // Whether the region that runs now is to end: no further chunk begins, and a long one may check and end
  // too.
  const std::atomic<bool>& stopping() const { return stop_; }

 private:
  // The threads and what they share with the calling one.
  struct Crew {
    explicit Crew(int forks) : forks(forks) {}

    const int forks;  // in the process that started them
    std::vector<std::thread> workers;
    std::mutex mutex;
    std::condition_variable wake, done;
    std::atomic<int64_t> state{0};
    int64_t region = 0;
    std::atomic<const std::function<void(int)>*> body{nullptr};
    std::atomic<bool> quit{false};
  };

  // A region, open from run() until its calling thread has found no work left. A worker takes part only if it
  // arrives in that time, so nobody waits for a thread that the system has not woken yet. While it waits for
  // workers that are still at it, the calling thread calls `meanwhile` about every 50 ms.
  template <class Meanwhile>
  void run(const std::function<void(int)>& body, Meanwhile&& meanwhile) {
    Crew& crew = started();
    crew.body.store(&body, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(crew.mutex);
      crew.state.store(++crew.region * kRegion + kOpen, std::memory_order_release);
    }
    crew.wake.notify_all();
    body(0);
    crew.state.fetch_sub(kOpen, std::memory_order_acq_rel);
    const auto all_left = [&] { return crew.state.load(std::memory_order_acquire) % kRegion == 0; };
    spin_until(all_left);
    if (all_left()) return;
    std::unique_lock<std::mutex> lock(crew.mutex);
    while (!crew.done.wait_for(lock, std::chrono::milliseconds(50), all_left)) {
      lock.unlock();
      meanwhile();
      lock.lock();
    }
  }

  Crew& started() {
    leave_to_parent();
    if (crew_) return *crew_;
    crew_ = std::make_unique<Crew>(forks_.load(std::memory_order_relaxed));
    crew_->workers.reserve(size_ - 1);
    for (int i = 1; i < size_; ++i) {
      try {
        crew_->workers.emplace_back([&crew = *crew_, i] { work(crew, i); });
      } catch (const std::system_error&) {
        break;  // the system gives no more: the threads that there are do the work
      }
      leave_this_processor(crew_->workers.back());
    }
    return *crew_;
  }

  // In a forked child the parent's threads do not exist: joining them would never end, nor would destroying
  // what they wait for.
  void leave_to_parent() {
    if (crew_ && crew_->forks != forks_.load(std::memory_order_relaxed)) (void)crew_.release();
  }

  static void work(Crew& crew, int thread) {
    int64_t seen = 0;  // the last region that this worker checked
    while (true) {
      const auto news = [&] {
        return crew.quit.load(std::memory_order_acquire) ||
               crew.state.load(std::memory_order_acquire) / kRegion != seen;
      };
      spin_until(news);
      if (!news()) {
        std::unique_lock<std::mutex> lock(crew.mutex);
        crew.wake.wait(lock, news);
      }
      if (crew.quit.load(std::memory_order_acquire)) return;
      int64_t state = crew.state.load(std::memory_order_acquire);
      seen = state / kRegion;
      while (state / kRegion == seen && state & kOpen) {
        if (!crew.state.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
        (*crew.body.load(std::memory_order_relaxed))(thread);
        state = crew.state.fetch_sub(1, std::memory_order_acq_rel) - 1;
        if (state % kRegion == 0) {
          // Under the lock, lest the caller checks before and sleeps after.
          {
            std::lock_guard<std::mutex> lock(crew.mutex);
          }
          crew.done.notify_one();
        }
        break;
      }
    }
  }

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

  // Crew::state is region number * kRegion + kOpen while it is open + the workers inside.
  static constexpr int64_t kOpen = int64_t{1} << 20, kRegion = kOpen * 2;

  const int size_;
  std::function<bool()> poll_;
  const std::atomic<int>& forks_;
  std::chrono::steady_clock::time_point last_poll_ = std::chrono::steady_clock::now();
  std::unique_ptr<Crew> crew_;
  std::atomic<int64_t> next_{0};
  int64_t chunks_ = 0;  // of the last region; read and written by the calling thread
  std::atomic<bool> stop_{false};
};

}  // namespace fc
