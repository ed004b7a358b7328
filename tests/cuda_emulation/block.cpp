#include "block.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>

namespace emulation {
namespace {

Block* running_block = nullptr;

std::string hex(uint32_t mask) {
  char text[11];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// The order that a schedule puts n things in.
std::vector<int64_t> ordered(int64_t n, uint64_t salt) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  const Schedule& chosen = schedule();
  if (chosen.order == Schedule::backward) std::reverse(order.begin(), order.end());
  if (chosen.order == Schedule::shuffled) {
    std::mt19937_64 random(chosen.seed * 0x9e3779b97f4a7c15u + salt);
    std::shuffle(order.begin(), order.end(), random);
  }
  return order;
}

// The largest block of each kernel so far.
struct Launched {
  unsigned threads = 0;
  size_t shared_bytes = 0;
};
std::map<const void*, Launched>& launched() {
  static std::map<const void*, Launched> kernels;
  return kernels;
}

void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.filled - copy.bytes);
}

}  // namespace

Schedule& schedule() {
  static Schedule chosen;
  return chosen;
}

size_t& most_shared_memory() {
  static size_t bytes = 163 * 1024;
  return bytes;
}

Block& present() { return *running_block; }

Block::Block(int threads) : count_(threads) {
  for (int t = 0; t < threads; ++t) threads_.push_back(std::make_unique<Thread>());
  thread_of_rank_.resize(threads);
}

void Block::enter(void* self) {
  auto* block = static_cast<Block*>(self);
  (*block->function_)();
  Thread& thread = *block->threads_[block->running_];
  thread.copies.clear();  // a kernel's end waits for them, but nobody is there to see
  thread.state = State::returned;
  ++block->returned_;
  if (block->waiting_ > 0) {
    block->fail("the thread has returned, and others wait for it at a barrier");
  }
}

void Block::set_ready(int thread) {
  threads_[thread]->state = State::ready;
  const int rank = threads_[thread]->rank;
  ready_[rank / 64] |= uint64_t{1} << (rank % 64);
}

int Block::next() const {
  for (int word = 0; word * 64 < count_; ++word) {
    if (ready_[word]) return thread_of_rank_[word * 64 + __builtin_ctzll(ready_[word])];
  }
  return -1;
}

void Block::run(Index3 block, Index3 grid, size_t shared_bytes,
                const std::function<void()>& thread) {
  block_ = block;
  grid_ = grid;
  function_ = &thread;
  failure_.clear();
  waiting_ = returned_ = sum_ = 0;
  // Exactly what was asked for, so that AddressSanitizer sees an access beyond; and NaN in it.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
  shared_ = {static_cast<char*>(memory), std::free};
  std::memset(memory, 0xff, shared_bytes);

  const std::vector<int64_t> order = ordered(count_, 1 + block.x);
  for (int rank = 0; rank < count_; ++rank) {
    const int t = static_cast<int>(order[rank]);
    thread_of_rank_[rank] = t;
    threads_[t]->rank = rank;
    threads_[t]->copies.clear();
    threads_[t]->groups = 0;
    threads_[t]->fibre.start(enter, this);
    set_ready(t);
  }

  Block* before = running_block;
  running_block = this;
  while ((running_ = next()) >= 0) {
    const int rank = threads_[running_]->rank;
    ready_[rank / 64] &= ~(uint64_t{1} << (rank % 64));
    threads_[running_]->fibre.resume();
    if (!failure_.empty()) break;
  }
  if (failure_.empty() && returned_ < count_) failure_ = deadlock();
  std::fill(std::begin(ready_), std::end(ready_), 0);
  running_block = before;
  shared_.reset();
  if (!failure_.empty()) throw std::runtime_error(failure_);
}

void Block::wait() { threads_[running_]->fibre.suspend(); }

std::string Block::where(int thread) const {
  return "block " + std::to_string(block_.x) + ", thread " + std::to_string(thread);
}

void Block::fail(const std::string& what) {
  failure_ = where(running_) + ": " + what;
  wait();
  std::abort();  // nobody resumes a thread of a block that has failed
}

std::string Block::deadlock() const {
  for (int t = 0; t < count_; ++t) {
    const Thread& thread = *threads_[t];
    if (thread.state != State::at_collective) continue;
    const int first = t / kWarp * kWarp;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(thread.mask >> lane & 1)) continue;
      const std::string waits = where(t) + ": waits at " + thread.what + " with mask " +
                                hex(thread.mask) + " for lane " + std::to_string(lane);
      if (first + lane >= count_) return waits + ", which the block does not have";
      const Thread& other = *threads_[first + lane];
      if (other.state == State::returned) return waits + ", which has returned";
      if (other.state == State::at_barrier) return waits + ", which waits at __syncthreads";
      if (other.mask != thread.mask || std::strcmp(other.what, thread.what) != 0) {
        return waits + ", which waits at " + other.what + " with mask " + hex(other.mask);
      }
    }
  }
  for (int t = 0; t < count_; ++t) {
    if (threads_[t]->state == State::at_barrier) {
      return where(t) + ": waits at __syncthreads for threads that do not come";
    }
  }
  return "a deadlock of nobody";
}

