// The watch over memory: every load and store of a kernel, in the build whose sources are compiled with
// -fsanitize=thread. That flag makes the compiler call a function at each access; here are those functions,
// instead of the thread sanitizer's, and they know what a block is.
//
// An access must lie in memory that the launch may use: the thread's own stack, its block's (or cluster's)
// shared memory, the elements of a tensor whose pointer the host's code took since its operator began. Then,
// per byte: a read of what nobody wrote (shared memory in this block, tensors made by `empty` in this operator)
// is a fault, and so is an access that an earlier one by another thread conflicts with, unless barriers or
// fences with atomics order the two. Blocks are never ordered by having run one after another.
#include <link.h>

#include <algorithm>
#include <unordered_map>

#include "engine.h"

namespace simt::watch {
namespace {

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

// What fences and atomics told at a place.
std::unordered_map<const void*, Past> published;

// What a thread knows of a team's past: the time up to which it is ordered before what the thread does now.
unsigned known(const Past& past, unsigned team_serial, unsigned member) {
  if (team_serial == team->serial()) return (*past.team)[member];
  if (!past.others) return 0;
  const auto found = past.others->find(team_serial);
  return found == past.others->end() ? 0 : (*found->second)[member];
}

bool ordered(const Mark& mark) {
  if (mark.block < team->first_of_launch) return true;
  if (mark.block == running->block->serial && mark.thread == running->thread) return true;
  const unsigned size = unsigned(team->blocks.size());
  const unsigned rank = (mark.block - team->first_of_launch) % size;
  return mark.time <= known(running->past, mark.block - rank, rank * team->threads + mark.thread);
}

std::string hex(uintptr_t number) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", size_t(number));
  return text;
}

std::string describe_shared(uintptr_t at) {
  for (const Block& block : team->blocks) {
    const ptrdiff_t offset = reinterpret_cast<char*>(at) - block.shared;
    const SharedLayout layout = shared_layout();
    if (offset < layout.first || offset >= layout.last) continue;
    const std::string whose = &block == running->block ? "" : " of block " + name_of(block.index);
    if (offset >= 0 && offset < ptrdiff_t(SHARED_BYTES)) return "shared+" + hex(uintptr_t(offset)) + whose;
    return "static shared memory" + whose + " at " + hex(at);
  }
  return hex(at);
}

std::string describe(uintptr_t at) {
  for (const Fibre& fibre : running->block->fibres)
    if (at - uintptr_t(fibre.stack) < STACK_BYTES)
      return hex(at) + ", in the local memory of thread " + std::to_string(fibre.thread);
  const Region* nearest = nullptr;
  for (const Region& region : regions)
    if (region.first <= at && (!nearest || region.first > nearest->first)) nearest = &region;
  if (!nearest || at - nearest->first > (uintptr_t(1) << 30)) return describe_shared(at);
  const std::string offset = "tensor+" + hex(at - nearest->first);
  if (at < nearest->last) return offset;
  return offset + ", " + std::to_string(at - nearest->last) + " bytes after its last element";
}

const char* name(bool write, bool atomic) { return atomic ? "atomic" : write ? "write" : "read"; }

[[noreturn]] void report(const char* kind, uintptr_t at, size_t bytes, bool write, bool atomic,
                         const std::string& more = "") {
  fault(kind, std::string(name(write, atomic)) + " of " + std::to_string(bytes) + " bytes at " + describe(at) + more);
}

// Whether the access lies in shared memory that may be used; one beyond its end is a fault.
bool in_shared(uintptr_t at, size_t bytes, bool write, bool atomic) {
  static const SharedLayout layout = shared_layout();
  for (const Block& block : team->blocks) {
    const ptrdiff_t offset = reinterpret_cast<char*>(at) - block.shared;
    if (offset < layout.first || offset >= layout.last) continue;
    const bool dynamic = offset >= 0 && offset < ptrdiff_t(SHARED_BYTES);
    const ptrdiff_t size = ptrdiff_t(team->launch.shared_bytes);
    if (dynamic && offset + ptrdiff_t(bytes) > size)
      report("out of bounds", at, bytes, write, atomic, " of " + std::to_string(size) + " bytes");
    if (block.left == 0) report("out of bounds", at, bytes, write, atomic, ": that block has ended");
    return true;
  }
  return false;
}

bool in_tensor(uintptr_t at, size_t bytes, bool write) {
  static size_t last = 0;
  const auto holds = [&](const Region& r) {
    return at >= r.first && at + bytes <= r.last && (r.writable || !write);
  };
  if (last < regions.size() && holds(regions[last])) return true;
  for (last = 0; last < regions.size(); ++last)
    if (holds(regions[last])) return true;
  return false;
}

// Constants (and threadIdx …) in this library's image, and the arguments of the kernel.
bool constant(uintptr_t at) {
  static const std::pair<uintptr_t, uintptr_t> image = [] {
    std::pair<uintptr_t, uintptr_t> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* p) {
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const uintptr_t first = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            if (info->dlpi_phdr[i].p_type != PT_LOAD || uintptr_t(&blockIdx) - first >= info->dlpi_phdr[i].p_memsz)
              continue;
            *static_cast<std::pair<uintptr_t, uintptr_t>*>(p) = {info->dlpi_addr, first + info->dlpi_phdr[i].p_memsz};
            return 1;
          }
          return 0;
        },
        &found);
    return found;
  }();
  return at - uintptr_t(team->launch.arguments) < team->launch.argument_bytes ||
         (image.first <= at && at < image.second);
}

