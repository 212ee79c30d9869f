// Fibers: stacks that the emulator switches between itself. A kernel's thread has to stop in the middle of
// any function (at a barrier, in a shuffle) and go on later, so it needs a stack of its own.
//
// Rejected: operating-system threads (a switch is a system call and a trip through the scheduler, some
// microseconds instead of nanoseconds, and the order is the kernel's, not the schedule's); C++20 coroutines
// (they only stop in the coroutine's own frame, so every device function would have to become one); splitting
// kernels at their barriers (a compiler pass); swapcontext alone (two system calls per switch, to save a
// signal mask that nobody changes). swapcontext remains for processors for which no switch is written out.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(FC_EMULATOR_UCONTEXT) && !(defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)))
#define FC_EMULATOR_UCONTEXT
#endif
#if defined(FC_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace fc::emulator {

class Fiber {
 public:
  Fiber() = default;  // the stack that the program is on
  explicit Fiber(
      void (*run)());  // a stack of its own, on which the first switch calls run; it must not return
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, the fiber that is running, for `to`. Returns when something switches back.
  static void switch_to(Fiber& from, Fiber& to);

  // Whether the address is on the fiber's own stack.
  bool contains(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(bottom_) < bytes_; }

 private:
  static void start();
  void arrived();

  void (*run_)() = nullptr;
  char* mapping_ = nullptr;  // guard page and stack
  const void* bottom_ =
      nullptr;  // lowest address of the stack, and its size: the address sanitizer keeps track
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;  // the sanitizer's own, while the fiber is not running
  void* thread_ = nullptr;      // what the thread sanitizer takes the fiber for
#if defined(FC_EMULATOR_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;  // while the fiber is not running
#endif
};

}  // namespace fc::emulator
