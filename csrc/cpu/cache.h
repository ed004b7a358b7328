// The size of the caches that blocks are made for.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace pyvit {

// Bytes of the second-level cache; half a megabyte where the system does not tell.
inline int64_t second_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t told = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (told > 0) return std::max<int64_t>(told, 256 << 10);
#endif
  return 512 << 10;
}

}  // namespace pyvit
