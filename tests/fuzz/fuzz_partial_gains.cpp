// Fuzzes gains over some of the clients: any order of batches, lists, wins and rising bests, whose sums have
// to be those over all pairs.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "cpu/partial_gains.h"
#include "input.h"

namespace {

template <class T>
void run(fuzz::Input& in) {
  const int64_t n = 1 + in.below(12), m = in.below(60);
  fc::PartialGains<T> gains(m, in.below(300));
  fc::ThreadTeam team(static_cast<int>(1 + in.below(3)));
  const bool any = in.coin();
  const fuzz::Array<T> s(in, n, m, any, true);
  std::vector<T> best = in.numbers<T>(m, false);
  std::vector<T> weight = in.numbers<T>(m, false);
  for (T& w : weight) w = std::abs(w);
  std::vector<int64_t> owner(m, -1);

  const auto check = [&](int64_t j, int64_t sum) {
    if (any) return;
    int64_t expected = 0;
    for (int64_t c = 0; c < m; ++c) {
      const T gap = s.view(j, c) - best[c];
      if (gap > 0) expected += static_cast<int64_t>(gap * weight[c]);
    }
    if (sum != expected) std::abort();
  };
  for (int64_t round = 0; round < 12; ++round) {
    std::vector<int64_t> numbers(n), sums(n, int64_t{0});
    std::iota(numbers.begin(), numbers.end(), int64_t{0});
    std::rotate(numbers.begin(), numbers.begin() + in.below(n), numbers.end());
    numbers.resize(1 + in.below(n));
    const auto count = static_cast<int64_t>(numbers.size());
    const bool listed = std::all_of(numbers.begin(), numbers.end(), [&](int64_t j) { return gains.has(j); });
    if (listed && in.coin()) {
      gains.evaluate(numbers.data(), count, best.data(), weight.data(), sums.data(), team);
    } else {
      gains.begin(count, in.coin());
      const int64_t width = 1 + in.below(64);
      for (int64_t first = 0; first < m; first += width) {
        const int64_t columns = std::min(width, m - first);
        std::vector<T> block(count * columns);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < columns; ++c) block[r * columns + c] = s.view(numbers[r], first + c);
        gains.add(fc::TensorView<const T, 2>::compact(block.data(), count, columns), first, best.data(),
                  weight.data(), sums.data(), team);
      }
      gains.keep(numbers.data());
    }
    for (int64_t r = 0; r < count; ++r) check(numbers[r], sums[r]);
    const int64_t winner = numbers[0];
    if (gains.has(winner) && in.coin()) gains.win(winner, round, best.data(), owner.data());
    if (in.coin()) gains.forget(winner);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::with_float_or_double(data, size, [](auto zero, fuzz::Input& in) { run<decltype(zero)>(in); });
}
