// Method. The sparse step follows Tramèr & Boneh (2019): of the pixels that the bounds let move,
// those with the largest gradient, each by the same amount. The projection is the nearest point of
// the L1 ball that also lies within the bounds (Croce & Hein, 2021): soft thresholding by the λ at
// which
//     f(λ) = Σ_i min(max(|w_i| - λ, 0), room_i) = eps,
// with w the perturbation before the projection and room_i the distance to the bound that it
// points at. Both thresholds are found exactly, without sorting: the gradient's digit by digit, by
// counting how many of its bit patterns have each value of the next 11 bits; λ by Newton's method
// on the piecewise linear f inside a bracket, which ends when a step reproduces itself, that is on
// the right piece.
#include <cmath>
#include <limits>

#include "parallel.h"
#include "projected_step.h"
#include "projected_step_pieces.h"

namespace pyvit {
namespace {

// Non-negative floats are ordered as their bit patterns.
inline uint32_t bits_of(float x) { return float_bits(x); }
inline uint64_t bits_of(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  return u;
}
inline float value_of(uint32_t u) { return bits_float(u); }
inline double value_of(uint64_t u) {
  double x;
  std::memcpy(&x, &u, 8);
  return x;
}

template <class S>
class L1Image {
  using T = Compute<S>;
  using V = Vec<T>;
  using Bits = decltype(bits_of(T()));
  static constexpr int L = kLanes<T>;
  static constexpr int kBits = 8 * sizeof(T) - 1;  // of a number that is not negative

 public:
  L1Image(const ProjectedStep& p, int64_t image)
      : p_(p),
        image_(image),
        elements_(image_elements(p)),
        sign_(p.targeted ? T(-1) : T(1)),
        step_size_(static_cast<T>(p.step_size_of(image))),
        eps_(p.eps_at(image)),
        lo_(widen(narrow<S>(static_cast<T>(p.lo)))),
        hi_(widen(narrow<S>(static_cast<T>(p.hi)))) {}

  void run() {
    if (!p_.raw) choose_pixels();
    if (!is_finite_) return fill_with_nan();
    find_threshold();
    if (!is_finite_) return fill_with_nan();
    write();
  }

 private:
  // x, the direction and x0 of a piece, in the type that is computed in; filled up with zeros to
  // whole vectors, which neither move nor count.
  struct Block {
    T x[kPiece], direction[kPiece], x0[kPiece];
    T score[kPiece];  // |direction|, 0 where a bound forbids the move
    T delta[kPiece];  // x + step - x0
    int64_t count;
  };

  template <class F>
  void for_each_block(const F& f) const {
    const int direction = p_.direction();
    Block block;
    for_each_piece<S>(p_, image_, 0, elements_, [&](const Piece<S>& piece) {
      S buffer[kPiece];
      block.count = piece.count;
      const int64_t padded = round_up(piece.count, L);
      auto read = [&](T* to, int operand) {
        widen_run(to, piece.values(operand, buffer), piece.count);
        std::fill(to + piece.count, to + padded, T(0));
      };
      read(block.x, kX);
      read(block.direction, direction);
      read(block.x0, kX0);
      f(block, piece);
    });
  }

  template <class F>
  static void for_each_lane_group(const Block& block, const F& f) {
    for (int64_t i = 0; i < block.count; i += L) f(i);
  }

  void score(Block& block) const {
    const V sign = broadcast(sign_), lo = broadcast(lo_), hi = broadcast(hi_), none{};
    for_each_lane_group(block, [&](int64_t i) {
      const V x = load(block.x + i), d = load(block.direction + i) * sign;
      const V up = x >= hi ? none : d, down = x <= lo ? none : -d;
      store(block.score + i, d > none ? up : d < none ? down : none);
    });
  }

  // The wanted number of pixels with the largest scores; ties go to the first in memory.
  void choose_pixels() {
    constexpr int kDigit = 11;
    constexpr Bits kDigits = Bits(1) << kDigit;
    const double wanted = std::floor((1 - p_.quantile) * static_cast<double>(elements_) + 0.5);
    const int64_t k = std::max<int64_t>(1, static_cast<int64_t>(wanted));
    int64_t left = k, tied = 0;  // still to be found among the bit patterns that start as `known`
    Bits known = 0;
    bool finite = true;
    for (int shift = (kBits - 1) / kDigit * kDigit; shift >= 0; shift -= kDigit) {
      int64_t counts[kDigits] = {};
      const bool first = shift + kDigit >= kBits;
      for_each_block([&](Block& block, const Piece<S>&) {
        score(block);
        for (int64_t i = 0; i < block.count; ++i) {
          const Bits bits = bits_of(block.score[i]);
          if (first) finite &= std::abs(block.direction[i]) <= std::numeric_limits<T>::max();
          if (first || bits >> (shift + kDigit) == known) ++counts[(bits >> shift) % kDigits];
        }
      });
      Bits digit = kDigits - 1;
      while (counts[digit] < left) left -= counts[digit--];
      tied = counts[digit];
      known = known << kDigit | digit;
    }
    is_finite_ = finite;
    // `known` is now the k-th largest score, and `left` of the `tied` pixels that have it are kept.
    if (known == 0 || left == tied) {
      smallest_chosen_ = value_of(std::max<Bits>(known, 1));
    } else {
      smallest_chosen_ = value_of(known + 1);
      tied_score_ = value_of(known);
      ties_ = left;
    }
    const int64_t moving = known == 0 ? k - left : k;
    step_size_ /= static_cast<T>(std::max<int64_t>(moving, 1));
  }

