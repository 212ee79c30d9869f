// Runs that Python advances step by step.
#pragma once

#include <stdexcept>
#include <utility>

#include "bindings/bindings.h"

namespace fc {

// Calls of a run without the GIL, one at a time: a second thread gets an error instead of a race.
class OneCall {
 public:
  template <class Fn>
  auto operator()(Fn&& fn) {
    if (busy_) throw std::runtime_error("this run is in use by another thread");
    busy_ = true;
    const Release release{busy_};
    return without_gil(std::forward<Fn>(fn));
  }

 private:
  struct Release {
    bool& busy;
    ~Release() { busy = false; }
  };

  bool busy_ = false;  // read and written with the GIL held
};

}  // namespace fc
