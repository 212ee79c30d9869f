// Python's view of gains over the clients that are here.
#include "cpu/partial_gains.h"

#include <algorithm>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/run.h"

namespace fc {
namespace {

class PyPartialGains {
  template <class Fn>
  auto locked(Fn&& fn) {
    return one_call_([&] { return std::visit([&](auto& gains) { return fn(*gains); }, gains_); });
  }

 public:
  PyPartialGains(Integer clients_number, const std::string& dtype, Integer entries_number,
                 Integer threads_number)
      : threads_(threads_number.threads()) {
    const int64_t clients = clients_number.count("clients", 0), entries = entries_number.count("entries", 0);
    if (dtype == "float32") {
      gains_ = std::make_unique<PartialGains<float>>(clients, entries);
    } else if (dtype == "float64") {
      gains_ = std::make_unique<PartialGains<double>>(clients, entries);
    } else {
      throw py::value_error("dtype: expected float32 or float64, got '" + dtype + "'");
    }
  }

  void begin(Integer rows_number, Flag listing_flag) {
    const int64_t rows = rows_number.count("rows", 0);
    const bool listing = listing_flag.on("listing");
    locked([&](auto& gains) { gains.begin(rows, listing); });
  }

  void add(py::object s_array, Integer first_number, py::object best_array, py::object weights_array,
           py::object sums_array) {
    const ArrayArgument s(s_array, "s"), best(best_array, "best"), weights(weights_array, "weights"),
        sums(sums_array, "sums");
    const int64_t first = first_number.in("first", 0);
    const auto out = sums.output<int64_t, 1>();
    locked([&](auto& gains) {
      using T = value_of<decltype(gains)>;
      const auto block = s.input<T, 2>();
      if (!block.has_contiguous_rows())
        throw std::invalid_argument("s: expected rows that are contiguous in memory; pass a contiguous copy");
      if (block.rows() != gains.rows()) {
        throw std::invalid_argument("s: expected " + std::to_string(gains.rows()) +
                                    " rows as begin() was told, got " + std::to_string(block.rows()));
      }
      if (first > gains.clients() - block.cols()) {
        throw std::invalid_argument("first: expected a block within " + std::to_string(gains.clients()) +
                                    " clients, got " + std::to_string(block.cols()) + " from " +
                                    std::to_string(first));
      }
      const T* const bests = clients_of(gains, best);
      const T* const factors = clients_of(gains, weights);
      require_room(out, block.rows());
      ThreadTeam team(ThreadTeam::for_work(
                          threads_, static_cast<double>(block.rows()) * static_cast<double>(block.cols())),
                      signal_poll());
      gains.add(block, first, bests, factors, out.data, team);
    });
  }

  void keep(py::object numbers_array) {
    const ArrayArgument numbers(numbers_array, "numbers");
    const auto list = distinct(numbers);
    locked([&](auto& gains) {
      if (static_cast<int64_t>(list.size()) != gains.rows()) {
        throw std::invalid_argument("numbers: expected " + std::to_string(gains.rows()) + ", got " +
                                    std::to_string(list.size()));
      }
      gains.keep(list.data());
    });
  }

  bool has(Integer number) {
    const int64_t j = number.in("number", 0);
    return locked([&](auto& gains) { return gains.has(j); });
  }

  void evaluate(py::object numbers_array, py::object best_array, py::object weights_array,
                py::object sums_array) {
    const ArrayArgument numbers(numbers_array, "numbers"), best(best_array, "best"),
        weights(weights_array, "weights"), sums(sums_array, "sums");
    const auto list = distinct(numbers);
    const auto out = sums.output<int64_t, 1>();
    locked([&](auto& gains) {
      for (const int64_t j : list) require_list(gains, j);
      const auto* const bests = clients_of(gains, best);
      const auto* const factors = clients_of(gains, weights);
      const auto count = static_cast<int64_t>(list.size());
      require_room(out, count);
      ThreadTeam team(threads_, signal_poll());
      gains.evaluate(list.data(), count, bests, factors, out.data, team);
    });
  }

