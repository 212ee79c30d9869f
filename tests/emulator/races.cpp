// The functions that GCC calls before each access in code compiled with -fsanitize=thread: the interface of
// its thread sanitizer, whose own library is not linked.
#include <cstddef>

#include "emulator/emulator.h"

using fc::emulator::touch;
using fc::emulator::Touch;

#define FC_ACCESS(bytes)                                                                     \
  void __tsan_read##bytes(void* address) { touch(address, bytes, Touch::read); }             \
  void __tsan_write##bytes(void* address) { touch(address, bytes, Touch::write); }           \
  void __tsan_unaligned_read##bytes(void* address) { touch(address, bytes, Touch::read); }   \
  void __tsan_unaligned_write##bytes(void* address) { touch(address, bytes, Touch::write); } \
  void __tsan_volatile_read##bytes(void* address) { touch(address, bytes, Touch::read); }    \
  void __tsan_volatile_write##bytes(void* address) { touch(address, bytes, Touch::write); }

extern "C" {

FC_ACCESS(1)
FC_ACCESS(2)
FC_ACCESS(4)
FC_ACCESS(8)
FC_ACCESS(16)
void __tsan_read_range(void* address, size_t bytes) { touch(address, bytes, Touch::read); }
void __tsan_write_range(void* address, size_t bytes) { touch(address, bytes, Touch::write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

}  // extern "C"
