// The nearest-order kernel against sorting everything: each list's order, and the rounds over them, whatever
// the threads, the cut of the stream into updates and the length that is kept.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "check.h"
#include "cpu/nearest_order.h"
#include "samples.h"

namespace {

using samples::Matrix;

template <class T>
Matrix<T> unit_rows(Matrix<T> x) {
  for (int64_t i = 0; i < x.rows(); ++i) {
    double sum = 0;
    for (int64_t k = 0; k < x.cols(); ++k) sum += static_cast<double>(x(i, k)) * x(i, k);
    for (int64_t k = 0; k < x.cols(); ++k)
      x(i, k) = sum == 0 ? T(0) : static_cast<T>(x(i, k) / std::sqrt(sum));
  }
  return x;
}

// Items of one column of s [n, K], most similar first, ties to the lower item.
template <class T>
std::vector<int64_t> sorted_items(const Matrix<T>& s, int64_t list) {
  std::vector<int64_t> items(s.rows());
  std::iota(items.begin(), items.end(), int64_t{0});
  std::stable_sort(items.begin(), items.end(), [&](int64_t a, int64_t b) { return s(a, list) > s(b, list); });
  return items;
}

// The rounds as defined: in a round every list takes its best item that no earlier round took.
template <class T>
std::vector<std::vector<int64_t>> expected_rounds(const Matrix<T>& s) {
  std::vector<bool> taken(s.rows(), false);
  std::vector<std::vector<int64_t>> rounds;
  std::vector<std::vector<int64_t>> orders;
  for (int64_t c = 0; c < s.cols(); ++c) orders.push_back(sorted_items(s, c));
  for (int64_t total = 0; total < s.rows();) {
    std::vector<int64_t> round;
    for (const auto& order : orders) {
      const auto best = std::find_if(order.begin(), order.end(), [&](int64_t i) { return !taken[i]; });
      if (best != order.end() && std::find(round.begin(), round.end(), *best) == round.end())
        round.push_back(*best);
    }
    for (const int64_t i : round) taken[i] = true;
    total += static_cast<int64_t>(round.size());
    rounds.push_back(round);
  }
  return rounds;
}

template <class T, class Feed>
void check_run(fc::NearestOrder<T>& order, const Matrix<T>& s, int64_t length, Feed feed) {
  const int64_t n = s.rows(), lists = s.cols();
  const auto pass = [&] {
    order.begin(length);
    feed();
    CHECK_EQUAL(order.finish(), n);
  };
  pass();
  for (int64_t c = 0; c < lists; ++c) {
    std::vector<int64_t> items(order.kept(c));
    std::vector<T> similarities(order.kept(c));
    order.order(c, items.data(), similarities.data());
    const auto want = sorted_items(s, c);
    CHECK(static_cast<int64_t>(items.size()) >= std::min(n, length));
    CHECK(items.size() <= want.size() && std::equal(items.begin(), items.end(), want.begin()));
    bool same = true;
    for (size_t i = 0; i < items.size(); ++i) same = same && similarities[i] == s(items[i], c);
    CHECK(same);
  }
  const auto want = expected_rounds(s);
  size_t round = 0;
  for (int passes = 1; order.taken() < n && passes <= n;) {
    std::vector<int64_t> items(lists), counts(1);
    std::vector<int64_t> takers(lists);
    std::vector<double> values(1), similarities(lists);
    if (order.rounds(n, 1, items.data(), counts.data(), values.data(), takers.data(), similarities.data()) ==
        0) {
      pass();
      ++passes;
      continue;
    }
    items.resize(counts[0]);
    for (int64_t i = 0; i < counts[0]; ++i) {
      CHECK(takers[i] >= (i ? takers[i - 1] + 1 : 0) && takers[i] < lists);
      CHECK(similarities[i] == s(items[i], takers[i]));
    }
    CHECK(round < want.size() && items == want[round]);
    ++round;
  }
  CHECK_EQUAL(round, want.size());
}

template <class T>
void test_similarities() {
  for (const int64_t n : {1, 7, 97, 1025}) {
    for (const int64_t lists : {1, 7, 33}) {
      for (const bool ties : {false, true}) {
        auto s = samples::normal<T>(n, lists, n + lists);
        if (ties)
          for (T& value : s.values()) value = std::round(2 * value);
        for (const int64_t length : {std::min<int64_t>(n, 40), n}) {
          for (const int threads : {1, 2}) {
            const auto order = fc::nearest_order_of_similarities<T>(lists, threads, nullptr);
            const int64_t piece = threads == 1 ? n : n / 3 + 1;
            check_run(*order, s, length, [&] {
              for (int64_t begin = 0; begin < n; begin += piece)
                order->update_similarities(
                    {s.view().row(begin), {std::min(piece, n - begin), lists}, {lists, 1}});
            });
          }
        }
      }
    }
  }
}

// Features: the kernel's own similarities, read back by keeping everything, are cosines; orders then follow
// from them.
template <class T>
void test_features() {
  for (const int64_t n : {1, 97, 700}) {
    const int64_t lists = 13, d = 19;
    const auto x = samples::clustered<T>(n, d, 1);
    const auto centroids = unit_rows(samples::normal<T>(lists, d, 2));
    const auto unit = unit_rows(x);
    Matrix<T> s(n, lists);
    const auto all = fc::nearest_order_of_features<T>(centroids.view(), 1, nullptr);
    CHECK_EQUAL(all->features(), d);
    all->begin(n);
    all->update(x.view());
    all->finish();
    for (int64_t c = 0; c < lists; ++c) {
      std::vector<int64_t> items(n);
      std::vector<T> similarities(n);
      CHECK_EQUAL(all->kept(c), n);
      all->order(c, items.data(), similarities.data());
      for (int64_t i = 0; i < n; ++i) s(items[i], c) = similarities[i];
    }
    double worst = 0;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < lists; ++c) {
        double cosine = 0;
        for (int64_t k = 0; k < d; ++k) cosine += static_cast<double>(unit(i, k)) * centroids(c, k);
        worst = std::max(worst, std::fabs(cosine - static_cast<double>(s(i, c))));
      }
    }
    CHECK(worst <= (d + 4) * static_cast<double>(std::numeric_limits<T>::epsilon()));
    for (const int64_t length : {std::min<int64_t>(n, 50), n}) {
      const auto order = fc::nearest_order_of_features<T>(centroids.view(), 2, nullptr);
      check_run(*order, s, length, [&] {
        for (int64_t begin = 0; begin < n; begin += 61)
          order->update({x.view().row(begin), {std::min<int64_t>(61, n - begin), d}, {d, 1}});
      });
    }
  }
}

