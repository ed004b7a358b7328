// Method. The images are cut into chunks of kChunk elements, each done by one thread.
//
// L-infinity needs one pass and rounds to the storage type after each operation, as a chain of
// PyTorch operators does, so that the results are the same bits. L2 needs two lengths of each
// image, of what the step follows, d, and of the perturbation after the step. One pass gives both:
//     ‖x + a·d - x0‖² = ‖x - x0‖² + 2a·⟨x - x0, d⟩ + a²·‖d‖²,
// summed chunk by chunk in double, in an order that neither the threads nor the other images
// change; a second one, from the cache where the image fits, writes the result. L1 is in
// projected_step_l1.cpp.
#include "projected_step.h"

#include <cmath>
#include <functional>
#include <limits>

#include "parallel.h"
#include "projected_step_pieces.h"

namespace pyvit {
namespace {

constexpr int64_t kChunk = 16384;

// A power of two that keeps a norm or a mean near the ends of the type's range away from them: both
// sides of a quotient are multiplied by it, which costs no precision.
template <class T>
double safe_scale(double value) {
  if (sizeof(T) == 4 && value > 1e30) return 0x1p-60;
  if (sizeof(T) == 4 && value < 1e-30) return 0x1p60;
  return 1;
}

// v / divisor. Zero divides to zero: an image without a gradient stays where it is.
template <class T>
struct Divisor {
  Vec<T> scale, divisor;

