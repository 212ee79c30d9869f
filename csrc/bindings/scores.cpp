// Python's view of the sample scores.
#include "cpu/scores.h"

#include "bindings/bindings.h"
#include "bindings/boundary.h"

namespace fc {

void bind_scores(py::module_& m) {
  m.def(
      "sample_scores",
      [](py::object logits_array, py::object targets_array, Flag masked_flag, py::object out_array,
         Integer threads_number) {
        const int threads = threads_number.threads();
        const bool masked = masked_flag.on("masked");
        const ArrayArgument logits(logits_array, "logits"), targets(targets_array, "targets"),
            out(out_array, "out");
        dispatch_real(logits, [&](auto zero) {
          using X = decltype(zero);
          const auto x = logits.input<X, 3>();
          const auto t = targets.input<int64_t, 2>();
          const auto result = out.output<ScoreOf<X>, 3>();
          if (x.shape[2] == 0) throw py::value_error("logits: expected at least 1 class");
          targets.require_shape({x.shape[0], x.shape[1]});
          out.require_shape({5, x.shape[0], x.shape[1]});
          without_gil([&] {
            ThreadTeam team(threads, signal_poll());
            sample_scores<X>(x, t, masked, result, team);
          });
        });
      },
      py::arg("logits"), py::arg("targets"), py::arg("masked"), py::arg("out"), py::arg("threads") = 1,
      "out [5, N, T] = loss, entropy, margin, EL2N and correctness of logits [N, T, C] with targets [N, T]; "
      "with "
      "`masked` a target of -1 stands for a token that does not count.");
}

}  // namespace fc
