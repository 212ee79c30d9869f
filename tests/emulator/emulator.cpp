#include "emulator/emulator.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <tuple>
#include <utility>
#include <vector>

#include "core/philox.h"
#include "emulator/fiber.h"
#include "emulator/shadow.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace fc::emulator {

namespace {

constexpr unsigned kLanes = 32;

#if defined(FC_EMULATOR_RACES)
constexpr bool kFindRaces = true;
#else
constexpr bool kFindRaces = false;
#endif

enum class Order { forward, reverse, random };

struct Schedule {
  std::string name;
  Order order;
  uint64_t seed = 0;
  uint64_t version = 0;  // counts the calls of set_schedule
};

Schedule parse_schedule(const std::string& name) {
  if (name == "forward") return {name, Order::forward};
  if (name == "reverse") return {name, Order::reverse};
  const std::string prefix = "random:";
  const std::string digits = name.compare(0, prefix.size(), prefix) == 0 ? name.substr(prefix.size()) : "";
  if (digits.empty() || digits.size() > 18 || digits.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument("schedule: expected forward, reverse or random:SEED, got \"" + name + "\"");
  return {name, Order::random, std::stoull(digits)};
}

struct Settings {
  std::mutex mutex;
  Schedule schedule;
  int resident_blocks = 3;

  Settings() {
    const char* name = std::getenv("FC_EMULATOR_SCHEDULE");
    schedule = parse_schedule(name != nullptr ? name : "forward");
  }
};

Settings& settings() {
  static Settings all;
  return all;
}

Schedule current_schedule() {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  return settings().schedule;
}

// Philox rows: the fill pattern and the choices of threads are independent streams of a seed.
constexpr uint64_t kFillStream = 0, kChoiceStream = 1;

// Forward and reverse: as a number of any type, very small in one and very large in the other, so that
// neither a minimum nor a maximum hides it in both.
void fill(const Schedule& schedule, void* memory, size_t bytes) {
  if (schedule.order != Order::random) {
    std::memset(memory, schedule.order == Order::forward ? 0xFE : 0x7F, bytes);
    return;
  }
  for (size_t done = 0; done < bytes; done += sizeof(PhiloxBlock)) {
    const PhiloxBlock random = philox4x32(schedule.seed, kFillStream, done);
    std::memcpy(static_cast<char*>(memory) + done, random.data(), std::min(sizeof random, bytes - done));
  }
}

std::string to_string(uint3 v) {
  std::ostringstream text;
  text << "(" << v.x << ", " << v.y << ", " << v.z << ")";
  return text.str();
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Whether this thread of the host runs a kernel.
thread_local bool in_launch = false;
struct InLaunch {
  InLaunch() { in_launch = true; }
  ~InLaunch() { in_launch = false; }
};

// Thrown in the threads that still wait when a launch has failed, so that their objects are destroyed.
struct Cancelled {};

enum class Scope { none, warp, block, grid };

// One thing that threads wait for together.
struct Operation {
  const char* name = nullptr;
  Site site{};
  unsigned mask = 0;  // of a warp's

  bool operator==(const Operation& other) const {
    return mask == other.mask && std::strcmp(name, other.name) == 0 && same(site, other.site);
  }
};

struct Shared {
  const void* tag;
  const char* name;
  size_t bytes;
  std::align_val_t alignment;
  void* memory;
};

struct Block {
  uint3 index{};
  uint64_t number = 0;  // in the grid
  unsigned first = 0;   // its first thread's number
  std::vector<Shared> shared;
  size_t static_bytes = 0;
  std::unique_ptr<char[]> dynamic;

  // At the barrier: the operation that the first thread came to, how many are there, and their votes; then
  // the result.
  Operation barrier;
  unsigned arrived = 0;
  int votes = 0;
  Votes result{};

  // For the race detector: barriers passed, how many there were at the last of the grid, and the time of the
  // last atomic operation.
  uint64_t phase = 1, grid_phase = 0, acquired = 0;

  Block() = default;
  Block(Block&&) = default;
  ~Block() {
    for (const Shared& array : shared) ::operator delete(array.memory, array.alignment);
  }
};

struct Warp {
  unsigned first = 0;    // its first lane's thread
  unsigned live = 0;     // lanes that have not exited
  unsigned waiting = 0;  // lanes in an operation of the warp

  // For the race detector, since the last barrier: seen[a][b] is the newest of lane b's clock that an
  // operation of the warp has brought to lane a, and seen[a][a] its own clock.
  bool clocks_moved = true;  // from where reset_clocks() puts them
  std::array<std::array<unsigned, kLanes>, kLanes> seen;

  void reset_clocks() {
    clocks_moved = false;
    for (unsigned a = 0; a < kLanes; ++a)
      for (unsigned b = 0; b < kLanes; ++b) seen[a][b] = a == b ? 1 : 0;
  }
  void join_clocks(unsigned lanes) {
    clocks_moved = true;
    std::array<unsigned, kLanes> newest{};
    for (unsigned left = lanes; left != 0; left &= left - 1)
      for (unsigned b = 0; b < kLanes; ++b) newest[b] = std::max(newest[b], seen[__builtin_ctz(left)][b]);
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      const unsigned lane = static_cast<unsigned>(__builtin_ctz(left));
      seen[lane] = newest;
      ++seen[lane][lane];
    }
  }
};

struct Thread {
  uint3 index{};
  unsigned number = 0, block = 0, warp = 0, lane = 0;
  Fiber* fiber = nullptr;  // none before it starts
  bool finished = false;

  Scope scope = Scope::none;
  Operation operation;
  // For an operation of the warp: the value that the lane brings, and the one that it gets.
  uint64_t value = 0, result = 0;
  int source = 0;
  Fold fold = nullptr;
  bool source_missing = false;

  bool fenced = false;
};

// An atomic operation after a fence: blocks that do an atomic operation later see what this one had written.
// A block's first in each phase is kept.
struct Release {
  uint64_t phase, time;
};

// The launch in progress. There is one at a time, whatever thread of the host it comes from.
class Runtime {
 public:
  cudaError_t run(const Configuration& configuration, const std::function<void()>& body);

  Thread& self() {
    if (!in_launch) throw std::logic_error("device code called outside of a kernel");
    return *current_;
  }
  Block& block() { return blocks_[self().block]; }

  [[noreturn]] void fail(const Thread& thread, const std::string& what) {
    throw Fault(blocks_[thread.block].index, thread.index, what);
  }

  Votes block_barrier(const Operation& operation, int predicate);
  void grid_barrier(const Operation& operation);
  uint64_t warp_operation(const Operation& operation, uint64_t value, int source, Fold fold);
  void* static_shared(const void* tag, const char* name, size_t bytes, size_t alignment);
  void touch(const void* address, size_t bytes, Touch how);
  void fence() { self().fenced = true; }
  void* dynamic_shared() { return block().dynamic.get(); }

 private:
  static constexpr unsigned kNone = ~0u;

  void prepare(unsigned slot, uint64_t number, uint3 index);
  void forget(const void* memory, size_t bytes);
  bool ordered(Access before, Access now, const Thread& thread) const;
  void report_race(const void* address, Touch how, Access before, bool before_writes);
  std::string where(const void* address) const;
  void run_resident();
  static void fiber_main();
  void thread_main();
  unsigned next_thread();
  void go_on(Fiber& from);
  void wait();
  void release(unsigned thread) {
    threads_[thread].scope = Scope::none;
    ready_[thread / 64] |= uint64_t{1} << (thread % 64);
  }
  void release_block(Block& block);
  bool try_warp(Warp& warp, unsigned lane);
  void finish(Thread& thread);
  void cancel(std::exception_ptr why);
  Fault stuck();
  std::string describe(const Thread& thread) const;
  uint64_t random();

  std::mutex launching_;
  Configuration configuration_;
  const std::function<void()>* body_ = nullptr;
  Schedule schedule_;
  uint64_t schedule_version_ = ~uint64_t{0};
  uint64_t choices_ = 0;

  unsigned block_threads_ = 0;
  std::vector<Block> blocks_;    // that are resident
  std::vector<Thread> threads_;  // of all of them
  std::vector<Warp> warps_;
  std::vector<uint64_t> ready_;  // one bit per thread that can go on
  unsigned unfinished_ = 0;
  Operation grid_;
  unsigned grid_arrived_ = 0;
  std::exception_ptr failure_;

  Shadow shadow_;
  std::vector<std::vector<Release>> releases_;  // of each block of the grid
  uint64_t time_ = 0;
  std::unique_ptr<Fault> race_;  // the first, thrown when its thread ends

  Thread* current_ = nullptr;
  Fiber host_;
  // Stacks are kept from launch to launch. A fiber whose thread has ended takes up the next one.
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
};

// Never destroyed, because a fiber's stack must outlive everything that uses it.
Runtime& runtime() {
  static Runtime& only = *new Runtime;
  return only;
}

cudaError_t Runtime::run(const Configuration& configuration, const std::function<void()>& body) {
  if (in_launch) throw std::logic_error("a kernel was launched from a kernel");
  const std::lock_guard<std::mutex> lock(launching_);
  const InLaunch mark;
  const dim3 grid = configuration.grid, block = configuration.block;
  const uint64_t grid_blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t block_threads = uint64_t{block.x} * block.y * block.z;
  const unsigned largest = device().largest_grid_y;
  if (grid.x - 1 >= 0x7FFFFFFFu || grid.y - 1 >= largest || grid.z - 1 >= largest ||
      block.x - 1 >= kMaxThreads || block.y - 1 >= kMaxThreads || block.z - 1 >= 64u ||
      block_threads > kMaxThreads)
    return remember(cudaErrorInvalidConfiguration);
  if (configuration.shared > kSharedBytes) return remember(cudaErrorInvalidValue);
  if (!device().has_code) return find_code();
  if (configuration.cooperative && grid_blocks > static_cast<uint64_t>(resident_blocks()))
    return remember(cudaErrorCooperativeLaunchTooLarge);

  configuration_ = configuration;
  body_ = &body;
  schedule_ = current_schedule();
  if (schedule_.version != schedule_version_) {
    schedule_version_ = schedule_.version;
    choices_ = 0;
  }
  gridDim = grid;
  blockDim = block;
  block_threads_ = static_cast<unsigned>(block_threads);
  failure_ = nullptr;
  race_ = nullptr;
  shadow_.begin_launch();
  if (kFindRaces) releases_.assign(grid_blocks, {});
  const unsigned resident = configuration.cooperative ? static_cast<unsigned>(grid_blocks) : 1;
  blocks_.clear();
  blocks_.resize(resident);
  threads_.assign(resident * block_threads_, Thread{});
  idle_.reserve(threads_.size());
  while (fibers_.size() < threads_.size()) {
    fibers_.push_back(std::make_unique<Fiber>(&Runtime::fiber_main));
    idle_.push_back(fibers_.back().get());
  }
  const unsigned block_warps = (block_threads_ + kLanes - 1) / kLanes;
  warps_.resize(std::max<size_t>(warps_.size(), resident * block_warps));
  ready_.assign((threads_.size() + 63) / 64, 0);

  std::vector<uint64_t> order(grid_blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (!configuration.cooperative && schedule_.order == Order::reverse)
    std::reverse(order.begin(), order.end());
  if (!configuration.cooperative && schedule_.order == Order::random)
    for (uint64_t left = grid_blocks; left > 1; --left) std::swap(order[left - 1], order[random() % left]);
  for (uint64_t i = 0; i < grid_blocks && !failure_; ++i) {
    const uint64_t b = order[i];
    const unsigned slot = configuration.cooperative ? static_cast<unsigned>(i) : 0;
    prepare(slot, b,
            {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
             static_cast<unsigned>(b / grid.x / grid.y)});
    if (slot + 1 == resident) run_resident();
  }
  blocks_.clear();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  return cudaSuccess;
}

// Makes a resident block of its slot, its threads ready to start, its shared memory uninitialised.
void Runtime::prepare(unsigned slot, uint64_t number, uint3 index) {
  Block& block = blocks_[slot];
  block.index = index;
  block.number = number;
  block.phase = 1;
  block.grid_phase = 0;
  block.acquired = 0;
  block.first = slot * block_threads_;
  block.arrived = 0;
  block.votes = 0;
  for (const Shared& array : block.shared) {
    fill(schedule_, array.memory, array.bytes);
    forget(array.memory, array.bytes);
  }
  if (!block.dynamic) block.dynamic.reset(new char[configuration_.shared]);
  fill(schedule_, block.dynamic.get(), configuration_.shared);
  forget(block.dynamic.get(), configuration_.shared);

  const unsigned block_warps = (block_threads_ + kLanes - 1) / kLanes;
  uint3 at{0, 0, 0};
  for (unsigned t = 0; t < block_threads_; ++t) {
    Thread& thread = threads_[block.first + t];
    thread = Thread{};
    thread.index = at;
    thread.number = block.first + t;
    thread.block = slot;
    thread.warp = slot * block_warps + t / kLanes;
    thread.lane = t % kLanes;
    release(thread.number);
    if (++at.x == blockDim.x) {
      at.x = 0;
      if (++at.y == blockDim.y) {
        at.y = 0;
        ++at.z;
      }
    }
  }
  for (unsigned w = 0; w < block_warps; ++w) {
    const unsigned lanes = std::min(kLanes, block_threads_ - w * kLanes);
    Warp& warp = warps_[slot * block_warps + w];
    warp.first = block.first + w * kLanes;
    warp.live = ~0u >> (kLanes - lanes);
    warp.waiting = 0;
    if (kFindRaces && warp.clocks_moved) warp.reset_clocks();
  }
}

// Runs the resident blocks to their end. Whoever finds nothing that can go on comes back here.
void Runtime::run_resident() {
  unfinished_ = static_cast<unsigned>(threads_.size());
  grid_arrived_ = 0;
  while (unfinished_ > 0) {
    go_on(host_);
    if (unfinished_ > 0) cancel(std::make_exception_ptr(stuck()));
  }
}

void Runtime::fiber_main() { runtime().thread_main(); }

void Runtime::thread_main() {
  for (;;) {
    Thread& thread = *current_;
    Fiber& fiber = *thread.fiber;
    std::exception_ptr thrown;
    try {
      (*body_)();
    } catch (const Cancelled&) {
    } catch (...) {
      thrown = std::current_exception();
    }
    finish(thread);
    if (race_ && !thrown) thrown = std::make_exception_ptr(*race_);
    if (thrown) cancel(std::exchange(thrown, nullptr));
    idle_.push_back(&fiber);
    go_on(fiber);
  }
}

uint64_t Runtime::random() {
  const PhiloxBlock words = philox4x32(schedule_.seed, kChoiceStream, choices_++);
  return uint64_t{words[0]} << 32 | words[1];
}

// The thread that goes on, by the schedule; it is not ready any more.
unsigned Runtime::next_thread() {
  const auto words = static_cast<unsigned>(ready_.size());
  unsigned start = 0;
  uint64_t first_mask = ~uint64_t{0};
  if (schedule_.order == Order::random) {
    const auto bit = static_cast<unsigned>(random() % threads_.size());
    start = bit / 64;
    first_mask <<= bit % 64;
  }
  // From a random bit on, and round to the bits of the first word that lie before it.
  for (unsigned i = 0; i <= words; ++i) {
    const unsigned w = schedule_.order == Order::reverse ? (2 * words - 1 - i) % words : (start + i) % words;
    const uint64_t ready = ready_[w] & (i == 0 ? first_mask : ~uint64_t{0});
    if (ready == 0) continue;
    const int bit = schedule_.order == Order::reverse ? 63 - __builtin_clzll(ready) : __builtin_ctzll(ready);
    ready_[w] &= ~(uint64_t{1} << bit);
    return w * 64 + static_cast<unsigned>(bit);
  }
  return kNone;
}

// Leaves the fiber for the next thread's, or for the host's if there is none.
void Runtime::go_on(Fiber& from) {
  const unsigned next = next_thread();
  if (next == kNone) {
    if (&from != &host_) Fiber::switch_to(from, host_);
    return;
  }
  Thread& thread = threads_[next];
  if (thread.fiber == nullptr) {
    thread.fiber = idle_.back();
    idle_.pop_back();
  }
  current_ = &thread;
  threadIdx = thread.index;
  blockIdx = blocks_[thread.block].index;
  if (thread.fiber != &from) Fiber::switch_to(from, *thread.fiber);
}

void Runtime::wait() {
  go_on(*current_->fiber);
  if (failure_) throw Cancelled();
}

void Runtime::release_block(Block& block) {
  ++block.phase;
  if (kFindRaces) {
    const unsigned first = threads_[block.first].warp, last = threads_[block.first + block_threads_ - 1].warp;
    for (unsigned w = first; w <= last; ++w)
      if (warps_[w].clocks_moved) warps_[w].reset_clocks();
  }
  for (unsigned t = block.first; t < block.first + block_threads_; ++t) release(t);
}

Votes Runtime::block_barrier(const Operation& operation, int predicate) {
  Thread& thread = self();
  if (failure_) return {};  // called by the destructor of an object in a thread that is being cancelled
  Block& block = blocks_[thread.block];
  thread.scope = Scope::block;
  thread.operation = operation;
  if (block.arrived == 0) block.barrier = operation;
  if (operation == block.barrier) {
    block.votes += predicate != 0;
    if (++block.arrived == block_threads_) {
      block.result = {block.votes, static_cast<int>(block_threads_)};
      block.arrived = 0;
      block.votes = 0;
      release_block(block);
    }
  }
  wait();
  return block.result;
}

void Runtime::grid_barrier(const Operation& operation) {
  Thread& thread = self();
  if (failure_) return;
  if (!configuration_.cooperative) fail(thread, "grid_sync() in a launch that is not cooperative");
  thread.scope = Scope::grid;
  thread.operation = operation;
  if (grid_arrived_ == 0) grid_ = operation;
  if (operation == grid_ && ++grid_arrived_ == threads_.size()) {
    grid_arrived_ = 0;
    for (Block& block : blocks_) {
      release_block(block);
      block.grid_phase = block.phase;
    }
  }
  wait();
}

uint64_t Runtime::warp_operation(const Operation& operation, uint64_t value, int source, Fold fold) {
  Thread& thread = self();
  if (failure_) return 0;
  if ((operation.mask >> thread.lane & 1) == 0) {
    std::ostringstream text;
    text << operation.name << " (" << operation.site.file << ":" << operation.site.line << ") with mask 0x"
         << std::hex << operation.mask << std::dec << ", in which its own lane " << thread.lane << " is not";
    fail(thread, text.str());
  }
  Warp& warp = warps_[thread.warp];
  thread.scope = Scope::warp;
  thread.operation = operation;
  thread.value = value;
  thread.source = source;
  thread.fold = fold;
  warp.waiting |= 1u << thread.lane;
  try_warp(warp, thread.lane);
  wait();
  if (thread.source_missing) {
    std::ostringstream text;
    text << describe(thread) << " and reads lane " << source
         << ", which has exited, was never started or is not in the mask";
    fail(thread, text.str());
  }
  return thread.result;
}

// Completes the operation that the lane waits in if all lanes it needs are there. Lanes that have exited are
// not waited for, as on the device.
bool Runtime::try_warp(Warp& warp, unsigned lane) {
  Thread* lanes = &threads_[warp.first];
  const Operation& operation = lanes[lane].operation;
  const unsigned needed = operation.mask & warp.live;
  if ((needed & ~warp.waiting) != 0) return false;
  for (unsigned left = needed; left != 0; left &= left - 1)
    if (!(lanes[__builtin_ctz(left)].operation == operation)) return false;

  const Fold fold = lanes[lane].fold;
  uint64_t folded = lanes[__builtin_ctz(needed)].value;
  if (fold != nullptr)
    for (unsigned left = needed & (needed - 1); left != 0; left &= left - 1)
      folded = fold(folded, lanes[__builtin_ctz(left)].value);
  for (unsigned left = needed; left != 0; left &= left - 1) {
    Thread& thread = lanes[__builtin_ctz(left)];
    thread.source_missing = fold == nullptr && (needed >> thread.source & 1) == 0;
    if (fold != nullptr)
      thread.result = folded;
    else if (!thread.source_missing)
      thread.result = lanes[thread.source].value;
  }
  warp.waiting &= ~needed;
  if (kFindRaces) warp.join_clocks(needed);
  for (unsigned left = needed; left != 0; left &= left - 1) release(warp.first + __builtin_ctz(left));
  return true;
}

void Runtime::finish(Thread& thread) {
  thread.finished = true;
  --unfinished_;
  Warp& warp = warps_[thread.warp];
  warp.live &= ~(1u << thread.lane);
  // Lanes may have waited for this one.
  for (unsigned left = warp.waiting; left != 0 && !failure_; left &= left - 1) {
    const auto lane = static_cast<unsigned>(__builtin_ctz(left));
    if (try_warp(warp, lane)) left &= warp.waiting | 1u << lane;
  }
}

// Ends the launch: threads that have not started never do, and those that wait are woken to unwind.
void Runtime::cancel(std::exception_ptr why) {
  if (failure_) return;
  failure_ = std::move(why);
  std::fill(ready_.begin(), ready_.end(), 0);
  for (Thread& thread : threads_) {
    if (thread.finished) continue;
    if (thread.fiber != nullptr) {
      release(thread.number);
    } else {
      thread.finished = true;
      --unfinished_;
    }
  }
}

std::string Runtime::describe(const Thread& thread) const {
  std::ostringstream text;
  if (thread.finished) return "has exited";
  text << "waits at " << thread.operation.name;
  if (thread.scope == Scope::warp) text << " with mask 0x" << std::hex << thread.operation.mask << std::dec;
  text << " (" << thread.operation.site.file << ":" << thread.operation.site.line << ")";
  return text.str();
}

// Nothing can go on: names a thread that waits, and the first it waits for in vain.
Fault Runtime::stuck() {
  const auto waits = [](const Thread& thread) { return !thread.finished; };
  const Thread& thread = *std::find_if(threads_.begin(), threads_.end(), waits);
  const auto awaited = [&](const Thread& other) {
    switch (thread.scope) {
      case Scope::block:
        if (other.block != thread.block) return false;
        break;
      case Scope::warp:
        if (other.warp != thread.warp || (thread.operation.mask >> other.lane & 1) == 0 || other.finished)
          return false;
        break;
      default:
        break;
    }
    return other.finished || other.scope != thread.scope || !(other.operation == thread.operation);
  };
  const Thread& other = *std::find_if(threads_.begin(), threads_.end(), awaited);
  const uint3 block = blocks_[thread.block].index;
  std::string what = describe(thread) + ", but thread " + to_string(other.index);
  if (other.block != thread.block) what += " of block " + to_string(blocks_[other.block].index);
  return Fault(block, thread.index, what + " " + describe(other));
}

// Memory of this block's own, which another block had before.
void Runtime::forget(const void* memory, size_t bytes) {
  if (!kFindRaces) return;
  const auto first = reinterpret_cast<uintptr_t>(memory);
  for (size_t i = 0; i < bytes;) {
    const auto [cell, step] = shadow_.at(first + i, bytes - i);
    *cell = {};
    i += step;
  }
}

bool Runtime::ordered(Access before, Access now, const Thread& thread) const {
  if (before.same_thread(now)) return true;
  const Block& block = blocks_[thread.block];
  if (before.same_block(now)) {
    if (!before.same_phase(now)) return true;
    const Warp& warp = warps_[thread.warp];
    const unsigned first = warp.first - block.first;
    return before.thread() - first < kLanes &&
           warp.seen[thread.lane][before.thread() - first] >= before.clock();
  }
  if (configuration_.cooperative && before.phase() < blocks_[before.block()].grid_phase) return true;
  const std::vector<Release>& releases = releases_[before.block()];
  const auto release =
      std::find_if(releases.begin(), releases.end(), [&](Release r) { return r.phase >= before.phase(); });
  return release != releases.end() && release->time < block.acquired;
}

void Runtime::touch(const void* address, size_t bytes, Touch how) {
  if (!in_launch || race_) return;
  Thread& thread = *current_;
  const auto first = reinterpret_cast<uintptr_t>(address);
  if (thread.fiber->contains(first)) return;
  Block& block = blocks_[thread.block];
  const Access now(block.number, thread.number - block.first, block.phase,
                   warps_[thread.warp].seen[thread.lane][thread.lane], how == Touch::atomic);
  for (size_t i = 0, step; i < bytes; i += step) {
    Shadow::Cell* cell;
    std::tie(cell, step) = shadow_.at(first + i, bytes - i);
    if (cell->write && !(how == Touch::atomic && cell->write.atomic()) && !ordered(cell->write, now, thread))
      return report_race(address, how, cell->write, true);
    if (how == Touch::read) {
      if (!cell->read.same_thread(now)) cell->other_read = cell->read;
      cell->read = now;
      continue;
    }
    for (const Access read : {cell->read, cell->other_read})
      if (read && !ordered(read, now, thread)) return report_race(address, how, read, false);
    cell->write = now;
  }
  if (how == Touch::atomic) {
    block.acquired = ++time_;
    std::vector<Release>& releases = releases_[block.number];
    if (thread.fenced && (releases.empty() || releases.back().phase < block.phase))
      releases.push_back({block.phase, ++time_});
  }
}

// The place of the address: the block's shared memory, or device memory.
std::string Runtime::where(const void* address) const {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto within = [at](const void* memory, size_t bytes) {
    return at - reinterpret_cast<uintptr_t>(memory) < bytes;
  };
  const auto byte = [at](const void* memory) {
    return "byte " + std::to_string(at - reinterpret_cast<uintptr_t>(memory)) + " of ";
  };
  const Block& block = blocks_[current_->block];
  for (const Shared& array : block.shared)
    if (within(array.memory, array.bytes)) return byte(array.memory) + "the shared " + array.name;
  if (within(block.dynamic.get(), configuration_.shared))
    return byte(block.dynamic.get()) + "dynamic shared memory";
  const Allocation device = allocation_of(address);
  if (device.memory == nullptr) return "memory that is not the device's";
  return byte(device.memory) + "an array of " + std::to_string(device.bytes) + " bytes in device memory";
}

// The instrumented code cannot be left by an exception, so the launch ends with the thread.
void Runtime::report_race(const void* address, Touch how, Access before, bool before_writes) {
  const auto verb = [](Touch touch) {
    return touch == Touch::read ? "reads" : touch == Touch::write ? "writes" : "atomically updates";
  };
  const Touch other = !before_writes ? Touch::read : before.atomic() ? Touch::atomic : Touch::write;
  const uint64_t b = before.block();
  const unsigned t = before.thread();
  const uint3 thread{t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
  const uint3 block{static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                    static_cast<unsigned>(b / gridDim.x / gridDim.y)};
  race_ = std::make_unique<Fault>(
      blocks_[current_->block].index, current_->index,
      std::string("race: ") + verb(how) + " " + where(address) + ", which thread " + to_string(thread) +
          " of block " + to_string(block) + " " + verb(other) + " with nothing that orders the two");
}

void* Runtime::static_shared(const void* tag, const char* name, size_t bytes, size_t alignment) {
  Block& block = this->block();
  for (const Shared& array : block.shared)
    if (array.tag == tag) return array.memory;
  block.static_bytes += bytes;
  if (block.static_bytes > kStaticSharedBytes || block.static_bytes + configuration_.shared > kSharedBytes) {
    std::ostringstream text;
    text << "more shared memory than a block has: " << block.static_bytes << " bytes declared, "
         << configuration_.shared << " asked for by the launch";
    fail(self(), text.str());
  }
  const std::align_val_t align{std::max<size_t>(alignment, 16)};
  block.shared.push_back({tag, name, bytes, align, ::operator new(bytes, align)});
  fill(schedule_, block.shared.back().memory, bytes);
  forget(block.shared.back().memory, bytes);
  return block.shared.back().memory;
}

}  // namespace

void set_schedule(const std::string& name) {
  Schedule schedule = parse_schedule(name);
  const std::lock_guard<std::mutex> lock(settings().mutex);
  schedule.version = settings().schedule.version + 1;
  settings().schedule = std::move(schedule);
}

std::string schedule() { return current_schedule().name; }

void set_resident_blocks(int blocks) {
  if (blocks < 1) throw std::invalid_argument("resident blocks: expected at least 1");
  const std::lock_guard<std::mutex> lock(settings().mutex);
  settings().resident_blocks = blocks;
}

int resident_blocks() {
  const std::lock_guard<std::mutex> lock(settings().mutex);
  return settings().resident_blocks;
}

Fault::Fault(uint3 block, uint3 thread, const std::string& what)
    : std::runtime_error("block " + to_string(block) + ", thread " + to_string(thread) + ": " + what),
      block(block),
      thread(thread) {}

cudaError_t run(const Configuration& configuration, const std::function<void()>& body) {
  return runtime().run(configuration, body);
}

void poison(void* memory, size_t bytes) { fill(current_schedule(), memory, bytes); }

Votes block_barrier(const char* operation, Site site, int predicate) {
  return runtime().block_barrier({operation, site}, predicate);
}

void grid_sync(Site site) { runtime().grid_barrier({"grid_sync", site}); }

int lane() { return static_cast<int>(runtime().self().lane); }

uint64_t warp_exchange(unsigned mask, uint64_t value, int source, const char* operation, Site site) {
  return runtime().warp_operation({operation, site, mask}, value, source, nullptr);
}

uint64_t warp_fold(unsigned mask, uint64_t value, Fold fold, const char* operation, Site site) {
  return runtime().warp_operation({operation, site, mask}, value, 0, fold);
}

void fail(const std::string& what) { runtime().fail(runtime().self(), what); }

void touch(const void* address, size_t bytes, Touch how) {
  if (kFindRaces) runtime().touch(address, bytes, how);
}
void fence() { runtime().fence(); }

void* static_shared(const void* tag, const char* name, size_t bytes, size_t alignment) {
  return runtime().static_shared(tag, name, bytes, alignment);
}

void* dynamic_shared() { return runtime().dynamic_shared(); }

}  // namespace fc::emulator