  explicit Divisor(double value) {
    const double s = safe_scale<T>(value);
    scale = broadcast(static_cast<T>(s));
    divisor = broadcast(value == 0 ? T(1) : static_cast<T>(value * s));
  }
  Vec<T> operator()(Vec<T> v) const { return v * scale / divisor; }
};

template <class T>
Vec<T> clamp(Vec<T> v, Vec<T> lo, Vec<T> hi) {  // lets NaN pass
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// ‖d‖², ‖x - x0‖² and ⟨x - x0, d⟩ of an image or of a part of it.
struct L2Sums {
  double direction, delta, product;

  void operator+=(const L2Sums& other) {
    direction += other.direction;
    delta += other.delta;
    product += other.product;
  }
  // ‖x - x0 + a·d‖
  double length_after(double a) const {
    const double square = delta + 2 * a * product + a * a * direction;
    return std::sqrt(square < 0 ? 0 : square);  // rounding may go below zero; NaN passes
  }
};

template <class T>
class L2Lanes {
 public:
  void add(Vec<T> d, Vec<T> delta) {
    direction_.add_product(d, d);
    delta_.add_product(delta, delta);
    product_.add_product(delta, d);
  }
  L2Sums total() const { return {direction_.total(), delta_.total(), product_.total()}; }

 private:
  Sum<T> direction_, delta_, product_;
};

template <class S>
class Step {
  using T = Compute<S>;
  using V = Vec<T>;
  using W = Wide<S>;

 public:
  explicit Step(const ProjectedStep& p)
      : p_(p),
        elements_(image_elements(p)),
        chunks_(ceil_div(elements_, kChunk)),
        lo_(rounded(p.lo)),
        hi_(rounded(p.hi)) {
    const size_t sums = static_cast<size_t>(p.batch * chunks_);
    if (p.has_momentum) gradient_sums_.resize(sums);
    if (p.norm == StepNorm::l2) l2_sums_.resize(sums);
  }

  void run() const {
    std::vector<Phase> phases;
    auto add = [&](void (Step::*phase)(int64_t, int64_t) const) {
      phases.push_back([=](int64_t image, int64_t chunk) { (this->*phase)(image, chunk); });
    };
    if (p_.has_momentum) add(&Step::sum_gradient);
    if (p_.norm == StepNorm::linf) {
      add(p_.has_momentum ? &Step::momentum_and_linf : &Step::linf);
    } else {
      if (p_.has_momentum) add(&Step::update_momentum);
      if (p_.norm == StepNorm::l2) {
        add(&Step::sum_squares);
        add(&Step::l2);
      }
    }
    run_phases(phases);
  }

 private:
  using Phase = std::function<void(int64_t image, int64_t chunk)>;

  void run_phases(const std::vector<Phase>& phases) const {
    auto whole_image = [&](int64_t image) {
      for (const Phase& phase : phases)
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) phase(image, chunk);
    };
    if (p_.batch * elements_ <= kChunk) {  // less work than waking a thread
      for (int64_t image = 0; image < p_.batch; ++image) whole_image(image);
    } else if (phases.size() > 1 && p_.batch >= 2 * thread_count()) {
      parallel_for(p_.batch, whole_image);  // later phases find the image in the cache
    } else {
      for (const Phase& phase : phases)
        parallel_for(p_.batch * chunks_, [&](int64_t task) { phase(task / chunks_, task % chunks_); });
    }
  }

  // ---- phases -----------------------------------------------------------------------------

  void sum_gradient(int64_t image, int64_t chunk) const {
    Sum<T> sum;
    pieces(image, chunk, [&](const Piece<S>& piece) {
      S buffer[kPiece];
      const S* g = piece.values(kGrad, buffer);
      Sum<T> in_registers = sum;
      for_each_vector(g, g, g, piece.count,
                      [&](int64_t, int, V v, V, V) { in_registers.add_abs(v); });
      sum = in_registers;
    });
    gradient_sums_[at(image, chunk)] = sum.total();
  }

  void update_momentum(int64_t image, int64_t chunk) const {
    const Divisor<T> by_mean(total(gradient_sums_, image) / static_cast<double>(elements_));
    const V decay = broadcast(static_cast<T>(p_.decay));
    pieces(image, chunk, [&](const Piece<S>& piece) {
      S buffer[3][kPiece];
      const S* g = piece.values(kGrad, buffer[0]);
      const S* before = piece.values(kMomentum, buffer[1]);
      S* after = piece.place(kMomentumOut, buffer[2]);
      map_vectors(after, g, before, before, piece.count,
                  [&](V grad, V v, V) { return by_mean(grad) + v * decay; });
      piece.put(kMomentumOut, after);
    });
  }

  void momentum_and_linf(int64_t image, int64_t chunk) const {
    update_momentum(image, chunk);
    linf(image, chunk);
  }

  // The order and the roundings are those of
  //   x = x + step_size * grad.sign();  x = clamp(x0 + clamp(x - x0, -eps, eps), lo, hi)
  void linf(int64_t image, int64_t chunk) const {
    const double eps = p_.eps_at(image);
    const bool ball = eps < std::numeric_limits<double>::infinity();
    const V alpha = broadcast(signed_step(image));
    const V up = W::round(alpha), down = -up, none{};
    const V outer = rounded(eps), inner = -outer;
    const bool raw = p_.raw;
    auto moved = [&](V x, V d) {
      const V step = raw ? W::round(alpha * d) : d > none ? up : d < none ? down : none;
      return W::round(x + step);
    };
    if (ball) {
      step_pieces(image, chunk, [&](V x, V d, V x0) {
        const V delta = clamp<T>(W::round(moved(x, d) - x0), inner, outer);
        return clamp<T>(W::round(x0 + delta), lo_, hi_);
      });
    } else {
      step_pieces(image, chunk, [&](V x, V d, V) { return clamp<T>(moved(x, d), lo_, hi_); });
    }
  }

  void sum_squares(int64_t image, int64_t chunk) const {
    L2Lanes<T> sums;
    pieces(image, chunk, [&](const Piece<S>& piece) {
      S buffer[3][kPiece];
      const S* x = piece.values(kX, buffer[0]);
      const S* d = piece.values(p_.direction(), buffer[1]);
      const S* x0 = piece.values(kX0, buffer[2]);
      L2Lanes<T> in_registers = sums;
      for_each_vector(x, d, x0, piece.count, [&](int64_t, int, V vx, V vd, V vx0) {
        in_registers.add(vd, vx - vx0);  // zeros in the lanes past the end
      });
      sums = in_registers;
    });
    l2_sums_[at(image, chunk)] = sums.total();
  }

  void l2(int64_t image, int64_t chunk) const {
    L2Sums sums{};
    for (int64_t c = 0; c < chunks_; ++c) sums += l2_sums_[at(image, c)];
    const double norm = p_.raw || sums.direction == 0 ? 1 : std::sqrt(sums.direction);
    const double step = signed_step(image), scaled = norm * safe_scale<T>(norm);
    const V scale = broadcast(static_cast<T>(safe_scale<T>(norm)));
    const V factor = broadcast(static_cast<T>(step / scaled));
    auto moved = [=](V x, V d) { return x + d * scale * factor; };

    const double eps = p_.eps_at(image), length = sums.length_after(step / norm);
    if (eps == std::numeric_limits<double>::infinity()) {
      step_pieces(image, chunk, [&](V x, V d, V) { return clamp<T>(moved(x, d), lo_, hi_); });
      return;
    }
    // A NaN length makes the whole image NaN, and a perturbation of zero needs no shrinking.
    const V shrink = broadcast(static_cast<T>(length <= eps ? 1.0 : eps / length));
    step_pieces(image, chunk, [&](V x, V d, V x0) {
      return clamp<T>(x0 + (moved(x, d) - x0) * shrink, lo_, hi_);
    });
  }

  // ---- what the phases are made of ----------------------------------------------------------

  template <class F>
  void pieces(int64_t image, int64_t chunk, const F& f) const {
    const int64_t begin = chunk * kChunk;
    for_each_piece<S>(p_, image, begin, std::min(begin + kChunk, elements_), f);
  }

  // out = f(x, direction, x0) for the pieces of a chunk.
  template <class F>
  void step_pieces(int64_t image, int64_t chunk, const F& f) const {
    const int direction = p_.direction();
    pieces(image, chunk, [&](const Piece<S>& piece) {
      S buffer[4][kPiece];
      S* out = piece.place(kOut, buffer[3]);
      map_vectors(out, piece.values(kX, buffer[0]), piece.values(direction, buffer[1]),
                  piece.values(kX0, buffer[2]), piece.count, f);
      piece.put(kOut, out);
    });
  }

  size_t at(int64_t image, int64_t chunk) const {
    return static_cast<size_t>(image * chunks_ + chunk);
  }
  double total(const std::vector<double>& sums, int64_t image) const {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += sums[at(image, chunk)];
    return sum;
  }
  T signed_step(int64_t image) const {
    const T step = static_cast<T>(p_.step_size_of(image));
    return p_.targeted ? -step : step;
  }
  // As a Python number enters an operator of PyTorch: rounded to the storage type.
  static V rounded(double value) { return W::round(broadcast(static_cast<T>(value))); }

  const ProjectedStep& p_;
  int64_t elements_, chunks_;
  V lo_, hi_;
  // One sum a chunk; each is written by the one task that has this chunk.
  mutable std::vector<double> gradient_sums_;
  mutable std::vector<L2Sums> l2_sums_;
};

}  // namespace

void projected_step(DType dtype, ProjectedStep step) {
  merge_dimensions(step);
  if (step.batch == 0 || image_elements(step) == 0) return;
  dispatch(dtype, [&](auto s) { Step<decltype(s)>(step).run(); });
  if (step.norm == StepNorm::l1) projected_step_l1(dtype, step);
}

}  // namespace pyvit
