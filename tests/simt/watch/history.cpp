// Happens-before: what a thread knows of what others did, by barriers, fences and atomics.
#include <algorithm>
#include <unordered_map>

#include "watch.h"

namespace simt::watch {
namespace {

// What was told at a place in memory, through atomics.
std::unordered_map<const void*, Past> published;

void raise(std::vector<unsigned>& times, const std::vector<unsigned>& others) {
  for (size_t i = 0; i < times.size(); ++i) times[i] = std::max(times[i], others[i]);
}

void learn(Past& past, const Past& more) {
  if (more.team && past.team != more.team) {
    if (!past.team) {
      past.team = more.team;
    } else {
      auto joined = std::make_shared<std::vector<unsigned>>(*past.team);
      raise(*joined, *more.team);
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

void begin(Team& team) {
  const auto nothing = std::make_shared<std::vector<unsigned>>(team.blocks.size() * team.threads);
  for (Block& block : team.blocks)
    for (Fibre& fibre : block.fibres) fibre.past.team = nothing;
  if (team.serial() == team.first_of_launch) published.clear();
  for (auto place = published.begin(); place != published.end();)  // shared memory has another life now
    place = block_of(uintptr_t(place->first)) ? published.erase(place) : std::next(place);
}

void arrive(Barrier& barrier, Fibre& fibre) {
  auto& gathered = barrier.gathered;
  if (!gathered)
    gathered = std::make_shared<std::vector<unsigned>>(*fibre.past.team);
  else if (fibre.past.team != barrier.latest.team)
    raise(*gathered, *fibre.past.team);
  barrier.latest.team = fibre.past.team;
  learn(barrier.latest, {nullptr, fibre.past.others});
  (*gathered)[member(fibre)] = fibre.now++;
}
void complete(Barrier& barrier) { barrier.told = {std::move(barrier.gathered), barrier.latest.others}; }
void leave(const Barrier& barrier, Fibre& fibre, bool at_once) {
  if (at_once)  // then what the thread knows is part of what the barrier tells, and all can share that
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
void acquire(const void* p, Fibre& fibre) { learn(fibre.past, mine_apart(published[p])); }

}  // namespace simt::watch
