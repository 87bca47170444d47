// The parts of the watch: memory (watch.cpp), order (history.cpp), who calls them (hooks.cpp).
#pragma once

#include "engine.h"

namespace simt::watch {

// The time up to which what a member of a team did is ordered before what one with this past does now.
unsigned known(const Past&, unsigned team_serial, unsigned member);

// What the host's code tells: an operator begins or ends; a kernel may use this memory; it is written, or
// not.
void forget();
void allow(const void* p, size_t bytes, bool writable);
void set_written(const void* p, size_t bytes, bool written);

}  // namespace simt::watch
