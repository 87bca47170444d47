// The watch over memory: every load and store of a kernel, in the build whose sources are compiled with
// -fsanitize=thread. That flag makes the compiler call a function at each access; here are those functions,
// instead of the thread sanitizer's, and they know what a block is.
//
// An access must lie in memory that the launch may use: the thread's own stack, its block's (or cluster's)
// shared memory, the elements of a tensor whose pointer the host's code took since its operator began. Then,
// per byte: a read of what nobody wrote (shared memory in this block, tensors made by `empty` in this
// operator) is a fault, and so is an access that an earlier one by another thread conflicts with, unless
// barriers or fences with atomics order the two. Blocks are never ordered by having run one after another.
#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "watch.h"

namespace simt::watch {
namespace {

// A load, a store or an atomic of the running thread.
struct Use {
  uintptr_t at;
  size_t bytes;
  Access how;
  bool writes() const { return how != read; }
  bool reads() const { return how == read || how == update; }
  bool atomic() const { return how == update || how == exchange; }
};
const char* name(bool writes, bool atomic) { return atomic ? "an atomic" : writes ? "a write" : "a read"; }

// Who did something to a byte, and when.
struct Mark {
  unsigned block = 0, time = 0;  // serial number; 0: nobody
  uint16_t thread = 0;
  bool atomic = false;
};
struct Byte {
  Mark write, reads[2];  // of the reads that nothing orders, two are kept
  bool unwritten = false;
};

constexpr uintptr_t PAGE = 1024;
std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
struct {
  uintptr_t number = 0;
  Byte* bytes = nullptr;
} last_page;

Byte& byte_at(uintptr_t at) {
  if (at / PAGE != last_page.number || !last_page.bytes) {
    auto& page = pages[at / PAGE];
    if (!page) page.reset(new Byte[PAGE]);
    last_page = {at / PAGE, page.get()};
  }
  return last_page.bytes[at % PAGE];
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

// The block in whose shared memory an address lies, or null.
const Block* block_of(uintptr_t at) {
  for (const Block& block : team->blocks) {
    const ptrdiff_t offset = reinterpret_cast<char*>(at) - block.shared;
    if (offset >= library().shared_first && offset < library().shared_last) return &block;
  }
  return nullptr;
}
bool is_dynamic(ptrdiff_t offset) { return offset >= 0 && offset < ptrdiff_t(SHARED_BYTES); }

// The array that holds the bytes: a static one of this kernel, or of a device function. Else null.
const Static* static_at(ptrdiff_t offset, size_t bytes) {
  const std::string of_this_kernel = "_ZZ" + symbol_of(team->launch.kernel).substr(2);
  for (const Static& s : library().statics) {
    if (offset < s.first || offset + ptrdiff_t(bytes) > s.last) continue;
    const bool of_a_kernel = s.symbol.find("_kernel") != std::string::npos;
    return !of_a_kernel || s.symbol.rfind(of_this_kernel, 0) == 0 ? &s : nullptr;
  }
  return nullptr;
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
    const size_t name = array->symbol.find_first_not_of("0123456789", array->symbol.rfind('E') + 1);
    return " at " + array->symbol.substr(name) + "+" + hex(uintptr_t(offset - array->first)) + whose;
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

}  // namespace

void access(const void* p, size_t bytes, Access how) {
  const Use use = {uintptr_t(p), bytes, how};
  if (use.at - uintptr_t(running->stack) < STACK_BYTES || bytes == 0) return;
  if (!use.writes() && constant(use.at)) return;
  const bool shared = in_shared(use);
  if (!shared && !in_tensor(use, use.writes()))
    report(in_tensor(use, false) ? "read only" : "out of bounds", use);
  const Mark mine = {running->block->serial, running->now, uint16_t(running->thread), use.atomic()};
  for (uintptr_t at = use.at; at < use.at + bytes; ++at) {
    Byte& byte = byte_at(at);
    if (shared && std::max(byte.write.block, byte.reads[0].block) < team->serial()) {
      byte = Byte();  // of another block's life
      byte.unwritten = true;
    }
    if (use.reads() && byte.unwritten) report("unwritten", use);
    must_be_ordered(byte.write, true, use);
    if (!use.writes()) {
      byte.reads[ordered(byte.reads[0]) ? 0 : 1] = mine;
      continue;
    }
    for (Mark& earlier : byte.reads) {
      must_be_ordered(earlier, false, use);
      earlier = Mark();
    }
    byte.write = mine;
    byte.unwritten = false;
  }
}

// Until the copy is waited for, its target is as good as unwritten.
void copy_in_flight(const Copy& copy) {
  access(copy.target, copy.filled, write);
  for (size_t i = 0; i < copy.filled; ++i) byte_at(uintptr_t(copy.target) + i).unwritten = true;
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
  for (size_t i = 0; i < bytes; ++i) byte_at(uintptr_t(p) + i).unwritten = !written;
}

}  // namespace simt::watch
