// The thread team: every index once, exceptions and cancellation come out on the caller and leave the team
// usable.
#include <atomic>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "check.h"
#include "core/threads.h"

namespace {

void test_every_index_once() {
  for (const int threads : {0, 1, 2, 3, 8}) {
    fc::ThreadTeam team(threads);
    CHECK_EQUAL(team.size(), threads < 1 ? 1 : threads);
    for (const int64_t n : {0, 1, 7, 97, 1025}) {
      for (const int64_t chunk : {0, 1, 3, 64, 2000}) {
        std::vector<int> visits(n);  // not atomic: chunks are disjoint, which the thread sanitizer confirms
        std::atomic<bool> in_range{true};
        team.parallel_for(n, chunk, [&](int thread, int64_t begin, int64_t end) {
          if (thread < 0 || thread >= team.size() || begin >= end || end > n) in_range = false;
          for (int64_t i = begin; i < end; ++i) ++visits[i];
        });
        CHECK(in_range);
        CHECK(visits == std::vector<int>(n, 1));
      }
    }
  }
}

// The results that a region wrote are visible to the next one and to the caller, with no other
// synchronisation.
void test_regions_follow_each_other() {
  fc::ThreadTeam team(3);
  std::vector<int64_t> values(1000);
  for (int round = 0; round < 200; ++round)
    team.parallel_for(1000, 17, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[i] = round == 0 ? i : values[i] + 1;
    });
  CHECK_EQUAL(std::accumulate(values.begin(), values.end(), int64_t{0}), int64_t{999 * 500 + 199 * 1000});
}

// More threads than processors and less work than threads: most workers arrive when a region is over, and
// then must touch neither it nor the next one's work twice.
void test_late_workers() {
  fc::ThreadTeam team(8);
  int64_t total = 0;
  for (int64_t round = 0; round < 5000; ++round) {
    std::vector<int64_t> values(2);
    team.parallel_for(2, 1, [&values, round](int, int64_t i, int64_t) { values[i] += round; });
    total += values[0] + values[1];
    if (round % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  CHECK_EQUAL(total, int64_t{5000} * 4999);
}

// Per-thread partial sums indexed by the thread number never collide.
void test_thread_numbers_are_exclusive() {
  fc::ThreadTeam team(4);
  std::vector<int64_t> partial(4);
  team.parallel_for(10000, 10, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[thread] += i;
  });
  CHECK_EQUAL(std::accumulate(partial.begin(), partial.end(), int64_t{0}), int64_t{9999} * 5000);
}

void test_exceptions() {
  for (const int threads : {1, 2, 4}) {
    fc::ThreadTeam team(threads);
    for (int round = 0; round < 20; ++round) {
      std::string message;
      try {
        team.parallel_for(1000, 1, [&](int, int64_t begin, int64_t) {
          if (begin == 500) throw std::runtime_error("at 500");
        });
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      CHECK_EQUAL(message, std::string("at 500"));
      // All threads throw at once: one exception comes out.
      CHECK_THROWS(team.parallel_for(64, 1, [](int, int64_t, int64_t) { throw std::runtime_error("all"); }),
                   std::runtime_error);
      std::atomic<int64_t> sum{0};
      team.parallel_for(100, 9, [&](int, int64_t begin, int64_t end) { sum += end - begin; });
      CHECK_EQUAL(sum.load(), 100);
    }
  }
}

void test_cancellation() {
  for (const int threads : {1, 2, 4}) {
    std::atomic<bool> asked{false};
    const auto caller = std::this_thread::get_id();
    std::atomic<bool> polled_elsewhere{false};
    fc::ThreadTeam team(threads, [&] {
      if (std::this_thread::get_id() != caller) polled_elsewhere = true;
      return asked.load();
    });
    const auto begin = std::chrono::steady_clock::now();
    std::atomic<int64_t> done{0};
    // Ten minutes of work if nobody stops it.
    CHECK_THROWS(team.parallel_for(600000, 1,
                                   [&](int, int64_t, int64_t) {
                                     if (++done == 20) asked = true;
                                     std::this_thread::sleep_for(std::chrono::milliseconds(1));
                                   }),
                 fc::Cancelled);
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10));
    CHECK(done < 600000);
    CHECK(!polled_elsewhere);
    asked = false;
    std::atomic<int64_t> sum{0};
    team.parallel_for(100, 9, [&](int, int64_t first, int64_t last) { sum += last - first; });
    CHECK_EQUAL(sum.load(), 100);
    asked = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    CHECK_THROWS(team.check(), fc::Cancelled);
    team.set_poll(nullptr);
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    team.check();
  }
}

