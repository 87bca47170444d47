// The watch over memory: every load and store of a kernel, in the build whose sources are compiled with
// -fsanitize=thread. That flag makes the compiler call a function at each access; here are those functions,
// instead of the thread sanitizer's, and they know what a block is.
//
// An access must lie in memory that the launch may use: the thread's own stack, its block's (or cluster's)
// shared memory, the elements of a tensor whose pointer the host's code took since its operator began. Then,
// for every two bytes: a read of what nobody wrote (shared memory in this block, tensors made by `empty` in
// this operator) is a fault, and so is an access that an earlier one by another thread conflicts with, unless
// barriers or fences with atomics order the two. Blocks are never ordered by having run one after another.
#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "watch.h"

namespace simt::watch {

const Block* block_of(uintptr_t at) {
  for (const Block& block : team->blocks) {
    const ptrdiff_t offset = reinterpret_cast<char*>(at) - block.shared;
    if (offset >= library().shared_first && offset < library().shared_last) return &block;
  }
  return nullptr;
}

namespace {

// A load, a store or an atomic of the running thread.
struct Use {
  uintptr_t at;
  size_t bytes;
  Access how;
  bool writes() const { return how != read && how != observe; }
  bool reads() const { return how != write && how != exchange; }
  bool atomic() const { return how >= observe; }
};
const char* name(bool writes, bool atomic) { return atomic ? "an atomic" : writes ? "a write" : "a read"; }

// Who did something to a grain of memory, and when.
struct Mark {
  uint32_t block = 0;  // serial number; 0: nobody
  uint32_t time : 21, thread : 10, atomic : 1;
  Mark() : time(0), thread(0), atomic(0) {}
  Mark(const Fibre& fibre, bool atomic_)
      : block(fibre.block->serial), time(fibre.now & 0x1fffff), thread(fibre.thread), atomic(atomic_) {}
};
struct Grain {
  Mark write, reads[2];  // of the reads that nothing orders, two are kept
};
constexpr uintptr_t GRAIN = 2;  // bytes: of the smallest type that kernels store
// `write` of what nobody wrote since it was allocated, or since a copy into it began.
Mark unwritten() {
  Mark mark;
  mark.time = 1;
  return mark;
}
bool is_unwritten(const Grain& grain) { return grain.write.block == 0 && grain.write.time; }

constexpr uintptr_t PAGE = 512;  // grains
std::unordered_map<uintptr_t, std::unique_ptr<Grain[]>> pages;
struct {
  uintptr_t number = 0;
  Grain* grains = nullptr;
} last_page;

inline Grain& grain_at(uintptr_t at) {
  const uintptr_t number = at / GRAIN / PAGE;
  if (number != last_page.number || !last_page.grains) {
    auto& page = pages[number];
    if (!page) page.reset(new Grain[PAGE]);
    last_page = {number, page.get()};
  }
  return last_page.grains[at / GRAIN % PAGE];
}

// The elements of a tensor whose pointer the host took.
struct Region {
  uintptr_t first, last;
  bool writable;
};
std::vector<Region> regions;

bool ordered(const Mark& mark) {
  if (mark.block < team->first_of_launch) return true;
  if (mark.block == running->block->serial && mark.thread == running->thread) return true;
  const unsigned rank = (mark.block - team->first_of_launch) % unsigned(team->blocks.size());
  return mark.time <= known(running->past, mark.block - rank, rank * team->threads + mark.thread);
}

std::string hex(uintptr_t number) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", size_t(number));
  return text;
}

bool is_dynamic(ptrdiff_t offset) { return offset >= 0 && offset < ptrdiff_t(SHARED_BYTES); }

// The static arrays of shared memory that the running kernel has: its own, and those of device functions.
const std::vector<Static>& statics() {
  static const void* kernel = nullptr;
  static std::vector<Static> found;
  if (kernel == team->launch.kernel) return found;
  kernel = team->launch.kernel;
  found.clear();
  const std::string own = "_ZZ" + symbol_of(kernel).substr(2);
  for (const Static& s : library().statics) {
    const bool of_a_kernel = s.symbol.find("_kernel") != std::string::npos;
    if (!of_a_kernel || s.symbol.rfind(own, 0) == 0) found.push_back(s);
  }
  return found;
}

// The one that holds the bytes, or null.
const Static* static_at(ptrdiff_t offset, size_t bytes) {
  for (const Static& s : statics())
    if (offset >= s.first && offset + ptrdiff_t(bytes) <= s.last) return &s;
  return nullptr;
}

// The array's own name: the symbol ends with its length and itself.
std::string array_name(const Static& array) {
  const std::string& symbol = array.symbol;
  for (size_t length = 1; length < symbol.size(); ++length) {
    const std::string digits = std::to_string(length);
    const size_t first = symbol.size() - length;
    if (first >= digits.size() && symbol.compare(first - digits.size(), digits.size(), digits) == 0)
      return symbol.substr(first);
  }
  return symbol;
}

// " at shared+0x40", ", 4 bytes after a tensor's last element".
std::string describe(uintptr_t at) {
  for (const Fibre& fibre : running->block->fibres)
    if (at - uintptr_t(fibre.stack) < STACK_BYTES)
      return " at " + hex(at) + ", in the local memory of thread " + std::to_string(fibre.thread);
  if (const Block* block = block_of(at)) {
    const std::string whose = block == running->block ? "" : " of block " + name_of(block->index);
    const ptrdiff_t offset = reinterpret_cast<char*>(at) - block->shared;
    if (is_dynamic(offset)) return " at shared+" + hex(uintptr_t(offset)) + whose;
    const Static* array = static_at(offset, 1);
    if (!array) return " at static shared memory" + whose + ", in none of the kernel's arrays";
    return " at " + array_name(*array) + "+" + hex(uintptr_t(offset - array->first)) + whose;
  }
  const auto distance = [&](const Region& r) {
    return at < r.first ? r.first - at : at < r.last ? 0 : at - r.last;
  };
  const auto nearest =
      std::min_element(regions.begin(), regions.end(),
                       [&](const Region& a, const Region& b) { return distance(a) < distance(b); });
  if (nearest == regions.end() || distance(*nearest) >= (1 << 20)) return " at " + hex(at);
  const std::string bytes = ", " + std::to_string(distance(*nearest)) + " bytes ";
  if (at < nearest->first) return bytes + "before a tensor's first element";
  if (at >= nearest->last) return bytes + "after a tensor's last element";
  return " at tensor+" + hex(at - nearest->first);
}

[[noreturn]] void report(const char* kind, const Use& use, const std::string& more = "") {
  fault(kind, std::string(name(use.writes(), use.atomic())) + " of " + std::to_string(use.bytes) + " bytes" +
                  describe(use.at) + more);
}

// Whether it lies in shared memory, which it may not leave.
bool in_shared(const Use& use) {
  const Block* block = block_of(use.at);
  if (!block) return false;
  const ptrdiff_t offset = reinterpret_cast<char*>(use.at) - block->shared;
  const ptrdiff_t size = ptrdiff_t(team->launch.shared_bytes);
  if (is_dynamic(offset) && offset + ptrdiff_t(use.bytes) > size)
    report("out of bounds", use, " of " + std::to_string(size) + " bytes");
  if (!is_dynamic(offset) && !static_at(offset, use.bytes)) report("out of bounds", use);
  if (block->left == 0) report("out of bounds", use, ": that block has ended");
  return true;
}

bool in_tensor(const Use& use, bool to_write) {
  static size_t last = 0;  // where the one before was found
  const auto holds = [&](const Region& r) {
    return r.first <= use.at && use.at + use.bytes <= r.last && (r.writable || !to_write);
  };
  if (last < regions.size() && holds(regions[last])) return true;
  last = size_t(std::find_if(regions.begin(), regions.end(), holds) - regions.begin());
  return last < regions.size();
}

// Constants (and threadIdx …) in this library's image, and the arguments of the kernel.
bool constant(uintptr_t at) {
  return at - uintptr_t(team->launch.arguments) < team->launch.argument_bytes ||
         (library().first <= at && at < library().last);
}

void must_be_ordered(const Mark& earlier, bool wrote, const Use& use) {
  if ((use.atomic() && earlier.atomic) || ordered(earlier)) return;
  std::string who = " by thread " + std::to_string(earlier.thread);
  if (earlier.block != running->block->serial) {
    const unsigned place = earlier.block - team->first_of_launch, size = unsigned(team->blocks.size());
    who += " of block " + name_of(index_of(team->order[place / size] * size + place % size));
  }
  report("race", use, std::string(", not ordered after ") + name(wrote, earlier.atomic) + who);
}

// A grain's history after this use of it, if that is lawful.
Grain used(Grain grain, const Use& use, const Mark& mine, bool shared) {
  if (shared && std::max(grain.write.block, grain.reads[0].block) < team->serial()) {
    grain = Grain();  // of another block's life
    grain.write = unwritten();
  }
  if (use.reads() && is_unwritten(grain)) report("unwritten", use);
  must_be_ordered(grain.write, true, use);
  if (!use.writes()) {
    static unsigned chance = 0;  // which of three unordered reads is forgotten
    const bool second = !ordered(grain.reads[0]) && (ordered(grain.reads[1]) || ++chance % 2);
    grain.reads[second] = mine;
    return grain;
  }
  for (const Mark& earlier : grain.reads) must_be_ordered(earlier, false, use);
  return {mine, {}};
}

}  // namespace

