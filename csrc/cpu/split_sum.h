// A long sum cut into parts that threads add up privately: the weight gradients, whose sums run
// over the pixels of a whole batch and whose results may be too small to share among the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "gemm.h"

namespace pyvit {

// `elements` sums over K terms each. The number of parts depends on the sizes alone, so that the
// result does not depend on the number of threads; the partial sums take at most a megabyte, and
// no more than what the product's own scratch leaves of the limit of one thread.
template <class T>
class SplitSum {
 public:
  const int64_t parts;

  SplitSum(int64_t K, int64_t elements)
      : SplitSum(K, elements, Panel<T>::KC,
                 count_parts(K, elements, Panel<T>::KC,
                             Panel<T>::scratch_bytes(Panel<T>::MB, Panel<T>::NB))) {}

  // K counts bands of terms that stay together, and a product needs so much scratch. The number of
  // parts is a power of two, at most `most`, since so is most often the number of threads.
  static SplitSum of_bands(int64_t K, int64_t elements, int64_t scratch_bytes,
                           int64_t most = 16) {
    int64_t parts = std::min(most, count_parts(K, elements, 1, scratch_bytes));
    while ((parts & (parts - 1)) != 0) parts &= parts - 1;
    return SplitSum(K, elements, 1, parts);
  }

  int64_t begin(int64_t part) const {
    return std::min(K_, ceil_div(K_, unit_) * part / parts * unit_);
  }
  int64_t end(int64_t part) const { return begin(part + 1); }
  T* partial(int64_t part) const { return partial_.get() + part * elements_; }

  // The finished element, its parts added in order.
  T sum(int64_t element) const {
    T total = T(0);
    for (int64_t part = 0; part < parts; ++part) total += partial(part)[element];
    return total;
  }
  // f(at, sums, count) for pieces of the finished elements [first, first + count).
  template <class F>
  void sum_run(int64_t first, int64_t count, const F& f) const {
    constexpr int64_t most = 256;
    T total[most];
    for (int64_t at = 0; at < count; at += most) {
      const int64_t length = std::min(most, count - at);
      std::copy_n(partial(0) + first + at, length, total);
      for (int64_t part = 1; part < parts; ++part)
        add_run(total, partial(part) + first + at, length);
      f(at, total, length);
    }
  }

 private:
  SplitSum(int64_t K, int64_t elements, int64_t unit, int64_t parts_)
      : parts(parts_),
        K_(K),
        unit_(unit),
        elements_(elements),
        partial_(parts > 1 ? new T[parts * elements] : nullptr) {}

  static int64_t count_parts(int64_t K, int64_t elements, int64_t unit, int64_t scratch_bytes) {
    const int64_t bytes = std::max<int64_t>(1, elements * static_cast<int64_t>(sizeof(T)));
    const int64_t room = std::min<int64_t>(1 << 20, kScratchLimit - scratch_bytes) / bytes;
    const int64_t useful = ceil_div(K, 4 * unit);
    return std::max<int64_t>(1, std::min<int64_t>({16, room, useful}));
  }

  int64_t K_, unit_, elements_;
  std::unique_ptr<T[]> partial_;
};

}  // namespace pyvit
