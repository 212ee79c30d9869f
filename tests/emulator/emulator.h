// The emulator behind cuda.h: it runs a kernel's blocks and threads, in the order of a schedule, and reports
// their faults.
//
// A thread of a kernel is a fiber that runs until it has to wait: at a barrier, at grid_sync(), or in an
// operation of its warp. Then the next thread in the schedule's order goes on. Nothing else interrupts it, so
// a launch is deterministic; the schedules show whether a result depends on the order:
//
//   forward       the first thread that can go on, in the first block
//   reverse       the last one: each pair of threads that no barrier orders runs the other way round
//   random:SEED   any; blocks in any order, too
//
// The memory a kernel gets is filled with bytes that differ from schedule to schedule, so the results of a
// kernel that reads memory before writing it differ too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "emulator/host.h"

namespace fc::emulator {

// A schedule by its name, as above, for all launches that follow; before the first call that is the value of
// the environment variable FC_EMULATOR_SCHEDULE, or forward. Also starts the random numbers anew.
void set_schedule(const std::string& name);
std::string schedule();

// How many blocks the emulated device holds at once: the largest cooperative grid.
void set_resident_blocks(int blocks);
int resident_blocks();

// A fault of a kernel, and which of its threads was found committing it. The launch throws it.
struct Fault : std::runtime_error {
  Fault(uint3 block, uint3 thread, const std::string& what);
  uint3 block, thread;
};

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  bool cooperative = false;
};

// Runs body once per thread. An exception that a thread throws ends the launch and is thrown here.
cudaError_t run(const Configuration& configuration, const std::function<void()>& body);

template <class... P>
cudaError_t launch(void (*kernel)(P...), const Configuration& configuration, P... parameters) {
  const std::tuple<P...> all(std::move(parameters)...);
  return run(configuration, [&] { std::apply(kernel, all); });
}

// Fills memory with what the schedule has for uninitialised bytes.
void poison(void* memory, size_t bytes);

// The place in the kernel's source where a thread waits. As a default argument it is the caller's place.
struct Site {
  const char* file;
  int line;
  static Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// The functions that the intrinsics of device.h are made of. `operation` is the name that reports use;
// threads that wait for one another must have come to the same operation at the same site.

struct Votes {
  int count;  // threads whose predicate is not zero, of `threads`
  int threads;
};
Votes block_barrier(const char* operation, Site site, int predicate);
void grid_sync(Site site = Site::here());

// The calling thread's lane in its warp.
int lane();
// Waits for the lanes of the mask that have not exited. warp_exchange returns the value that lane `source`
// brought, warp_fold the values of all folded in the order of the lanes.
uint64_t warp_exchange(unsigned mask, uint64_t value, int source, const char* operation, Site site);
using Fold = uint64_t (*)(uint64_t, uint64_t);
uint64_t warp_fold(unsigned mask, uint64_t value, Fold fold, const char* operation, Site site);
// Reports a fault of the running thread.
[[noreturn]] void fail(const std::string& what);

// Races. If kernels are compiled with -fsanitize=thread, the compiler announces each access to memory; the
// functions it calls are ours (races.cpp), not the sanitizer's. Two accesses to a byte by different threads
// are a fault if one writes and one is not atomic, unless a barrier stands between them. Threads of different
// blocks are ordered by grid_sync(), or if one block's atomic operation after a __threadfence() precedes one
// of the other's.
enum class Touch { read, write, atomic };
void touch(const void* address, size_t bytes, Touch how);
void fence();

// Memory of the block's own, one allocation per tag; and the launch's dynamic shared memory.
void* static_shared(const void* tag, const char* name, size_t bytes, size_t alignment);
void* dynamic_shared();

template <class Array, class Tag>
Array& shared_array(Tag, const char* name) {
  static_assert(std::is_trivially_default_constructible_v<Array> && std::is_trivially_destructible_v<Array>,
                "shared memory is uninitialised: its type may have no constructor");
  static const char tag = 0;
  return *static_cast<Array*>(static_shared(&tag, name, sizeof(Array), alignof(Array)));
}

}  // namespace fc::emulator
