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
  watch::leave(barrier, *running, true);
}

// The lanes of a mask that exist: a block's last warp may be short.
unsigned lanes_of(unsigned mask) {
  const unsigned mine = running->thread % LANES, first = running->thread - mine;
  if (!(mask >> mine & 1)) fault("barrier", "its lane is not in the mask that it gives");
  const unsigned there = team->threads - first < LANES ? (1u << (team->threads - first)) - 1 : ~0u;
  return mask & there;
}

// It came for an atomic and changed nothing.
void spin() {
  if (++running->unchanged > 100000) fault("barrier", "spins on an atomic that nobody changes");
}

unsigned count(unsigned lanes) { return unsigned(__builtin_popcount(lanes)); }

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
  Barrier& cluster = team->cluster_of(*running->block);
  running->cluster_seen = cluster.generation;
  arrive(cluster, team->launch.cluster * team->threads);
}
void cluster_wait() {
  const AtWork now;
  const Barrier& cluster = team->cluster_of(*running->block);
  if (cluster.generation == running->cluster_seen) wait("the cluster", cluster.generation);
  watch::leave(cluster, *running, false);
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
  const unsigned first = running->block->rank - running->block->rank % team->launch.cluster;
  return team->blocks[first + rank].shared + place;
}

unsigned exchange(const char* what, unsigned mask, const void* mine, size_t bytes, void* all) {
  const AtWork now;
  const unsigned lanes = lanes_of(mask);
  Exchange& exchange = running->block->exchanges[running->thread / LANES][mask];
  Barrier& barrier = exchange.barrier;
  if (barrier.arrived == 0) exchange.what = what, exchange.bytes = bytes;
  if (exchange.what != std::string(what) || exchange.bytes != bytes)
    fault("barrier", std::string("its lane is at ") + what + ", others of the mask are at " + exchange.what);
  std::vector<char>& slots = exchange.slots[barrier.generation & 1];
  slots.resize(LANES * bytes);
  std::memcpy(&slots[running->thread % LANES * bytes], mine, bytes);
  if (++barrier.arrived < count(lanes)) {
    wait(what, barrier.generation);
  } else {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  std::memcpy(all, slots.data(), LANES * bytes);
  return lanes;
}

void absent_lane(const char* what, int lane) {
  const AtWork now;
  fault("barrier", std::string(what) + " asks for lane " + std::to_string(lane) + ", which takes no part");
}

void warp_barrier(unsigned mask) {
  const AtWork now;
  const unsigned lanes = lanes_of(mask);
  arrive_and_wait("__syncwarp", running->block->warp_barriers[running->thread / LANES][mask], count(lanes));
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
  if (bytes > filled) fault("out of bounds", "a copy of more bytes than its size");
  if (uintptr_t(target) % filled || (bytes && uintptr_t(source) % filled))
    fault("misaligned", "a copy of " + std::to_string(filled) + " bytes");
  const Copy copy = {static_cast<char*>(target), static_cast<const char*>(source), bytes, filled};
  watch::access(source, bytes, watch::read);
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
  if (uintptr_t(p) % bytes) fault("misaligned", "an atomic of " + std::to_string(bytes) + " bytes");
  watch::access(p, bytes, reads ? watch::update : watch::exchange);
  watch::synchronise(p, *running);
  char value[16];
  std::memcpy(old, p, bytes);
  std::memcpy(value, p, bytes);
  change(value, argument);
  if (std::memcmp(value, p, bytes))
    running->unchanged = 0;
  else
    spin();
  std::memcpy(p, value, bytes);
  yield();
}

void fence() {
  const AtWork now;
  watch::fence(*running);
}

unsigned load_acquire(const unsigned* p) {
  const AtWork now;
  watch::access(p, sizeof *p, watch::observe);
  watch::acquire(p, *running);
  const unsigned value = *p;
  spin();
  yield();
  return value;
}

}  // namespace simt