  // block.delta; ties_left counts down over the blocks of one pass.
  void move(Block& block, int64_t& ties_left) const {
    const V step = broadcast(sign_ * step_size_), none{};
    auto set_delta = [&](int64_t i, V moved) {
      store(block.delta + i, load(block.x + i) + moved - load(block.x0 + i));
    };
    if (p_.raw) {
      for_each_lane_group(block,
                          [&](int64_t i) { set_delta(i, step * load(block.direction + i)); });
      return;
    }
    score(block);
    const V smallest = broadcast(smallest_chosen_);
    for_each_lane_group(block, [&](int64_t i) {
      const V along = load(block.direction + i) < none ? -step : step;
      set_delta(i, load(block.score + i) >= smallest ? along : none);
    });
    for (int64_t i = 0; i < block.count && ties_left > 0; ++i) {
      if (block.score[i] != tied_score_) continue;
      --ties_left;
      const T along = std::copysign(step_size_, sign_ * block.direction[i]);
      block.delta[i] = block.x[i] + along - block.x0[i];
    }
  }

  template <class F>
  void for_each_moved_block(const F& f) const {
    int64_t ties_left = ties_;
    for_each_block([&](Block& block, const Piece<S>& piece) {
      move(block, ties_left);
      f(block, piece);
    });
  }

  // f(λ) and the Newton step from there; NaN where no pixel is between its two kinks.
  struct Evaluation {
    double value, newton;
  };
  Evaluation evaluate(T at) const {
    const V lambda = broadcast(at), lo = broadcast(lo_), hi = broadcast(hi_), none{};
    const V one = broadcast(T(1));
    Sum<T> sliding, sliding_count, full;  // between the kinks of its term; and at its bound
    for_each_moved_block([&](const Block& block, const Piece<S>&) {
      for_each_lane_group(block, [&](int64_t i) {
        const V delta = load(block.delta + i), x0 = load(block.x0 + i);
        const V size = delta < none ? -delta : delta, above = size - lambda;
        const V room = delta > none ? hi - x0 : x0 - lo;
        const V moved = above > none ? one : none;
        const V slides = above < room ? moved : none;
        sliding.add_abs(slides * size);
        sliding_count.add_abs(slides);
        // A choice, not a product: room is infinite where there is no bound, and 0·∞ is NaN.
        full.add_abs(above < room ? none : (room > none ? room : none));
      });
    });
    const double n = sliding_count.total(), sum = sliding.total() + full.total();
    return {sum - n * at, (sum - eps_) / n};
  }

  void find_threshold() {
    T largest = 0;
    bool finite = true;
    for_each_moved_block([&](const Block& block, const Piece<S>&) {
      for (int64_t i = 0; i < block.count; ++i) {
        const T size = std::abs(block.delta[i]);
        finite &= size <= std::numeric_limits<T>::max();
        largest = size > largest ? size : largest;
      }
    });
    is_finite_ = finite;
    if (!is_finite_ || eps_ == std::numeric_limits<double>::infinity()) return;
    T low = 0, high = largest, lambda = 0;  // f(low) > eps >= f(high)
    for (int round = 0;; ++round) {
      const Evaluation f = evaluate(lambda);
      if (f.value <= eps_) {
        high = lambda;
        if (lambda == 0) break;  // inside the ball already
      } else {
        low = lambda;
      }
      T next = static_cast<T>(f.newton);
      if (next == lambda) break;
      if (!(low < next && next < high) || round % 8 == 7) next = low + (high - low) / 2;
      if (!(low < next && next < high)) {  // neighbouring numbers: stay inside the ball
        lambda = high;
        break;
      }
      lambda = next;
    }
    lambda_ = lambda;
  }

  void write() const {
    const V lambda = broadcast(lambda_), lo = broadcast(lo_), hi = broadcast(hi_), none{};
    for_each_moved_block([&](Block& block, const Piece<S>& piece) {
      for_each_lane_group(block, [&](int64_t i) {
        const V delta = load(block.delta + i);
        const V size = (delta < none ? -delta : delta) - lambda, kept = size > none ? size : none;
        V y = load(block.x0 + i) + (delta < none ? -kept : kept);
        y = y < lo ? lo : y;
        store(block.delta + i, y > hi ? hi : y);
      });
      S buffer[kPiece];
      S* out = piece.place(kOut, buffer);
      narrow_run<S>(out, block.delta, block.count);
      piece.put(kOut, out);
    });
  }

  void fill_with_nan() const {
    const S nan = narrow<S>(std::numeric_limits<T>::quiet_NaN());
    for_each_piece<S>(p_, image_, 0, elements_, [&](const Piece<S>& piece) {
      for (int64_t i = 0; i < piece.count; ++i) piece.at[kOut][i * piece.stride[kOut]] = nan;
    });
  }

  const ProjectedStep& p_;
  int64_t image_, elements_;
  T sign_, step_size_;
  double eps_;
  T lo_, hi_;
  bool is_finite_ = true;
  // A pixel moves where its score is at least smallest_chosen_, or is one of the first `ties_`
  // whose score is tied_score_.
  T smallest_chosen_ = std::numeric_limits<T>::infinity();
  T tied_score_ = 0;
  int64_t ties_ = 0;
  T lambda_ = 0;
};

}  // namespace

void projected_step_l1(DType dtype, const ProjectedStep& step) {
  dispatch(dtype, [&](auto s) {
    parallel_for(step.batch, [&](int64_t image) { L1Image<decltype(s)>(step, image).run(); });
  });
}

}  // namespace pyvit
