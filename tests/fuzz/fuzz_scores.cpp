// Fuzzes the sample scores: they lie in their ranges, or the input is refused.
#include <cmath>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "cpu/scores.h"
#include "input.h"

namespace {

template <class X>
X number(fuzz::Input& in, bool any) {
  if constexpr (std::is_floating_point_v<X>) {
    return in.number<X>(any);
  } else {
    const uint16_t low = in.byte();
    return {static_cast<uint16_t>(any ? low | in.byte() << 8 : 0x3C00 | low)};
  }
}

template <class X>
void run(fuzz::Input& in) {
  using T = fc::ScoreOf<X>;
  const int64_t n = 1 + in.below(4), tokens = 1 + in.below(3), classes = 1 + in.below(in.coin() ? 9 : 1500);
  const bool any = in.coin(), any_target = in.coin(), masked = in.coin(), strided = in.coin();
  std::vector<X> logits(n * tokens * classes);
  for (X& x : logits) x = number<X>(in, any);
  std::vector<int64_t> targets(n * tokens);
  for (int64_t& t : targets) t = any_target ? in.below(classes + 2) - 1 : in.below(classes);
  const fc::TensorView<const X, 3> view =
      strided ? fc::TensorView<const X, 3>{logits.data(), {n, tokens, classes}, {tokens, 1, n * tokens}}
              : fc::TensorView<const X, 3>::compact(logits.data(), n, tokens, classes);
  std::vector<T> out(5 * n * tokens);
  fc::ThreadTeam team(static_cast<int>(1 + in.below(2)));
  try {
    fc::sample_scores<X>(view, fc::TensorView<const int64_t, 2>::compact(targets.data(), n, tokens), masked,
                         fc::TensorView<T, 3>::compact(out.data(), 5, n, tokens), team);
  } catch (const std::invalid_argument&) {
    if (!any && !any_target) std::abort();
    return;
  }
  const int64_t rows = n * tokens;
  const double slack = 1e-5;
  for (int64_t r = 0; r < rows; ++r) {
    const double loss = out[r], entropy = out[rows + r], margin = out[2 * rows + r], el2n = out[3 * rows + r];
    const bool ok = loss >= 0 && entropy >= 0 && entropy <= std::log(classes) + slack &&
                    margin >= -1 - slack && margin <= 1 + slack && el2n >= 0 &&
                    el2n <= std::sqrt(2.0) + slack;
    if (!ok) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Input in(data, size);
  switch (in.byte() % 4) {
    case 0:
      run<float>(in);
      break;
    case 1:
      run<double>(in);
      break;
    case 2:
      run<fc::Half>(in);
      break;
    default:
      run<fc::BFloat16>(in);
  }
  return 0;
}
