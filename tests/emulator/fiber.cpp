#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define FC_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FC_ADDRESS_SANITIZER
#endif
#endif
#if defined(FC_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__SANITIZE_THREAD__)
#define FC_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FC_THREAD_SANITIZER
#endif
#endif
#if defined(FC_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(FC_EMULATOR_UCONTEXT)
// Saves what a callee must preserve on the stack, stores the stack pointer at *save, and takes up the stack
// at `load`. The rounding mode and the like are the same for every fiber.
extern "C" __attribute__((visibility("hidden"))) void fc_emulator_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
  .text
  .p2align 4
  .globl fc_emulator_switch
  .hidden fc_emulator_switch
  .type fc_emulator_switch, @function
fc_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fc_emulator_switch, . - fc_emulator_switch
)");
#else
asm(R"(
  .text
  .p2align 4
  .globl fc_emulator_switch
  .hidden fc_emulator_switch
  .type fc_emulator_switch, %function
fc_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size fc_emulator_switch, . - fc_emulator_switch
)");
#endif
#endif

namespace fc::emulator {

namespace {

// The sanitizer's red zones and its reports need room of their own; pages that are never touched cost
// nothing.
#if defined(FC_ADDRESS_SANITIZER)
constexpr size_t kStackBytes = 256 * 1024;
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// The two ends of the switch in progress: the code that runs first on the other stack reads them.
Fiber* leaving = nullptr;
Fiber* entering = nullptr;

}  // namespace

Fiber::Fiber(void (*run)()) : run_(run), bytes_(kStackBytes) {
  const size_t guard = page_bytes();
  void* mapping =
      mmap(nullptr, guard + bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<char*>(mapping);
  bottom_ = mapping_ + guard;
  if (mprotect(mapping_ + guard, bytes_, PROT_READ | PROT_WRITE) != 0) {
    munmap(mapping_, guard + bytes_);
    throw std::bad_alloc();
  }
#if defined(FC_THREAD_SANITIZER)
  thread_ = __tsan_create_fiber(0);
#endif
#if defined(FC_EMULATOR_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = mapping_ + guard;
  context_.uc_stack.ss_size = bytes_;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::start, 0);
#else
  // The stack as if start() had just been left by a switch, with a return address of zero above it: there
  // stack traces end. Fresh pages are zero, and so are all other registers.
  auto* top = reinterpret_cast<uintptr_t*>(mapping_ + guard + bytes_);
#if defined(__x86_64__)
  top[-2] = reinterpret_cast<uintptr_t>(&Fiber::start);
  stack_pointer_ = top - 8;
#else
  top[-20 + 11] = reinterpret_cast<uintptr_t>(&Fiber::start);  // x30
  stack_pointer_ = top - 20;
#endif
#endif
}

Fiber::~Fiber() {
  if (mapping_ == nullptr) return;
  munmap(mapping_, page_bytes() + bytes_);
#if defined(FC_THREAD_SANITIZER)
  __tsan_destroy_fiber(thread_);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  leaving = &from;
  entering = &to;
#if defined(FC_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.bytes_);
#endif
#if defined(FC_THREAD_SANITIZER)
  if (from.mapping_ == nullptr) from.thread_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.thread_, 0);
#endif
#if defined(FC_EMULATOR_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  fc_emulator_switch(&from.stack_pointer_, to.stack_pointer_);
#endif
  from.arrived();
}

void Fiber::arrived() {
#if defined(FC_ADDRESS_SANITIZER)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &bytes);
  // The program's own stack: only now does the sanitizer report where it is.
  if (leaving->mapping_ == nullptr) {
    leaving->bottom_ = bottom;
    leaving->bytes_ = bytes;
  }
#endif
}

void Fiber::start() {
  Fiber* self = entering;
  self->arrived();
  self->run_();
}

}  // namespace fc::emulator
