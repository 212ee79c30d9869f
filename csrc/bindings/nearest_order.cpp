// Python's view of the nearest orders and their rounds.
#include "cpu/nearest_order.h"

#include <memory>
#include <string>
#include <utility>
#include <variant>

#include "bindings/bindings.h"
#include "bindings/boundary.h"
#include "bindings/run.h"

namespace fc {
namespace {

class PyNearestOrder {
  template <class Fn>
  auto locked(Fn&& fn) {
    return one_call_([&] { return std::visit([&](auto& order) { return fn(*order); }, order_); });
  }

 public:
  PyNearestOrder(py::object centroids_array, Integer threads_number) {
    const int threads = threads_number.threads();
    const ArrayArgument centroids(centroids_array, "centroids");
    dispatch_floating(centroids, [&](auto zero) {
      using T = decltype(zero);
      const auto view = centroids.input<T, 2>();
      if (view.rows() == 0 || view.cols() == 0) {
        throw py::value_error("centroids: expected at least 1 row and 1 column");
      }
      order_ = nearest_order_of_features<T>(view, threads, signal_poll());
    });
  }

  PyNearestOrder(Integer lists_number, const std::string& dtype, Integer threads_number) {
    const int64_t lists = lists_number.count("lists", 1);
    const int threads = threads_number.threads();
    if (dtype == "float32") {
      order_ = nearest_order_of_similarities<float>(lists, threads, signal_poll());
    } else if (dtype == "float64") {
      order_ = nearest_order_of_similarities<double>(lists, threads, signal_poll());
    } else {
      throw py::value_error("dtype: expected float32 or float64, got '" + dtype + "'");
    }
  }

  void begin(Integer length_number) {
    const int64_t length = length_number.in("length", 1);
    locked([&](auto& order) { order.begin(length); });
  }

  void update(py::object x_array) {
    const ArrayArgument x(x_array, "x");
    locked([&](auto& order) { order.update(rows_of(order, x, order.features())); });
  }

  void update_similarities(py::object s_array) {
    const ArrayArgument s(s_array, "s");
    locked([&](auto& order) { order.update_similarities(rows_of(order, s, order.lists())); });
  }

  int64_t finish() {
    return locked([](auto& order) { return order.finish(); });
  }

  int64_t rounds(Integer k_number, py::object items_array, py::object counts_array, py::object values_array,
                 py::object takers_array, py::object similarities_array) {
    const ArrayArgument items(items_array, "items"), counts(counts_array, "counts"),
        values(values_array, "values"), takers(takers_array, "takers"),
        similarities(similarities_array, "similarities");
    const int64_t k = k_number.in("k", 0);
    const auto i = items.output<int64_t, 1>(), c = counts.output<int64_t, 1>(),
               t = takers.output<int64_t, 1>();
    const auto v = values.output<double, 1>(), s = similarities.output<double, 1>();
    return locked([&](auto& order) {
      const int64_t count = c.shape[0];
      if (!i.is_compact() || !c.is_compact() || !v.is_compact() || !t.is_compact() || !s.is_compact()) {
        throw std::invalid_argument(
            "items, counts, values, takers, similarities: expected contiguous arrays");
      }
      if (v.shape[0] != count || i.shape[0] / order.lists() < count || t.shape[0] < i.shape[0] ||
          s.shape[0] < i.shape[0]) {
        throw std::invalid_argument("items, counts, values, takers, similarities: expected room for " +
                                    std::to_string(count) + " rounds of up to " +
                                    std::to_string(order.lists()) + " items");
      }
      return order.rounds(k, count, i.data, c.data, v.data, t.data, s.data);
    });
  }

  int64_t order(Integer list_number, py::object items_array, py::object similarities_array) {
    const ArrayArgument items(items_array, "items"), similarities(similarities_array, "similarities");
    const int64_t list = list_number.in("list", 0);
    const auto i = items.output<int64_t, 1>();
    return locked([&](auto& order) {
      using T = typename std::decay_t<decltype(order)>::Value;
      if (list >= order.lists()) {
        throw std::invalid_argument("list: expected an index in [0, " + std::to_string(order.lists()) +
                                    "), got " + std::to_string(list));
      }
      const auto s = similarities.output<T, 1>();
      if (!i.is_compact() || !s.is_compact() || i.shape[0] < order.kept(list) ||
          s.shape[0] < order.kept(list)) {
        throw std::invalid_argument("items, similarities: expected contiguous arrays with room for " +
                                    std::to_string(order.kept(list)) + " entries");
      }
      order.order(list, i.data, s.data);
      return order.kept(list);
    });
  }

  int64_t taken() {
    return locked([](auto& order) { return order.taken(); });
  }

 private:
  template <class T>
  static TensorView<const T, 2> rows_of(const NearestOrder<T>&, const ArrayArgument& array, int64_t columns) {
    const auto view = array.input<T, 2>();
    const std::string name = array.name();
    if (columns == 0) throw std::invalid_argument("built without centroids: call update_similarities()");
    if (view.cols() != columns) {
      throw std::invalid_argument(name + ": expected " + std::to_string(columns) + " columns, got " +
                                  std::to_string(view.cols()));
    }
    if (!view.has_contiguous_rows())
      throw std::invalid_argument(name +
                                  ": expected rows that are contiguous in memory; pass a contiguous copy");
    return view;
  }

  std::variant<std::unique_ptr<NearestOrder<float>>, std::unique_ptr<NearestOrder<double>>> order_;
  OneCall one_call_;
};

}  // namespace

void bind_nearest_order(py::module_& m) {
  py::class_<PyNearestOrder>(
      m, "NearestOrder", py::module_local(),
      "For each of K lists the most similar items of a stream, and SimCore's rounds over them.")
      .def(py::init<py::object, Integer>(), py::arg("centroids"), py::arg("threads"),
           "Lists of nearest items to centroids [K, d], whose rows have unit length; fed by update().")
      .def_static(
          "of_similarities",
          [](Integer lists, const std::string& dtype, Integer threads) {
            return std::make_unique<PyNearestOrder>(lists, dtype, threads);
          },
          py::arg("lists"), py::arg("dtype"), py::arg("threads"),
          "The same for given similarities; fed by update_similarities().")
      .def("begin", &PyNearestOrder::begin, py::arg("length"),
           "Starts a pass that keeps up to `length` items a list.")
      .def("update", &PyNearestOrder::update, py::arg("x"), "The next items: features [r, d].")
      .def("update_similarities", &PyNearestOrder::update_similarities, py::arg("s"),
           "The next items: similarities [r, K].")
      .def("finish", &PyNearestOrder::finish, "Ends the pass; returns the number of items in it.")
      .def("rounds", &PyNearestOrder::rounds, py::arg("k"), py::arg("items"), py::arg("counts"),
           py::arg("values"), py::arg("takers"), py::arg("similarities"),
           "Makes up to len(counts) rounds and returns how many: fewer when k items or all are taken, and "
           "when a list needs another "
           "pass. Fills `items` [>= len(counts) * K] one round after the other, `counts` with their numbers, "
           "`values` with the rounds' "
           "mean similarities, `takers` and `similarities` [as items] with the list that took each item and "
           "its "
           "similarity.")
      .def("order", &PyNearestOrder::order, py::arg("list"), py::arg("items"), py::arg("similarities"),
           "Writes what `list` keeps, most similar first; returns the number of entries.")
      .def_property_readonly("taken", &PyNearestOrder::taken, "Items taken so far.");
}

}  // namespace fc