void access(const void* p, size_t bytes, Access how) {
  const Use use = {uintptr_t(p), bytes, how};
  if (use.at - uintptr_t(running->stack) < STACK_BYTES || bytes == 0) return;
  if (!use.writes() && constant(use.at)) return;
  if (bytes < GRAIN) fault("unsupported", "an access to a type smaller than the watch's records");
  const bool shared = in_shared(use);
  if (!shared && !in_tensor(use, use.writes()))
    report(in_tensor(use, false) ? "read only" : "out of bounds", use);
  const Mark mine(*running, use.atomic());
  Grain before, after;
  for (uintptr_t at = use.at; at < use.at + bytes; at += GRAIN) {
    Grain& grain = grain_at(at);
    if (at == use.at || std::memcmp(&grain, &before, sizeof grain)) {  // mostly like its neighbour
      before = grain;
      after = used(grain, use, mine, shared);
    }
    grain = after;
  }
}

// Until the copy is waited for, its target is as good as unwritten.
void copy_in_flight(const Copy& copy) {
  access(copy.target, copy.filled, write);
  set_written(copy.target, copy.filled, false);
}

void forget() {
  pages.clear();
  last_page = {};
  regions.clear();
}
void allow(const void* p, size_t bytes, bool writable) {
  if (bytes) regions.push_back({uintptr_t(p), uintptr_t(p) + bytes, writable});
}
void set_written(const void* p, size_t bytes, bool written) {
  for (size_t i = 0; i < bytes; i += GRAIN) grain_at(uintptr_t(p) + i).write = written ? Mark() : unwritten();
}

}  // namespace simt::watch
