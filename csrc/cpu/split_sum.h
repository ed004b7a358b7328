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
      : parts(count_parts(K, elements)),
        K_(K),
        length_(round_up(ceil_div(K, parts), Panel<T>::KC)),
        elements_(elements),
        partial_(parts > 1 ? new T[parts * elements] : nullptr) {}

  int64_t begin(int64_t part) const { return std::min(K_, part * length_); }
  int64_t end(int64_t part) const { return std::min(K_, (part + 1) * length_); }
  T* partial(int64_t part) const { return partial_.get() + part * elements_; }

  // The finished element, its parts added in order.
  T sum(int64_t element) const {
    T total = T(0);
    for (int64_t part = 0; part < parts; ++part) total += partial(part)[element];
    return total;
  }

 private:
  static int64_t count_parts(int64_t K, int64_t elements) {
    const int64_t bytes = std::max<int64_t>(1, elements * static_cast<int64_t>(sizeof(T)));
    const int64_t left = kScratchLimit - Panel<T>::scratch_bytes(Panel<T>::MB, Panel<T>::NB);
    const int64_t room = std::min<int64_t>(1 << 20, left) / bytes;
    const int64_t useful = ceil_div(K, 4 * Panel<T>::KC);
    return std::max<int64_t>(1, std::min<int64_t>({16, room, useful}));
  }

  int64_t K_, length_, elements_;
  std::unique_ptr<T[]> partial_;
};

}  // namespace pyvit