int Block::barrier(int value) {
  if (returned_ > 0) fail("waits at a barrier for threads that have returned");
  sum_ += value;
  threads_[running_]->state = State::at_barrier;
  if (++waiting_ == count_) {
    release_barrier();
  }
  wait();
  return released_sum_;
}

void Block::release_barrier() {
  waiting_ = 0;
  released_sum_ = sum_;
  sum_ = 0;
  for (int t = 0; t < count_; ++t) set_ready(t);
}

void Block::meet(const char* what, uint32_t mask, void* operand, Combine combine) {
  if (!(mask >> lane() & 1)) {
    fail(std::string(what) + " with mask " + hex(mask) + ", which lacks the thread's own lane " +
         std::to_string(lane()));
  }
  Thread& mine = *threads_[running_];
  mine.state = State::at_collective;
  mine.what = what;
  mine.mask = mask;
  mine.operand = operand;
  mine.combine = combine;
  const int first = running_ / kWarp * kWarp;
  void* operands[kWarp] = {};
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    if (first + lane >= count_) return wait();  // nobody will come: see deadlock()
    const Thread& other = *threads_[first + lane];
    const bool here = other.state == State::at_collective && other.mask == mask &&
                      std::strcmp(other.what, what) == 0 && other.combine == combine;
    if (!here) return wait();
    operands[lane] = other.operand;
  }
  combine(operands, mask);
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) set_ready(first + __builtin_ctz(rest));
  wait();  // its turn may not be now
}

void Block::copy(Copy copy) {
  std::memset(copy.to, 0xff, copy.filled);
  Thread& mine = *threads_[running_];
  copy.group = mine.groups;
  mine.copies.push_back(copy);
}

void Block::end_group() { ++threads_[running_]->groups; }

void Block::wait_for_groups(int pending) {
  Thread& mine = *threads_[running_];
  auto still = mine.copies.begin();
  while (still != mine.copies.end() && still->group < mine.groups - pending) perform(*still++);
  mine.copies.erase(mine.copies.begin(), still);
}

void run_grid(const char* name, const void* kernel, Index3 grid, unsigned threads,
              size_t shared_bytes, const std::function<void()>& thread) {
  static std::vector<std::unique_ptr<Block>> of_size(kMostThreads + 1);
  if (threads == 0 || threads > kMostThreads) {
    throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads) +
                             " threads");
  }
  if (shared_bytes > most_shared_memory()) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared_bytes) +
                             " bytes of shared memory");
  }
  Launched& most = launched()[kernel];
  most = {std::max(most.threads, threads), std::max(most.shared_bytes, shared_bytes)};
  auto& block = of_size[threads];
  if (!block) block = std::make_unique<Block>(static_cast<int>(threads));
  try {
    const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
    for (const int64_t b : ordered(blocks, 0)) {
      const Index3 at = {static_cast<unsigned>(b % grid.x),
                         static_cast<unsigned>(b / grid.x % grid.y),
                         static_cast<unsigned>(b / grid.x / grid.y)};
      block->run(at, grid, shared_bytes, thread);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(name) + ", " + error.what());
  }
}

}  // namespace emulation

// For the tests, by ctypes.
extern "C" __attribute__((visibility("default"))) void pyvit_emulation_schedule(int order,
                                                                               uint64_t seed) {
  emulation::schedule() = {static_cast<emulation::Schedule::Order>(order), seed};
}

extern "C" __attribute__((visibility("default"))) void pyvit_emulation_shared_memory(
    uint64_t bytes) {
  emulation::most_shared_memory() = bytes;
}

// A line for each kernel that was launched: where it is in this library, threads, shared memory.
extern "C" __attribute__((visibility("default"))) const char* pyvit_emulation_launches() {
  static std::string lines;
  lines.clear();
  Dl_info library{};
  dladdr(reinterpret_cast<const void*>(&pyvit_emulation_launches), &library);
  for (const auto& [kernel, most] : emulation::launched()) {
    lines += std::to_string(static_cast<const char*>(kernel) -
                            static_cast<const char*>(library.dli_fbase)) +
             " " + std::to_string(most.threads) + " " + std::to_string(most.shared_bytes) + "\n";
  }
  return lines.c_str();
}
