// Planes to pixels: elements of a few runs, by turns. One or two shuffles a vector.
#pragma once

#include <type_traits>
#include <utility>

#include "dtypes.h"
#include "simd.h"
#include "transpose.h"

namespace pyvit {

template <class T, int... Lane>
inline void interleave_vectors(T* dst, Vec<T> a, Vec<T> b, std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>;
  store(dst, shuffle_lanes<T, (Lane / 2 + Lane % 2 * L)...>(a, b));
  store(dst + L, shuffle_lanes<T, ((L + Lane) / 2 + Lane % 2 * L)...>(a, b));
}

template <class T, int... Lane>
inline void interleave_vectors(T* dst, Vec<T> a, Vec<T> b, Vec<T> c,
                               std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>;
  // Lane e of the whole takes plane e % 3, element e / 3; c joins a and b's in a second step.
  auto part = [&](auto first) {
    constexpr int f = decltype(first)::value;
    const Vec<T> ab = shuffle_lanes<T, ((f + Lane) / 3 + ((f + Lane) % 3 == 1 ? L : 0))...>(a, b);
    store(dst + f, shuffle_lanes<T, ((f + Lane) % 3 == 2 ? L + (f + Lane) / 3 : Lane)...>(ab, c));
  };
  part(std::integral_constant<int, 0>{});
  part(std::integral_constant<int, L>{});
  part(std::integral_constant<int, 2 * L>{});
}

template <class T, int... Lane>
inline void interleave_vectors(T* dst, Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d,
                               std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<T>;
  // Likewise: a and b have the first half of every pixel, c and d the second one.
  auto part = [&](auto first) {
    constexpr int f = decltype(first)::value;
    const Vec<T> ab = shuffle_lanes<T, ((f + Lane) / 4 + ((f + Lane) % 2 == 1 ? L : 0))...>(a, b);
    const Vec<T> cd = shuffle_lanes<T, ((f + Lane) / 4 + ((f + Lane) % 2 == 1 ? L : 0))...>(c, d);
    store(dst + f, shuffle_lanes<T, ((f + Lane) % 4 < 2 ? Lane : L + Lane)...>(ab, cd));
  };
  part(std::integral_constant<int, 0>{});
  part(std::integral_constant<int, L>{});
  part(std::integral_constant<int, 2 * L>{});
  part(std::integral_constant<int, 3 * L>{});
}

// dst[planes · i + p] = widen(src[p · plane + i]) for i < count: pixels of as many channels.
template <class T, class S>
void interleave(T* dst, const S* src, int64_t plane, int64_t planes, int64_t count) {
  constexpr int64_t L = kLanes<T>;
  constexpr auto lanes = std::make_integer_sequence<int, L>{};
  if (planes < 2 || planes > 4) return transpose(dst, planes, src, plane, 1, planes, count);
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    T of[4][L];
    for (int64_t p = 0; p < planes; ++p) widen_run(of[p], src + p * plane + i, L);
    if (planes == 2) {
      interleave_vectors<T>(dst + 2 * i, load(of[0]), load(of[1]), lanes);
    } else if (planes == 3) {
      interleave_vectors<T>(dst + 3 * i, load(of[0]), load(of[1]), load(of[2]), lanes);
    } else {
      interleave_vectors<T>(dst + 4 * i, load(of[0]), load(of[1]), load(of[2]), load(of[3]), lanes);
    }
  }
  for (; i < count; ++i)
    for (int64_t p = 0; p < planes; ++p) dst[planes * i + p] = widen(src[p * plane + i]);
}

}  // namespace pyvit
