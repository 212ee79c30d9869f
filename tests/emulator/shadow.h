// The race detector's record of each byte that kernels touch: who wrote it last, and two threads that read it
// last. One cell stands for an aligned word of four bytes until something touches less of a word nearby: most
// kernels never do, and the detector's time goes into fetching cells.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>

namespace fc::emulator {

// An access, packed into 64 bits; numbers that do not fit wrap round, which can hide a race and never invents
// one: the block's number in its launch, the thread's in the block, how many barriers the block had passed,
// the lane's clock (see Warp in emulator.cpp), and whether it was atomic. Zero: none.
class Access {
 public:
  Access() = default;
  Access(uint64_t block, unsigned thread, uint64_t phase, unsigned clock, bool atomic)
      : bits_((block & 0xFFFF) << 48 | uint64_t{thread} << 38 | (phase & 0xFFFFF) << 18 |
              uint64_t{clock & 0x1FFFF} << 1 | uint64_t{atomic}) {}

  explicit operator bool() const { return bits_ != 0; }
  bool operator==(Access other) const { return bits_ == other.bits_; }
  bool same_thread(Access other) const { return (bits_ ^ other.bits_) >> 38 == 0; }
  bool same_block(Access other) const { return (bits_ ^ other.bits_) >> 48 == 0; }
  bool same_phase(Access other) const { return ((bits_ ^ other.bits_) >> 18 & 0xFFFFF) == 0; }
  unsigned block() const { return static_cast<unsigned>(bits_ >> 48); }
  unsigned thread() const { return static_cast<unsigned>(bits_ >> 38) & 0x3FF; }
  unsigned phase() const { return static_cast<unsigned>(bits_ >> 18) & 0xFFFFF; }
  unsigned clock() const { return static_cast<unsigned>(bits_ >> 1) & 0x1FFFF; }
  bool atomic() const { return (bits_ & 1) != 0; }

 private:
  uint64_t bits_ = 0;
};

class Shadow {
 public:
  struct Cell {
    Access write, read, other_read;
  };

  // Forgets all, in no time: records of an older launch count as nothing.
  void begin_launch() { ++launch_; }

  // The cell of the first of `bytes` bytes, and how many of them it stands for.
  std::pair<Cell*, size_t> at(uintptr_t address, size_t bytes) {
    const uintptr_t key = address / kChunk, offset = address % kChunk;
    Chunk*& recent = recent_[key % kRecent];
    if (recent == nullptr || recent->key != key) recent = &find(key);
    Chunk& chunk = *recent;
    if (chunk.launch != launch_) {
      chunk.launch = launch_;
      chunk.word = kWord;
      std::fill_n(chunk.cells.begin(), kChunk / kWord, Cell{});
    }
    if ((address | bytes) % kWord != 0 && chunk.word == kWord) {
      for (size_t i = kChunk; i-- > 0;) chunk.cells[i] = chunk.cells[i / kWord];
      chunk.word = 1;
    }
    return {&chunk.cells[offset / chunk.word], chunk.word};
  }

 private:
  static constexpr uintptr_t kChunk = 256, kRecent = 1024, kWord = 4;
  struct Chunk {
    uintptr_t key;
    uint64_t launch = 0;
    size_t word;  // bytes that a cell stands for
    std::array<Cell, kChunk> cells;
  };

  Chunk& find(uintptr_t key) {
    std::unique_ptr<Chunk>& chunk = chunks_[key];
    if (!chunk) {
      chunk = std::make_unique<Chunk>();
      chunk->key = key;
    }
    return *chunk;
  }

  std::unordered_map<uintptr_t, std::unique_ptr<Chunk>> chunks_;
  std::array<Chunk*, kRecent> recent_{};  // by key; chunks are never moved nor freed
  uint64_t launch_ = 1;
};

}  // namespace fc::emulator