template <class T>
void test_misuse() {
  const auto s = samples::normal<T>(20, 3, 1);
  const auto order = fc::nearest_order_of_similarities<T>(3, 1, nullptr);
  CHECK_THROWS(order->update_similarities(s.view()), std::invalid_argument);
  CHECK_THROWS(order->finish(), std::invalid_argument);
  std::vector<int64_t> items(3), counts(1);
  std::vector<double> values(1);
  CHECK_THROWS(order->rounds(5, 1, items.data(), counts.data(), values.data()), std::invalid_argument);
  for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                      -std::numeric_limits<T>::infinity()}) {
    auto wrong = s;
    wrong(11, 2) = bad;
    order->begin(5);
    CHECK_THROWS(order->update_similarities(wrong.view()), std::invalid_argument);
    CHECK_THROWS(order->finish(), std::invalid_argument);
    const auto features =
        fc::nearest_order_of_features<T>(unit_rows(samples::normal<T>(4, 3, 2)).view(), 2, nullptr);
    features->begin(5);
    CHECK_THROWS(features->update(wrong.view()), std::invalid_argument);
  }
  order->begin(2);
  order->update_similarities(s.view());
  CHECK_EQUAL(order->finish(), 20);
  order->begin(2);
  CHECK_THROWS(order->finish(), std::invalid_argument);  // fewer items than the first pass had
}

template <class T>
void test_all() {
  test_similarities<T>();
  test_features<T>();
  test_misuse<T>();
}

}  // namespace

TEST_PROGRAM {
  test_all<float>();
  test_all<double>();
  return check::verdict("nearest_order");
}
