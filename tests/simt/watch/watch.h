// The parts of the watch: memory (watch.cpp), order (history.cpp), who calls them (hooks.cpp).
#pragma once

#include "engine.h"

namespace simt::watch {

// The time up to which what a member of a team did is ordered before what one with this past does now.
inline unsigned known(const Past& past, unsigned team_serial, unsigned member) {
  if (team_serial == team->serial()) return (*past.team)[member];
  if (!past.others) return 0;
  const auto found = past.others->find(team_serial);
  return found == past.others->end() ? 0 : (*found->second)[member];
}

// The block of the team in whose shared memory an address lies, or null.
const Block* block_of(uintptr_t at);

// What the host's code tells: an operator begins or ends; a kernel may use this memory; it is written, or
// not.
void forget();
void allow(const void* p, size_t bytes, bool writable);
void set_written(const void* p, size_t bytes, bool written);

}  // namespace simt::watch
