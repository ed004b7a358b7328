#include "fibre.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the emulation of CUDA switches stacks by hand, on x86-64 alone"
#endif

// Saves what a call must preserve on the present stack, leaves its address in *save, and goes on
// with what lies on the other one. swapcontext would make a system call each time.
extern "C" void pyvit_switch_stack(void** save, void* other);
asm(R"(
.text
.globl pyvit_switch_stack
.hidden pyvit_switch_stack
.type pyvit_switch_stack, @function
pyvit_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyvit_switch_stack, .-pyvit_switch_stack
.globl pyvit_fibre_entry
.hidden pyvit_fibre_entry
.type pyvit_fibre_entry, @function
pyvit_fibre_entry:
  movq %r12, %rdi
  callq *%r13
  ud2
.size pyvit_fibre_entry, .-pyvit_fibre_entry
.section .note.GNU-stack,"",@progbits
.text
)");
extern "C" void pyvit_fibre_entry();

namespace emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 256 * 1024;  // pages that are never touched take no memory

}  // namespace

Fibre::Fibre() {
  void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kPage, PROT_NONE);  // below the stack: an overflow stops here
  stack_ = static_cast<char*>(memory) + kPage;
}

Fibre::~Fibre() { munmap(stack_ - kPage, kStack + kPage); }

void Fibre::start(void (*entry)(void*), void* argument) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStack);  // left by a fibre that never came to its end
#endif
  entry_ = entry;
  argument_ = argument;
  auto** top = reinterpret_cast<void**>(stack_ + kStack);
  // As pyvit_switch_stack leaves a stack: r15, r14, r13, r12, rbx, rbp, where to return to; and
  // a place so that the stack is aligned to 16 bytes where the entry is called.
  *--top = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&pyvit_fibre_entry);
  *--top = nullptr;                                    // rbp
  *--top = nullptr;                                    // rbx
  *--top = this;                                       // r12
  *--top = reinterpret_cast<void*>(&Fibre::begin);     // r13
  *--top = nullptr;                                    // r14
  *--top = nullptr;                                    // r15
  inside_ = top;
  fake_inside_ = nullptr;
}

void Fibre::begin(Fibre* fibre) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &fibre->outer_stack_, &fibre->outer_size_);
#endif
  fibre->entry_(fibre->argument_);
  fibre->suspend();  // whoever resumes a fibre that has returned is at fault
  std::abort();
}

void Fibre::resume() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_outside_, stack_, kStack);
#endif
  pyvit_switch_stack(&outside_, inside_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_outside_, nullptr, nullptr);
#endif
}

void Fibre::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_inside_, outer_stack_, outer_size_);
#endif
  pyvit_switch_stack(&inside_, outside_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_inside_, &outer_stack_, &outer_size_);
#endif
}

}  // namespace emulation
