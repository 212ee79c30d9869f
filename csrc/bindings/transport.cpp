// Python's view of exact transport.
#include "cpu/transport.h"

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/run.h"

namespace fc {
namespace {

class PyTransport {
  // Runs fn(solved) without the GIL. A call that was stopped leaves flows behind that belong together no
  // more.
  template <class Fn>
  auto locked(Fn&& fn) {
    return one_call_([&] {
      if (interrupted_) throw std::runtime_error("this transport was interrupted; make another");
      return std::visit([&](auto& solved) { return fn(*solved); }, solved_);
    });
  }

  template <class Fn>
  auto changing(Fn&& fn) {
    return locked([&](auto& solved) {
      try {
        return fn(solved);
      } catch (const std::invalid_argument&) {
        throw;
      } catch (const py::builtin_exception&) {
        throw;
      } catch (...) {
        interrupted_ = true;
        throw;
      }
    });
  }

 public:
  PyTransport(py::object costs_array, py::object u_array, Integer threads_number) {
    const int threads = threads_number.threads();
    const ArrayArgument costs(costs_array, "costs");
    std::optional<ArrayArgument> u;
    if (!u_array.is_none()) u.emplace(u_array, "u");
    dispatch_floating(costs, [&](auto zero) {
      using T = decltype(zero);
      const auto view = rows_of<T>(costs);
      if (view.rows() == 0 || view.cols() == 0)
        throw py::value_error("costs: expected at least 1 row and 1 column");
      std::vector<double> duals;
      if (u) {
        const auto given = u->input<double, 1>();
        u->require_shape({view.rows()});
        for (int64_t s = 0; s < view.rows(); ++s) duals.push_back(given(s));
      }
      solved_ =
          without_gil([&] { return transport<T>(view, u ? duals.data() : nullptr, threads, signal_poll()); });
    });
  }

  double exchange(Integer place_number, py::object row_array, Real ceiling_number) {
    const int64_t place = place_number.in("place", 0);
    const double ceiling = ceiling_number.number("ceiling");
    const ArrayArgument row(row_array, "row");
    return changing([&](auto& solved) {
      using T = typename std::decay_t<decltype(solved)>::Value;
      const auto view = row.input<T, 1>();
      row.require_shape({solved.sinks()});
      return solved.exchange(place, view, ceiling);
    });
  }

  py::tuple best_exchange(py::object costs_array, py::object rows_array, py::object places_array,
                          py::object bounds_array, Real ceiling_number, Real enough_number,
                          Integer most_number) {
    const double ceiling = ceiling_number.number("ceiling"), enough = enough_number.number("enough");
    const int64_t most = most_number.in("most", 0);
    const ArrayArgument costs(costs_array, "costs"), rows(rows_array, "rows"), places(places_array, "places"),
        bounds(bounds_array, "bounds");
    const auto r = rows.input<int64_t, 1>(), p = places.input<int64_t, 1>();
    const auto b = bounds.input<double, 1>();
    places.require_shape({r.size()});
    bounds.require_shape({r.size()});
    const BestExchange best = changing([&](auto& solved) {
      const auto view = items_of(solved, costs);
      std::vector<ExchangeBound> candidates(r.size());
      for (int64_t i = 0; i < r.size(); ++i) candidates[i] = {r(i), p(i), b(i)};
      return solved.best_exchange(view, candidates, ceiling, enough, most);
    });
    return py::make_tuple(best.index, best.value, best.tried);
  }

  int64_t bounds(py::object costs_array, Real goal_number, Flag ways_flag, py::object lowest_array,
                 py::object rows_array, py::object places_array, py::object bounds_array) {
    const double goal = goal_number.number("goal");
    const bool by_ways = ways_flag.on("ways");
    const ArrayArgument costs(costs_array, "costs"), lowest(lowest_array, "lowest"), rows(rows_array, "rows"),
        places(places_array, "places"), bounds(bounds_array, "bounds");
    const auto low = lowest.output<double, 1>(), b = bounds.output<double, 1>();
    const auto r = rows.output<int64_t, 1>(), p = places.output<int64_t, 1>();
    places.require_shape({r.size()});
    bounds.require_shape({r.size()});
    return changing([&](auto& solved) {
      const auto view = items_of(solved, costs);
      lowest.require_shape({view.rows()});
      std::vector<double> values(view.rows());
      const std::vector<ExchangeBound> found = solved.bounds(view, goal, r.size(), by_ways, values.data());
      for (int64_t i = 0; i < view.rows(); ++i) low(i) = values[i];
      for (size_t i = 0; i < found.size(); ++i) {
        r(i) = found[i].row;
        p(i) = found[i].place;
        b(i) = found[i].bound;
      }
      return static_cast<int64_t>(found.size());
    });
  }

