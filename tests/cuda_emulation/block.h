// A block of CUDA threads on one processor: fibres, which meet at barriers and collectives.
//
// A thread runs until it has to wait for others. Which of those that can run comes next is the
// schedule's choice, the same one each time it asks: one thread is always ahead of all others, as
// far as barriers let it be. So where a barrier is missing, some schedule reads what was not yet
// written or writes over what was not yet read, and its result differs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fibre.h"

namespace emulation {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;

// Which thread goes first: the lowest, the highest, or any (by a permutation of `seed`). Blocks
// run one after another in the same manner.
struct Schedule {
  enum Order : int { forward, backward, shuffled } order = forward;
  uint64_t seed = 0;
};
Schedule& schedule();  // of the launches to come
size_t& most_shared_memory();  // of a block; at first as sm_80 has, less than sm_90

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// A copy between global and shared memory that a thread has asked for. Until it is waited for there
// are NaN where it goes: what lay there may be overwritten at once, and what comes may be late.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, filled;  // `bytes` from the source, then zeros up to `filled`
  int group;
};

// What lanes have brought to a collective: null where a lane is not in the mask.
using Combine = void (*)(void* const operands[kWarp], uint32_t mask);

class Block {
 public:
  explicit Block(int threads);

  // Runs `thread` once for every thread; throws std::runtime_error where the kernel broke a rule.
  void run(Index3 block, Index3 grid, size_t shared_bytes, const std::function<void()>& thread);

  // ---- what the running thread may call
  int thread() const { return running_; }
  int lane() const { return running_ % kWarp; }
  int threads() const { return count_; }
  Index3 block() const { return block_; }
  Index3 grid() const { return grid_; }
  void* shared() { return shared_.get(); }

  // All threads of the block meet; returns the sum of what they brought.
  int barrier(int value);
  // The lanes of `mask` meet at the collective called `what`; the last to come runs `combine`.
  void meet(const char* what, uint32_t mask, void* operand, Combine combine);

  void copy(Copy copy);
  void end_group();
  void wait_for_groups(int pending);

  // Ends the launch with a message.
  [[noreturn]] void fail(const std::string& what);

 private:
  enum class State { ready, at_barrier, at_collective, returned };
  struct Thread {
    Fibre fibre;
    State state = State::returned;
    int rank = 0;  // its place in the schedule
    // Where it waits:
    const char* what = nullptr;
    uint32_t mask = 0;
    void* operand = nullptr;
    Combine combine = nullptr;
    // Copies on their way, oldest first, and the number of groups ended.
    std::vector<Copy> copies;
    int groups = 0;
  };

  static void enter(void* self);
  void set_ready(int thread);
  int next() const;  // the ready thread that the schedule wants; -1 where there is none
  void wait();
  void release_barrier();
  std::string deadlock() const;
  std::string where(int thread) const;

  int count_, running_ = -1;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<int> thread_of_rank_;
  uint64_t ready_[kMostThreads / 64] = {};  // by rank
  int waiting_ = 0, returned_ = 0, sum_ = 0, released_sum_ = 0;
  Index3 block_, grid_;
  std::unique_ptr<char, void (*)(void*)> shared_{nullptr, nullptr};
  const std::function<void()>* function_ = nullptr;
  std::string failure_;
};

Block& present();  // whose thread is running

// All blocks of a grid, one after another. The kernel's address tells what was launched.
void run_grid(const char* name, const void* kernel, Index3 grid, unsigned threads, size_t shared_bytes,
              const std::function<void()>& thread);

}  // namespace emulation
