// Threads and scratch memory. The kernels know neither torch nor OpenMP: csrc/bindings supplies
// the loop, which runs in torch's own thread pool.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace pyvit {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Defined in csrc/bindings/torch_library.cpp.
void run_parallel(int64_t n, RangeFunction function, void* context);
int64_t thread_count();

// f(begin, end) for contiguous ranges that cover [0, n), one a thread. Each i must write what no
// other i writes; then the result does not depend on the number of threads.
template <class F>
void parallel_ranges(int64_t n, const F& f) {
  auto range = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const F*>(context))(begin, end);
  };
  if (n == 1) {
    f(0, 1);
  } else if (n > 1) {
    run_parallel(n, range, const_cast<F*>(&f));
  }
}

// f(i) for each i in [0, n).
template <class F>
void parallel_for(int64_t n, const F& f) {
  parallel_ranges(n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Scratch of the present thread, kept between calls so that small ops do not pay for page faults.
// A kernel's whole need is taken in one piece, at most kScratchLimit bytes for any input size.
inline constexpr int64_t kScratchLimit = 2 << 20;

class Scratch {
 public:
  // Takes the thread's buffer; valid until the next Scratch of this thread.
  explicit Scratch(int64_t bytes) : next_(buffer(bytes)) {}

  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes_for<T>(count);
    return p;
  }
  template <class T>
  static constexpr int64_t bytes_for(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  static char* buffer(int64_t bytes) {
    struct Owner {
      char* data = nullptr;
      int64_t size = 0;
      ~Owner() { std::free(data); }
    };
    thread_local Owner owner;
    if (owner.size < bytes) {
      std::free(owner.data);
      owner.size = 0;
      const int64_t rounded = (bytes + 4095) / 4096 * 4096;
      owner.data = static_cast<char*>(std::aligned_alloc(64, rounded));
      if (owner.data == nullptr) throw std::bad_alloc();
      owner.size = rounded;
    }
    return owner.data;
  }
  char* next_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace pyvit
