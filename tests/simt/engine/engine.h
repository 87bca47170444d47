// The executor's state, shared by the scheduler (scheduler.cpp) and the watch over memory (watch.cpp).
#pragma once

#include "simt.h"

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace simt {

// What happened before, kept by the watch alone. A thread's time ticks whenever it releases what it did (it
// arrives at a barrier, it fences); times[i] is the time up to which what thread i of a team did is known.
using Times = std::shared_ptr<const std::vector<unsigned>>;
struct Past {
  Times team;
  std::shared_ptr<const std::map<unsigned, Times>> others;  // teams by their serial number, through atomics
};

// Where threads gather: all that arrive are let go when the last one does.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  int votes = 0, counted = 0;  // of those who are arriving; of the last generation
  std::shared_ptr<std::vector<unsigned>> gathered;
  Past latest, told;  // of who came last; of all of the last generation
};

// An exchange of values among lanes; by parity of the generation, so that a fast lane cannot overwrite what a
// slow one still reads.
struct Exchange {
  Barrier barrier;
  const char* what = "";  // and of how many bytes a lane, in this generation
  size_t bytes = 0;
  std::array<std::vector<char>, 2> slots;
};

// A copy in flight (cp.async); the target beyond the source's bytes becomes zero.
struct Copy {
  char* target;
  const char* source;
  size_t bytes, filled;
};

struct Block;
struct Fibre {
  Block* block = nullptr;
  unsigned thread = 0;
  char* stack = nullptr;
  void* stack_pointer = nullptr;  // while it does not run
  bool done = true;
  const char* waits_for = nullptr;  // while *counter == seen
  const unsigned* counter = nullptr;
  unsigned seen = 0, cluster_seen = 0;
  std::deque<std::vector<Copy>> copies;  // by group; the last one is open
  unsigned now = 1;
  Past past, released, acquirable;  // ordered before what it does; at its last fence; by atomics since then
  unsigned unchanged = 0;           // atomics in a row that changed nothing: it may spin
};

struct Worker;
struct Block {
  dim3 index;
  unsigned rank = 0, serial = 0;  // in its team; over all launches
  unsigned left = 0;              // threads that have not returned
  std::vector<Fibre> fibres;
  std::vector<unsigned> order;
  std::array<Barrier, 16> barriers;                        // 0 is __syncthreads'
  std::vector<std::map<unsigned, Barrier>> warp_barriers;  // [warp], by mask
  std::vector<std::map<unsigned, Exchange>> exchanges;
  char* shared = nullptr;          // of the OS thread that runs it
  std::unique_ptr<Worker> worker;  // where the team has several blocks
};

// Blocks that are resident together.
struct Team {
  const Launch& launch;
  unsigned threads, first_of_launch;   // of a block; serial number
  const std::vector<unsigned>& order;  // of the launch's teams, as they run
  std::vector<Block> blocks;
  std::vector<Barrier> clusters;
  Barrier& cluster_of(const Block& block) { return clusters[block.rank / launch.cluster]; }
  unsigned serial() const { return blocks[0].serial; }
};

int run(const Launch&);  // a cudaError_t
extern Team* team;       // the running one, or null
extern Fibre* running;   // null: the host's code

// Whether instrumented code is a kernel's: the linker may give the engine itself instrumented copies of what
// the standard library's headers define. The engine is at work while one of these lives.
extern bool in_kernel;
struct AtWork {
  AtWork() { in_kernel = false; }
  ~AtWork() { in_kernel = true; }
};

// This shared library. Places in shared memory are relative to the dynamic array's begin.
struct Static {
  ptrdiff_t first, last;
  std::string symbol;
};
struct Library {
  uintptr_t first = 0, last = 0;                // its image
  ptrdiff_t shared_first = 0, shared_last = 0;  // its thread-local memory
  std::vector<Static> statics;
};
const Library& library();
std::string symbol_of(const void* kernel);

void yield();
void wait(const char* what, const unsigned& counter);  // until it changes

std::string kernel_name(const void* kernel);
dim3 index_of(unsigned block);
std::string name_of(dim3 block);
// "kernel, block 3, thread 17" of the running fibre.
std::string place();
// Ends the launch with the report "simt: <kind>: <place>: <what>".
[[noreturn]] void fault(const char* kind, const std::string& what);
const std::string& last_report();
constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure

constexpr size_t STACK_BYTES = 256 * 1024;

// What every access and every synchronisation tells the watch (watch.cpp), where it is built in.
namespace watch {
enum Access { read, write, observe, update, exchange };  // from observe on atomics: read, both, write
#ifdef SIMT_WATCH
void begin(Team&);
void access(const void* p, size_t bytes, Access);
void copy_in_flight(const Copy&);
void arrive(Barrier&, Fibre&);
void complete(Barrier&);
void leave(const Barrier&, Fibre&, bool at_once);  // since it arrived
void fence(Fibre&);
void synchronise(const void* p, Fibre&);
void acquire(const void* p, Fibre&);
#else
inline void begin(Team&) {}
inline void access(const void*, size_t, Access) {}
inline void copy_in_flight(const Copy&) {}
inline void arrive(Barrier&, Fibre&) {}
inline void complete(Barrier&) {}
inline void leave(const Barrier&, Fibre&, bool) {}
inline void fence(Fibre&) {}
inline void synchronise(const void*, Fibre&) {}
inline void acquire(const void*, Fibre&) {}
#endif
}  // namespace watch

}  // namespace simt
