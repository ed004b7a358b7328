// The loop that the kernels run in: torch's own thread pool.
#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace pyvit {

void run_parallel(int64_t n, RangeFunction function, void* context) {
  torch::stable::parallel_for(
      0, n, 1, [&](int64_t begin, int64_t end) { function(begin, end, context); });
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

}  // namespace pyvit
