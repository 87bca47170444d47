// What a thread of a kernel can ask: barriers, exchanges, copies, atomics (see simt.h).
#include "engine.h"

namespace simt {
namespace {

// Arrives; true for the last of `expected`, who lets all the others go.
bool arrive(Barrier& barrier, unsigned expected, int vote = 0) {
  watch::arrive(barrier, *running);
  barrier.votes += vote;
  if (++barrier.arrived < expected) return false;
  barrier.counted = barrier.votes;
  barrier.arrived = 0, barrier.votes = 0;
  watch::complete(barrier);
  ++barrier.generation;
  return true;
}

void arrive_and_wait(const char* what, Barrier& barrier, unsigned expected, int vote = 0) {
  if (!arrive(barrier, expected, vote)) wait(what, barrier.generation);
  watch::leave(barrier, *running);
}

unsigned lanes_of(unsigned mask) {
  const unsigned mine = running->thread % LANES, first = running->thread - mine;
  if (!(mask >> mine & 1)) fault("barrier", "its lane is not in the mask that it gives");
  // a warp's last lanes may not exist
  const unsigned there = team->threads - first < LANES ? (1u << (team->threads - first)) - 1 : ~0u;
  return unsigned(__builtin_popcount(mask & there));
}

}  // namespace

int barrier(int vote) {
  const AtWork now;
  Barrier& all = running->block->barriers[0];
  arrive_and_wait("__syncthreads", all, team->threads, vote);
  return all.counted;
}

void named_barrier(int name, unsigned threads, bool wait) {
  const AtWork now;
  if (name < 1 || name > 15) fault("barrier", "named barrier " + std::to_string(name) + " of 1 to 15");
  if (threads % LANES || threads == 0)
    fault("barrier", "a named barrier for " + std::to_string(threads) + " threads, not whole warps");
  Barrier& barrier = running->block->barriers[size_t(name)];
  wait ? arrive_and_wait("a named barrier", barrier, threads) : void(arrive(barrier, threads));
}

void cluster_arrive() {
  const AtWork now;
  running->cluster_seen = team->cluster.generation;
  arrive(team->cluster, unsigned(team->blocks.size()) * team->threads);
}
void cluster_wait() {
  const AtWork now;
  if (team->cluster.generation == running->cluster_seen) wait("the cluster", team->cluster.generation);
  watch::leave(team->cluster, *running);
}
unsigned cluster_rank() {
  const AtWork now;
  return running->block->rank % team->launch.cluster;
}
unsigned cluster_blocks() {
  const AtWork now;
  return team->launch.cluster;
}

void* shared_of(void* p, unsigned rank) {
  const AtWork now;
  const ptrdiff_t place = static_cast<char*>(p) - running->block->shared;
  if (rank >= team->launch.cluster)
    fault("out of bounds", "block " + std::to_string(rank) + " of its cluster");
  return team->blocks[running->block->rank / team->launch.cluster * team->launch.cluster + rank].shared +
         place;
}

void exchange(const char* what, unsigned mask, const void* mine, size_t bytes, void* all) {
  const AtWork now;
  const unsigned lanes = lanes_of(mask);
  Exchange& exchange = running->block->exchanges[running->thread / LANES][mask];
  Barrier& barrier = exchange.barrier;
  std::vector<char>& slots = exchange.slots[barrier.generation & 1];
  slots.resize(LANES * bytes);
  std::memcpy(&slots[running->thread % LANES * bytes], mine, bytes);
  if (++barrier.arrived < lanes) {
    wait(what, barrier.generation);
  } else {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  std::memcpy(all, slots.data(), LANES * bytes);
}

void warp_barrier(unsigned mask) {
  const AtWork now;
  const unsigned lanes = lanes_of(mask);
  arrive_and_wait("__syncwarp", running->block->warp_barriers[running->thread / LANES][mask], lanes);
}

unsigned active_lanes() {
  const AtWork now;
  const unsigned first = running->thread / LANES * LANES;
  unsigned mask = 0;
  for (unsigned i = 0; i < LANES && first + i < team->threads; ++i)
    if (!running->block->fibres[first + i].done) mask |= 1u << i;
  return mask;
}

void copy_begin(void* target, const void* source, size_t bytes, size_t filled) {
  const AtWork now;
  if (uintptr_t(target) % filled || (bytes && uintptr_t(source) % filled))
    fault("misaligned", "a copy of " + std::to_string(filled) + " bytes");
  const Copy copy = {static_cast<char*>(target), static_cast<const char*>(source), bytes, filled};
  watch::copy_in_flight(copy);
  if (running->copies.empty()) running->copies.emplace_back();
  running->copies.back().push_back(copy);
}
void copy_commit() {
  const AtWork now;
  if (running->copies.empty()) running->copies.emplace_back();
  running->copies.emplace_back();
}
void copy_wait(size_t groups_left) {
  const AtWork now;
  auto& groups = running->copies;  // the open one is not waited for
  for (; groups.size() > groups_left + 1; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      watch::access(copy.source, copy.bytes, watch::read);
      watch::access(copy.target, copy.filled, watch::write);
      std::memcpy(copy.target, copy.source, copy.bytes);
      std::memset(copy.target + copy.bytes, 0, copy.filled - copy.bytes);
    }
}

void atomic(void* p, size_t bytes, bool reads, void (*change)(void* value, const void* argument),
            const void* argument, void* old) {
  const AtWork now;
  static unsigned unchanged = 0;  // in a row: threads may wait for each other by looking at memory
  if (uintptr_t(p) % bytes) fault("misaligned", "an atomic of " + std::to_string(bytes) + " bytes");
  watch::access(p, bytes, reads ? watch::update : watch::exchange);
  watch::synchronise(p, *running);
  char value[16];
  std::memcpy(old, p, bytes);
  std::memcpy(value, p, bytes);
  change(value, argument);
  unchanged = std::memcmp(value, p, bytes) ? 0 : unchanged + 1;
  std::memcpy(p, value, bytes);
  if (unchanged > 1000000) {
    unchanged = 0;
    fault("barrier", "spins on an atomic that nobody changes");
  }
  yield();
}

void fence() {
  const AtWork now;
  watch::fence(*running);
}

}  // namespace simt