// The calling thread has no work left, and keeps polling while a worker is inside a chunk, which notices the
// answer.
void test_cancellation_of_the_last_chunk() {
  std::atomic<int> polls{0};
  fc::ThreadTeam team(2, [&] { return ++polls >= 3; });
  const auto begin = std::chrono::steady_clock::now();
  const auto late = [&] { return std::chrono::steady_clock::now() - begin > std::chrono::seconds(10); };
  std::atomic<bool> worker_is_in{false};
  CHECK_THROWS(team.parallel_for(2, 1,
                                 [&](int thread, int64_t, int64_t) {
                                   if (thread != 0) worker_is_in = true;
                                   const auto done = [&] {
                                     return (thread == 0 ? worker_is_in : team.stopping()).load();
                                   };
                                   while (!done() && !late()) std::this_thread::yield();
                                 }),
               fc::Cancelled);
  CHECK(!late());
  // The next region runs as if nothing had been.
  team.set_poll(nullptr);
  for (const int64_t n : {1, 100}) {
    std::atomic<int64_t> sum{0};
    team.parallel_for(n, 1, [&](int, int64_t first, int64_t last) {
      if (!team.stopping()) sum += last - first;
    });
    CHECK_EQUAL(sum.load(), n);
  }
}

// Teams are made and destroyed at any rate, used or not, several at a time.
void test_lifetimes() {
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 100; ++round) {
    fc::ThreadTeam unused(4), first(2), second(3);
    first.parallel_for(8, 1, [&](int, int64_t begin, int64_t end) { sum += end - begin; });
    second.parallel_for(8, 1, [&](int, int64_t begin, int64_t end) { sum += end - begin; });
  }
  CHECK_EQUAL(sum.load(), 1600);
}

// A child inherits a team whose threads it has not: it starts its own, and neither use nor destruction waits
// for the others.
void test_forks() {
#if defined(__unix__) && !defined(__SANITIZE_THREAD__)  // which forbids threads after a fork
  for (const bool asleep : {false, true}) {
    auto team = std::make_unique<fc::ThreadTeam>(3);
    const auto total = [&] {
      std::atomic<int64_t> sum{0};
      team->parallel_for(1000, 7, [&](int, int64_t begin, int64_t end) { sum += end - begin; });
      return sum.load();
    };
    CHECK_EQUAL(total(), 1000);
    // All threads have begun before the fork: AddressSanitizer's lock for a thread that begins would stay
    // locked in the child.
    std::atomic<int> begun{0};
    team->parallel_for(3, 1, [&](int, int64_t, int64_t) {
      ++begun;
      for (int turn = 0; turn < 1000000 && begun < 3; ++turn) std::this_thread::yield();
    });
    if (asleep) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      const bool right = total() == 1000 && total() == 1000;
      team.reset();
      _exit(right ? 0 : 1);
    }
    int status = -1;
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK_EQUAL(status, 0);
    CHECK_EQUAL(total(), 1000);
  }
#endif
}

}  // namespace

TEST_PROGRAM {
  test_every_index_once();
  test_regions_follow_each_other();
  test_late_workers();
  test_thread_numbers_are_exclusive();
  test_exceptions();
  test_cancellation();
  test_cancellation_of_the_last_chunk();
  test_lifetimes();
  test_forks();
  return check::verdict("threads");
}