  void duals(py::object u_array, py::object f_array) {
    const ArrayArgument u(u_array, "u"), f(f_array, "f");
    const auto sources = u.output<double, 1>(), sinks = f.output<double, 1>();
    locked([&](auto& solved) {
      u.require_shape({solved.sources()});
      f.require_shape({solved.sinks()});
      for (int64_t s = 0; s < solved.sources(); ++s) sources(s) = solved.source_duals()[s];
      const std::vector<double>& found = solved.sink_duals();
      for (int64_t v = 0; v < solved.sinks(); ++v) sinks(v) = found[v];
    });
  }

  void flows(py::object sources_array, py::object sinks_array, py::object units_array) {
    const ArrayArgument sources(sources_array, "sources"), sinks(sinks_array, "sinks"),
        units(units_array, "units");
    const auto s = sources.output<int64_t, 1>(), v = sinks.output<int64_t, 1>(),
               x = units.output<int64_t, 1>();
    locked([&](auto& solved) {
      const int64_t count = solved.flow_count();
      sources.require_shape({count});
      sinks.require_shape({count});
      units.require_shape({count});
      std::vector<int64_t> found(3 * count);
      solved.flows(found.data(), found.data() + count, found.data() + 2 * count);
      for (int64_t i = 0; i < count; ++i) {
        s(i) = found[i];
        v(i) = found[count + i];
        x(i) = found[2 * count + i];
      }
    });
  }

  double value() {
    return locked([](auto& solved) { return solved.value(); });
  }
  double gap() {
    return locked([](auto& solved) { return solved.gap(); });
  }
  double slackness() {
    return locked([](auto& solved) { return solved.slackness(); });
  }
  int64_t flow_count() {
    return locked([](auto& solved) { return solved.flow_count(); });
  }

 private:
  template <class T>
  static TensorView<const T, 2> rows_of(const ArrayArgument& array) {
    const auto view = array.input<T, 2>();
    if (!view.has_contiguous_rows())
      throw std::invalid_argument(std::string(array.name()) +
                                  ": expected rows that are contiguous in memory; pass a contiguous copy");
    return view;
  }

  template <class T>
  static TensorView<const T, 2> items_of(const Transport<T>& solved, const ArrayArgument& array) {
    const auto view = rows_of<T>(array);
    array.require_shape({view.rows(), solved.sinks()});
    return view;
  }

  std::variant<std::unique_ptr<Transport<float>>, std::unique_ptr<Transport<double>>> solved_;
  OneCall one_call_;
  bool interrupted_ = false;
};

}  // namespace

void bind_transport(py::module_& m) {
  py::class_<PyTransport>(m, "Transport", py::module_local(),
                          "Exact optimal transport between equal sources and equal sinks, kept optimal while "
                          "sources are exchanged.")
      .def(py::init<py::object, py::object, Integer>(), py::arg("costs"), py::arg("u"), py::arg("threads"),
           "The optimum of costs [k, V]; u [k], dual variables to begin with, or None.")
      .def("exchange", &PyTransport::exchange, py::arg("place"), py::arg("row"), py::arg("ceiling"),
           "Gives source `place` the costs `row` [V] if the transport cost is below `ceiling` then, and "
           "returns "
           "it; else infinity.")
      .def("best_exchange", &PyTransport::best_exchange, py::arg("costs"), py::arg("rows"), py::arg("places"),
           py::arg("bounds"), py::arg("ceiling"), py::arg("enough"), py::arg("most"),
           "Tries up to `most` exchanges of `places` for `rows` of costs [r, V], sorted by `bounds`, until "
           "one "
           "leads to `enough` or less, without making them: (index of the lowest or -1, its transport cost "
           "or the ceiling, how many were tried).")
      .def("bounds", &PyTransport::bounds, py::arg("costs"), py::arg("goal"), py::arg("ways"),
           py::arg("lowest"), py::arg("rows"), py::arg("places"), py::arg("bounds"),
           "Fills `lowest` [r] with lower bounds of the transport cost after any exchange for the rows of "
           "costs "
           "[r, V], and rows, places, bounds with the exchanges of the lowest bounds below `goal`; returns "
           "their number. ways: tighter bounds, which know the ways of units.")
      .def("duals", &PyTransport::duals, py::arg("u"), py::arg("f"), "Writes the dual variables [k] and [V].")
      .def("flows", &PyTransport::flows, py::arg("sources"), py::arg("sinks"), py::arg("units"),
           "Writes the pairs between which mass flows, and the whole units [flow_count].")
      .def_property_readonly("flow_count", &PyTransport::flow_count)
      .def_property_readonly("value", &PyTransport::value, "The transport cost.")
      .def_property_readonly("gap", &PyTransport::gap, "Its distance to the dual value.")
      .def_property_readonly("slackness", &PyTransport::slackness,
                             "The largest reduced cost of a pair between which mass flows.");
}

}  // namespace fc
