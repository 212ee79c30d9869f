// Candidates by upper bounds of what they gain.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fc {

// A candidate with an upper bound of its pick_key. Better: larger bound, then lower index.
struct Entry {
  int64_t bound, candidate;
  bool better_than(const Entry& other) const {
    return bound != other.bound ? bound > other.bound : candidate < other.candidate;
  }
};

class CandidateHeap {
 public:
  bool empty() const { return entries_.empty(); }
  const Entry& top() const { return entries_.front(); }
  void clear() { entries_.clear(); }
  void append_unordered(Entry e) { entries_.push_back(e); }
  void order() { std::make_heap(entries_.begin(), entries_.end(), worse); }
  void push(Entry e) {
    entries_.push_back(e);
    std::push_heap(entries_.begin(), entries_.end(), worse);
  }
  Entry pop() {
    std::pop_heap(entries_.begin(), entries_.end(), worse);
    const Entry e = entries_.back();
    entries_.pop_back();
    return e;
  }

 private:
  static bool worse(const Entry& a, const Entry& b) { return b.better_than(a); }
  std::vector<Entry> entries_;
};

}  // namespace fc