  void win(Integer number, Integer position_number, py::object best_array, py::object owner_array) {
    const int64_t j = number.in("number", 0), position = position_number.in("position", 0);
    const ArrayArgument best(best_array, "best"), owner(owner_array, "owner");
    const auto owners = owner.output<int64_t, 1>();
    locked([&](auto& gains) {
      using T = value_of<decltype(gains)>;
      require_list(gains, j);
      const auto bests = best.output<T, 1>();
      if (!bests.is_compact() || !owners.is_compact() || bests.shape[0] != gains.clients() ||
          owners.shape[0] != gains.clients()) {
        throw std::invalid_argument("best, owner: expected contiguous arrays of " +
                                    std::to_string(gains.clients()) + " clients");
      }
      gains.win(j, position, bests.data, owners.data);
    });
  }

  void forget(Integer number) {
    const int64_t j = number.in("number", 0);
    locked([&](auto& gains) { gains.forget(j); });
  }

 private:
  template <class Gains>
  using value_of = typename std::decay_t<Gains>::Value;

  template <class T>
  static const T* clients_of(const PartialGains<T>& gains, const ArrayArgument& array) {
    const auto view = array.input<T, 1>();
    if (!view.is_compact() || view.shape[0] != gains.clients()) {
      throw std::invalid_argument(std::string(array.name()) + ": expected a contiguous array of " +
                                  std::to_string(gains.clients()) + " clients");
    }
    return view.data;
  }

  static void require_room(const TensorView<int64_t, 1>& sums, int64_t count) {
    if (!sums.is_compact() || sums.shape[0] != count)
      throw std::invalid_argument("sums: expected a contiguous array of " + std::to_string(count));
  }

  template <class T>
  static void require_list(const PartialGains<T>& gains, int64_t number) {
    if (!gains.has(number))
      throw std::invalid_argument("number: expected a candidate that has a list, got " +
                                  std::to_string(number));
  }

  static std::vector<int64_t> distinct(const ArrayArgument& array) {
    const auto view = array.input<int64_t, 1>();
    std::vector<int64_t> list;
    for (int64_t i = 0; i < view.shape[0]; ++i) list.push_back(view(i));
    std::vector<int64_t> sorted = list;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
      throw py::value_error(std::string(array.name()) + ": expected numbers that are distinct");
    return list;
  }

  int threads_;
  std::variant<std::unique_ptr<PartialGains<float>>, std::unique_ptr<PartialGains<double>>> gains_;
  OneCall one_call_;
};

}  // namespace

void bind_partial_gains(py::module_& m) {
  py::class_<PyPartialGains>(m, "PartialGains", py::module_local(),
                             "Gains of candidates over some clients, and lists of the pairs that are live.")
      .def(py::init<Integer, const std::string&, Integer, Integer>(), py::arg("clients"), py::arg("dtype"),
           py::arg("entries"), py::arg("threads"))
      .def("begin", &PyPartialGains::begin, py::arg("rows"), py::arg("listing"),
           "Begins a batch of candidates; `listing` prepares their lists.")
      .def("add", &PyPartialGains::add, py::arg("s"), py::arg("first"), py::arg("best"), py::arg("weights"),
           py::arg("sums"),
           "Adds to sums [r] the gains over the clients from `first` on, of which s [r, c] has the "
           "similarities.")
      .def("keep", &PyPartialGains::keep, py::arg("numbers"),
           "Ends the batch, and keeps the lists of its candidates, by their numbers [r].")
      .def("has", &PyPartialGains::has, py::arg("number"), "Whether a candidate has a list.")
      .def("evaluate", &PyPartialGains::evaluate, py::arg("numbers"), py::arg("best"), py::arg("weights"),
           py::arg("sums"), "sums [r] = the gains of candidates that have lists.")
      .def("win", &PyPartialGains::win, py::arg("number"), py::arg("position"), py::arg("best"),
           py::arg("owner"), "Writes the better ones of a candidate's list to best and owner [clients].")
      .def("forget", &PyPartialGains::forget, py::arg("number"), "Drops a candidate's list, if it has one.");
}

}  // namespace fc
