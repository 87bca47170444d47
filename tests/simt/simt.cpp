// The executor's scheduler, and the entry points of CUDA and of a CUDA PyTorch that the launching code refers
// to.
#include "simt.h"

#include <map>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace segkernels::cuda {
alignas(128) thread_local double shared[simt::SHARED_BYTES / sizeof(double)];
}

// Saves the running stack in *save and continues on `load`: ucontext's swapcontext without its system calls
// (and without the address sanitizer's clearing of whole stacks), which took nine tenths of the time.
extern "C" void simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
  .text
  .globl simt_switch
simt_switch:
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
)");
#else
#error "the executor's fibres are written for x86-64"
#endif

namespace simt {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 256 * 1024;
#else
constexpr size_t STACK_BYTES = 64 * 1024;
#endif

Block& Block::current() {
  static Block block;
  return block;
}

unsigned seed() {
  const char* value = std::getenv("SEGKERNELS_SIMT_SEED");
  return value ? unsigned(std::atoi(value)) : 0;
}

size_t& allowed_shared(const void* kernel) {
  static std::map<const void*, size_t> allowed;
  return allowed.try_emplace(kernel, 48 * 1024).first->second;
}

void Block::enter() {
  Block& block = current();
  block.body_(block.argument_);
  Fibre& fibre = block.fibres_[block.running_];
  fibre.done = true;
  simt_switch(&fibre.stack_pointer, block.scheduler_);
}

void Block::wait(const unsigned& counter) {
  Fibre& fibre = fibres_[running_];
  fibre.counter = &counter;
  fibre.seen = counter;
  simt_switch(&fibre.stack_pointer, scheduler_);
}

void Block::run(unsigned threads, size_t shared_bytes, unsigned seed, void (*body)(void*), void* argument) {
  threads_ = threads, body_ = body, argument_ = argument, arrived_ = 0;
  char* memory = reinterpret_cast<char*>(segkernels::cuda::shared);
  ASAN_UNPOISON_MEMORY_REGION(memory, SHARED_BYTES);
  std::memset(memory, 0xff, shared_bytes);
  ASAN_POISON_MEMORY_REGION(memory + shared_bytes, SHARED_BYTES - shared_bytes);

  fibres_.resize(std::max<size_t>(fibres_.size(), threads));
  warps_.assign(threads / LANES, Warp());
  order_.resize(threads);
  std::iota(order_.begin(), order_.end(), 0);
  std::shuffle(order_.begin(), order_.end(), std::mt19937(seed));
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& fibre = fibres_[t];
    if (!fibre.stack) fibre.stack.reset(new char[STACK_BYTES]);
    fibre.done = false, fibre.counter = nullptr;
    // What simt_switch pops: six registers, enter's address; then enter's (unused) return address.
    void** top = reinterpret_cast<void**>(fibre.stack.get() + STACK_BYTES) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(&Block::enter);
    fibre.stack_pointer = top;
  }
  for (unsigned left = threads; left > 0;) {
    bool moved = false;
    for (const unsigned t : order_) {
      Fibre& fibre = fibres_[t];
      if (fibre.done || (fibre.counter && *fibre.counter == fibre.seen)) continue;
      moved = true, fibre.counter = nullptr, running_ = t, threadIdx = dim3(t, 0, 0);
      simt_switch(&scheduler_, fibre.stack_pointer);
      left -= fibre.done;
    }
    if (!moved) {
      std::fprintf(stderr,
                   "simt: block %u: %u threads wait for a barrier or exchange that the others do not reach\n",
                   blockIdx.x, left);
      std::abort();
    }
  }
}

}  // namespace simt

extern "C" {
int aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int aoti_torch_delete_device_guard(void*) { return 0; }
int aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
int torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  if (error == 0) return 0;
  *message = static_cast<char*>(std::malloc(64));
  std::snprintf(*message, 64, "simt: launch refused (cudaError %d)", error);
  return 0;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }
}
