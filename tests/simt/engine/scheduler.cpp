// The executor's engine: fibres, blocks, teams, and what threads wait for.
#include "engine.h"

#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the executor's fibres are written for Linux on x86-64"
#endif

// Saves the running stack in *save and continues on `load`: ucontext's swapcontext without its system calls
// (and without the address sanitizer's clearing of whole stacks), which took nine tenths of the time.
extern "C" void simt_switch(void** save, void* load);
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

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

Team* team = nullptr;
Fibre* running = nullptr;
bool in_kernel = false;
namespace {
void* scheduler = nullptr;  // the stack that resumed the running fibre
std::string report;         // of the fault that ends the launch
unsigned launches = 0, serials = 0;
}  // namespace

// An OS thread that does one job at a time, for its shared memory.
struct Worker {
  std::mutex mutex;
  std::condition_variable changed;
  void (*job)(Block&) = nullptr;
  bool stop = false;
  std::thread thread;

  explicit Worker(Block& block) : thread([this, &block] { serve(block); }) {}
  ~Worker() {
    {
      std::lock_guard lock(mutex);
      stop = true;
    }
    changed.notify_all();
    thread.join();
  }
  void run(void (*f)(Block&)) {
    std::unique_lock lock(mutex);
    job = f;
    changed.notify_all();
    changed.wait(lock, [this] { return !job; });
  }

 private:
  void serve(Block& block) {
    std::unique_lock lock(mutex);
    for (;;) {
      changed.wait(lock, [this] { return job || stop; });
      if (stop) return;
      job(block);
      job = nullptr;
      changed.notify_all();
    }
  }
};

namespace {

// Poisons the shared memory of this OS thread, and gives it to the block.
void prepare(Block& block) {
  const size_t bytes = team->launch.shared_bytes;
  char* memory = block.shared = reinterpret_cast<char*>(segkernels::cuda::shared);
  ASAN_UNPOISON_MEMORY_REGION(memory, SHARED_BYTES);
  std::memset(memory + library().shared_first, 0xff, size_t(-library().shared_first) + bytes);
  std::memset(memory + SHARED_BYTES, 0xff, size_t(library().shared_last) - SHARED_BYTES);
  ASAN_POISON_MEMORY_REGION(memory + bytes, SHARED_BYTES - bytes);
}

char* stack_of(size_t fibre) {
  static std::vector<char*> stacks;  // with a page below each that cannot be touched
  constexpr size_t guard = 4096;
  while (stacks.size() <= fibre) {
    void* p = mmap(nullptr, guard + STACK_BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, guard, PROT_NONE)) throw std::bad_alloc();
    stacks.push_back(static_cast<char*>(p) + guard);
  }
  return stacks[fibre];
}

void enter() {
  in_kernel = true;
  team->launch.body(team->launch.arguments);
  in_kernel = false;
  running->done = true;
  --running->block->left;
  static void* unused;  // static: the address sanitizer would mark a local one's stack for ever
  simt_switch(&unused, scheduler);
}

void start(Fibre& fibre, Block& block, unsigned thread) {
  fibre = Fibre();
  fibre.block = &block, fibre.thread = thread, fibre.done = false;
  fibre.stack = stack_of(size_t(block.rank) * team->threads + thread);
  // What simt_switch pops: six registers, enter's address; then enter's (unused) return address.
  void** top = reinterpret_cast<void**>(fibre.stack + STACK_BYTES) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&enter);
  fibre.stack_pointer = top;
}

void start(Block& block, unsigned rank, unsigned index, std::mt19937& random) {
  block.rank = rank, block.serial = ++serials;
  block.barriers = {};
  block.warp_barriers.assign((team->threads + LANES - 1) / LANES, {});
  block.exchanges.assign(block.warp_barriers.size(), {});
  block.index = index_of(index);
  block.left = team->threads;
  block.fibres.resize(team->threads);
  block.order.resize(team->threads);
  std::iota(block.order.begin(), block.order.end(), 0);
  std::shuffle(block.order.begin(), block.order.end(), random);
  for (unsigned t = 0; t < team->threads; ++t) start(block.fibres[t], block, t);
}

bool waiting(const Fibre& fibre) { return fibre.counter && *fibre.counter == fibre.seen; }

bool moved = false;  // some thread ran in this round

