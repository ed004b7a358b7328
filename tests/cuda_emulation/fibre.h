// Functions that can stop in their middle and go on later, each on a stack of its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

class Fibre {
 public:
  Fibre();
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes ready to call entry(argument), and forgets what was running, whose destructors never run.
  void start(void (*entry)(void*), void* argument);
  // Runs it until it suspends or has returned.
  void resume();
  // From inside a fibre: back to whoever resumed it.
  void suspend();

 private:
  static void begin(Fibre* fibre);

  char* stack_;
  void* inside_ = nullptr;   // stack pointers of the two sides
  void* outside_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // What AddressSanitizer wants to know of the two stacks.
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outer_stack_ = nullptr;
  size_t outer_size_ = 0;
};

}  // namespace emulation