[[noreturn]] void conflict(const Mark& earlier, bool earlier_wrote, uintptr_t at, size_t bytes, bool write,
                           bool atomic) {
  std::string other = "thread " + std::to_string(earlier.thread);
  if (earlier.block != running->block->serial) {
    const auto theirs = std::find_if(team->blocks.begin(), team->blocks.end(),
                                     [&](const Block& b) { return b.serial == earlier.block; });
    other += theirs != team->blocks.end() ? " of block " + name_of(theirs->index) : " of another block";
  }
  report("race", at, bytes, write, atomic,
         std::string(", not ordered after a ") + name(earlier_wrote, earlier.atomic) + " by " + other);
}

}  // namespace

void begin(Team& team) {
  const auto nothing = std::make_shared<std::vector<unsigned>>(team.blocks.size() * team.threads);
  for (Block& block : team.blocks)
    for (Fibre& fibre : block.fibres) fibre.past.team = nothing;
  if (team.serial() == team.first_of_launch) published.clear();
}

void access(const void* p, size_t bytes, bool write, bool atomic) {
  const uintptr_t first = uintptr_t(p);
  if (first - uintptr_t(running->stack) < STACK_BYTES || bytes == 0) return;
  if (!write && constant(first)) return;
  const bool shared = in_shared(first, bytes, write, atomic);
  if (!shared && !in_tensor(first, bytes, write))
    report(in_tensor(first, bytes, false) ? "read only" : "out of bounds", first, bytes, write, atomic);
  const Mark mine = {running->block->serial, running->now, uint16_t(running->thread), atomic};
  for (uintptr_t at = first; at < first + bytes; ++at) {
    Byte& byte = byte_at(at);
    if (shared && std::max(byte.write.block, byte.reads[0].block) < team->serial()) {
      byte = Byte();  // of another block's life
      byte.unwritten = true;
    }
    if ((!write || atomic) && byte.unwritten) report("unwritten", first, bytes, write, atomic);
    if (!(atomic && byte.write.atomic) && !ordered(byte.write))
      conflict(byte.write, true, first, bytes, write, atomic);
    if (write) {
      for (Mark& read : byte.reads) {
        if (!(atomic && read.atomic) && !ordered(read)) conflict(read, false, first, bytes, write, atomic);
        read = Mark();
      }
      byte.write = mine;
      byte.unwritten = false;
    } else {
      byte.reads[ordered(byte.reads[0]) ? 0 : 1] = mine;
    }
  }
}

// Until the copy is waited for, its target is as good as unwritten.
void copy_in_flight(const Copy& copy) {
  access(copy.target, copy.filled, true);
  for (size_t i = 0; i < copy.filled; ++i) byte_at(uintptr_t(copy.target) + i).unwritten = true;
}

namespace {

void learn(Past& past, const Past& more) {
  if (more.team && past.team != more.team) {
    if (!past.team) {
      past.team = more.team;
    } else {
      auto joined = std::make_shared<std::vector<unsigned>>(*past.team);
      for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*more.team)[i]);
      past.team = joined;
    }
  }
  if (more.others && past.others != more.others) {
    auto joined = std::make_shared<std::map<unsigned, Times>>(*more.others);
    if (past.others)
      for (const auto& [serial, times] : *past.others) {
        Times& theirs = (*joined)[serial];
        Past both = {theirs, nullptr};
        learn(both, {times, nullptr});
        theirs = both.team;
      }
    past.others = joined;
  }
}

// A team's own past as others see it, and back.
Past of_others(const Past& past) {
  if (!past.team) return past;
  Past out = {nullptr, std::make_shared<std::map<unsigned, Times>>(
                           std::map<unsigned, Times>{{team->serial(), past.team}})};
  learn(out, {nullptr, past.others});
  return out;
}
Past mine_apart(const Past& past) {
  if (!past.others || !past.others->count(team->serial())) return past;
  return {past.others->at(team->serial()), past.others};
}

unsigned member(const Fibre& fibre) { return fibre.block->rank * team->threads + fibre.thread; }

}  // namespace

void arrive(Barrier& barrier, Fibre& fibre) {
  auto& gathered = barrier.gathered;
  if (!gathered) {
    gathered = std::make_shared<std::vector<unsigned>>(*fibre.past.team);
  } else if (fibre.past.team != barrier.latest.team) {
    for (size_t i = 0; i < gathered->size(); ++i)
      (*gathered)[i] = std::max((*gathered)[i], (*fibre.past.team)[i]);
  }
  barrier.latest.team = fibre.arrived_with = fibre.past.team;
  learn(barrier.latest, {nullptr, fibre.past.others});
  (*gathered)[member(fibre)] = fibre.now++;
}
void complete(Barrier& barrier) { barrier.told = {std::move(barrier.gathered), barrier.latest.others}; }
void leave(const Barrier& barrier, Fibre& fibre) {
  if (fibre.past.team == fibre.arrived_with)  // which the barrier's includes
    fibre.past = barrier.told;
  else
    learn(fibre.past, barrier.told);
}

void fence(Fibre& fibre) {
  learn(fibre.past, fibre.acquirable);
  fibre.acquirable = {};
  auto times = std::make_shared<std::vector<unsigned>>(*fibre.past.team);
  (*times)[member(fibre)] = fibre.now++;
  fibre.released = {times, fibre.past.others};
}

void synchronise(const void* p, Fibre& fibre) {
  Past& here = published[p];
  learn(fibre.acquirable, mine_apart(here));
  learn(here, of_others(fibre.released));
}

// ---- what the host's code tells

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