// Lets every thread of the block that can run do so, once.
void sweep(Block& block) {
  blockIdx = block.index;
  for (const unsigned t : block.order) {
    Fibre& fibre = block.fibres[t];
    if (fibre.done || waiting(fibre)) continue;
    moved = true;
    fibre.counter = nullptr;
    running = &fibre;
    threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
    simt_switch(&scheduler, fibre.stack_pointer);
    running = nullptr;
    if (!report.empty()) return;
  }
}

void on_its_thread(Block& block, void (*job)(Block&)) {
  if (block.worker)
    block.worker->run(job);
  else
    job(block);
}

// "threads 0-31, 64 wait for __syncthreads; threads 32-63 have returned"
std::string who_waits(const Block& block) {
  std::map<std::string, std::vector<unsigned>> groups;
  for (const Fibre& f : block.fibres)
    groups[f.done ? "have returned" : std::string("wait for ") + f.waits_for].push_back(f.thread);
  std::string text;
  for (const auto& [what, threads] : groups) {
    text += text.empty() ? "threads" : "; threads";
    for (size_t i = 0; i < threads.size(); ++i) {
      const size_t first = i;
      while (i + 1 < threads.size() && threads[i + 1] == threads[i] + 1) ++i;
      text += (first ? ", " : " ") + std::to_string(threads[first]);
      if (i > first) text += "-" + std::to_string(threads[i]);
    }
    text += " " + what;
  }
  return text;
}

void run_team(const std::vector<unsigned>& order) {
  const auto unfinished = [](const Block& block) { return block.left > 0; };
  std::vector<Block>& blocks = team->blocks;
  while (report.empty() && std::any_of(blocks.begin(), blocks.end(), unfinished)) {
    moved = false;
    for (const unsigned b : order)
      if (report.empty() && blocks[b].left) on_its_thread(blocks[b], &sweep);
    if (moved) continue;
    const Block& stuck = *std::find_if(blocks.begin(), blocks.end(), unfinished);
    report = "simt: barrier: " + kernel_name(team->launch.kernel) + ", block " + name_of(stuck.index) + ": " +
             who_waits(stuck);
  }
}

}  // namespace

dim3 index_of(unsigned block) {
  const dim3 grid = team->launch.grid;
  return dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
}

std::string name_of(dim3 index) {
  std::string name = std::to_string(index.x);
  if (index.y || index.z) name += ", " + std::to_string(index.y) + ", " + std::to_string(index.z);
  return name;
}

std::string place() {
  return kernel_name(team->launch.kernel) + ", block " + name_of(running->block->index) + ", thread " +
         std::to_string(running->thread);
}

void fault(const char* kind, const std::string& what) {
  report = std::string("simt: ") + kind + ": " + place() + ": " + what;
  void* abandoned;
  simt_switch(&abandoned, scheduler);
  std::abort();  // never resumed
}

void wait(const char* what, const unsigned& counter) {
  running->waits_for = what, running->counter = &counter, running->seen = counter;
  yield();
}
void yield() { simt_switch(&running->stack_pointer, scheduler); }

int run(const Launch& launch) {
  const char* start_of_seeds = std::getenv("SEGKERNELS_SIMT_SEED");
  std::mt19937 random(unsigned(start_of_seeds ? std::atoi(start_of_seeds) : 0) + ++launches);
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  const unsigned together = launch.cooperative ? blocks : launch.cluster;
  std::vector<unsigned> teams(blocks / together), order(together);
  std::iota(teams.begin(), teams.end(), 0);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(teams.begin(), teams.end(), random);
  gridDim = launch.grid, blockDim = launch.block;
  report.clear();
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  Team here = {launch, threads, serials + 1, teams, std::vector<Block>(together), {}};
  team = &here;
  for (const unsigned t : teams) {
    std::shuffle(order.begin(), order.end(), random);
    here.cluster = Barrier();
    for (unsigned rank = 0; rank < together; ++rank) {
      Block& block = here.blocks[rank];
      start(block, rank, t * together + rank, random);
      if (together > 1 && !block.worker) block.worker = std::make_unique<Worker>(block);
      on_its_thread(block, &prepare);
    }
    watch::begin(here);
    run_team(order);
    if (!report.empty()) break;
  }
  if (!report.empty())  // abandoned stacks are clean for those who come after
    for (const Block& block : here.blocks)
      for (const Fibre& fibre : block.fibres) ASAN_UNPOISON_MEMORY_REGION(fibre.stack, STACK_BYTES);
  team = nullptr;
  return report.empty() ? 0 : kLaunchFailure;
}

const std::string& last_report() { return report; }

}  // namespace simt
