// The threads of a block as fibers, and their waiting for each other.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "contexts.h"
#include "memory_order.h"

namespace emu {

inline constexpr unsigned kWarp = 32, kMaxThreads = 1024, kNamedBarriers = 16;
inline constexpr size_t kSlotBytes = 64;

enum class State { kRuns, kWaitsForBlock, kWaitsForNamed, kWaitsForWarp, kEnded };

/// A place in a kernel, by which a test can tell a barrier or a fence.
struct Place {
  const char* file;
  int line;
};

struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
  size_t bytes;
};

struct AsyncGroup {
  std::vector<AsyncCopy> copies;
  void* arrival;  // orders them before what follows the wait
};

/// What runs threads, one of each block that it serves.
struct Fiber {
  Context context;
  order::Fiber watched = nullptr;
  order::Fiber copier = nullptr;  // makes its threads' asynchronous copies
  alignas(8) char issued[8];      // orders what a thread did before the copies that it issues then
};

struct Thread {
  Fiber* fiber;
  State state;
  uint3 index;
  unsigned number;                              // in the block
  const char* what;                             // while it waits: the intrinsic,
  Place place;                                  // the place of a barrier,
  unsigned mask;                                // the lanes of a warp intrinsic,
  unsigned id, expected;                        // the number of a named barrier, and of the threads that meet there
  bool orders;                                  // whether that orders memory
  unsigned participants;                        // of the last warp intrinsic: the mask's lanes that had not ended
  int vote;                                     // handed over at a barrier
  alignas(16) unsigned char slot[kSlotBytes];   // what it hands over at a warp intrinsic
  alignas(16) unsigned char shown[kSlotBytes];  // the same, kept until the next is complete: what other lanes read
  std::vector<AsyncGroup> async_groups;         // committed, not waited for
  std::vector<AsyncCopy> async_open;
  void* fenced;                 // orders what came before the last fence
  std::vector<void*> observed;  // such of other threads, whose values its atomics have seen since its last fence

  unsigned lane() const { return number % kWarp; }
};

/// One GPU that runs one block at a time.
struct Machine {
  const char* kernel = "";
  dim3 grid, block;
  uint3 block_index;
  unsigned char* dynamic_shared = nullptr;
  std::function<void()> body;
  Thread* threads = nullptr;
  Fiber* fibers = nullptr;
  unsigned count = 0;  // threads of the block
  Thread* current = nullptr;
  Scheduler scheduler;
  order::Fiber watched_scheduler = nullptr;
  int votes_for = 0, votes = 0;  // of the last barrier
  bool descending = false, async_early = false;
  Place without = {"", 0};                        // the barrier or fence that orders nothing
  void *launched = nullptr, *ended = nullptr;     // order what is before a launch, and what is in it
  std::map<void*, std::vector<void*>> published;  // by address of an atomic: what its value tells of
  size_t orders_made = 0;                         // in this launch
};
inline Machine machine;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_emu: %s, block (%u, %u, %u): %s\n", machine.kernel, machine.block_index.x,
               machine.block_index.y, machine.block_index.z, message);
  std::abort();
}

/// An address that stands for one event, which threads are ordered by. The next launch uses it again: all of this one
/// is then before all of that.
inline void* make_order() {
  static constexpr size_t kMost = order::kWatches ? size_t{1} << 20 : 1;
  alignas(8) static char events[kMost][8];
  if (!order::kWatches) return nullptr;
  if (machine.orders_made == kMost) fail("too many barriers for one launch");
  return events[machine.orders_made++];
}

/// Whether the barrier or fence at this place is to order memory: all but one that a test takes away.
PEARL_UNWATCHED inline bool orders_memory(const Place& place) {
  if (!order::kWatches || place.line != machine.without.line) return true;
  const char* const slash = __builtin_strrchr(place.file, '/');
  return __builtin_strcmp(slash == nullptr ? place.file : slash + 1, machine.without.file) != 0;
}

/// Gives control back to the scheduler until the current thread may run again.
PEARL_UNWATCHED __attribute__((noinline)) inline void pause(State state) {
  Thread& thread = *machine.current;
  thread.state = state;
  order::switch_to(machine.watched_scheduler);
  leave(thread.fiber->context, machine.scheduler);
}

/// A fiber runs one thread after another.
PEARL_UNWATCHED inline void fiber_main() {
  for (;;) {
    machine.body();
    pause(State::kEnded);
  }
}

PEARL_UNWATCHED __attribute__((noinline)) inline void resume(Thread& thread) {
  machine.current = &thread;
  order::switch_to(thread.fiber->watched);
  enter(thread.fiber->context, machine.scheduler, fiber_main);
}

/// Does something as each of some fibers.
PEARL_UNWATCHED inline void as_each(const order::Fiber* fibers, unsigned count, void (*act)(void*), void* order) {
  for (unsigned i = 0; i < count; ++i) {
    order::switch_to(fibers[i]);
    act(order);
  }
  order::switch_to(machine.watched_scheduler);
}

/// Those of `count` threads that are chosen meet: what each did is before what each will do.
template <class Chosen>
void meet(const Thread* threads, unsigned count, const Chosen& chosen) {
  if (!order::kWatches) return;
  order::Fiber fibers[kMaxThreads];
  unsigned ordered = 0;
  for (unsigned i = 0; i < count; ++i) {
    if (threads[i].orders && chosen(threads[i])) fibers[ordered++] = threads[i].fiber->watched;
  }
  if (ordered == 0) return;
  void* const order = make_order();
  as_each(fibers, ordered, order::release, order);
  as_each(fibers, ordered, order::acquire, order);
}

/// Prints where the threads are, and aborts.
[[noreturn]] inline void fail_with_states(const char* message) {
  std::fprintf(stderr, "cuda_emu: the threads of the block:\n");
  for (unsigned i = 0, end; i < machine.count; i = end) {
    const Thread& t = machine.threads[i];
    const auto same = [&](const Thread& u) {
      return t.state == u.state && (t.state == State::kEnded || (t.what == u.what && t.place.line == u.place.line));
    };
    for (end = i + 1; end < machine.count && same(machine.threads[end]);) ++end;
    std::fprintf(stderr, "  %u to %u ", i, end - 1);
    if (t.state == State::kEnded) std::fprintf(stderr, "have ended\n");
    if (t.state == State::kWaitsForBlock) std::fprintf(stderr, "wait in %s, line %d\n", t.what, t.place.line);
    if (t.state == State::kWaitsForNamed) {
      std::fprintf(stderr, "wait in named barrier %u for %u threads, line %d\n", t.id, t.expected, t.place.line);
    }
    if (t.state == State::kWaitsForWarp) std::fprintf(stderr, "wait in %s, mask %08x\n", t.what, t.mask);
  }
  fail(message);
}

/// Lets the lanes go whose warp intrinsic is complete; true if there were any.
inline bool release_warp(Thread* lanes, unsigned count) {
  bool released = false;
  for (unsigned i = 0; i < count; ++i) {
    if (lanes[i].state != State::kWaitsForWarp) continue;
    unsigned participants = 0;
    bool complete = true;
    for (unsigned j = 0; j < count; ++j) {
      if (!(lanes[i].mask >> j & 1) || lanes[j].state == State::kEnded) continue;
      participants |= 1u << j;
      complete = complete && lanes[j].state == State::kWaitsForWarp && lanes[j].mask == lanes[i].mask &&
                 std::strcmp(lanes[j].what, lanes[i].what) == 0;
    }
    if (!complete) continue;
    released = true;
    meet(lanes, count, [=](const Thread& t) { return (participants >> t.lane() & 1) != 0; });
    for (unsigned j = 0; j < count; ++j) {
      if (!(participants >> j & 1)) continue;
      lanes[j].state = State::kRuns;
      lanes[j].participants = participants;
      std::memcpy(lanes[j].shown, lanes[j].slot, kSlotBytes);
    }
  }
  return released;
}

/// Lets all threads go if every one that has not ended waits at the same barrier.
inline bool release_block() {
  const Thread* first = nullptr;
  machine.votes = machine.votes_for = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    const Thread& t = machine.threads[i];
    if (t.state == State::kEnded) continue;
    if (t.state != State::kWaitsForBlock) return false;
    if (first == nullptr) first = &t;
    if (t.place.line != first->place.line || t.what != first->what) fail_with_states("a divergent barrier");
    ++machine.votes;
    machine.votes_for += t.vote != 0;
  }
  const auto waits = [](const Thread& t) { return t.state == State::kWaitsForBlock; };
  meet(machine.threads, machine.count, waits);
  for (unsigned i = 0; i < machine.count; ++i) {
    if (waits(machine.threads[i])) machine.threads[i].state = State::kRuns;
  }
  return first != nullptr;
}

/// Lets the threads go that wait at a named barrier, if as many have come as it expects; true if there were any.
inline bool release_named() {
  bool released = false;
  for (unsigned id = 0; id < kNamedBarriers; ++id) {
    const auto waits = [=](const Thread& t) { return t.state == State::kWaitsForNamed && t.id == id; };
    unsigned arrived = 0, expected = 0;
    for (unsigned i = 0; i < machine.count; ++i) {
      const Thread& t = machine.threads[i];
      if (!waits(t)) continue;
      if (++arrived > 1 && t.expected != expected) fail_with_states("a named barrier for two numbers of threads");
      expected = t.expected;
    }
    if (arrived == 0 || arrived < expected) continue;
    if (arrived > expected) fail_with_states("more threads at a named barrier than it expects");
    meet(machine.threads, machine.count, waits);
    for (unsigned i = 0; i < machine.count; ++i) {
      if (waits(machine.threads[i])) machine.threads[i].state = State::kRuns;
    }
    released = true;
  }
  return released;
}

/// Runs a warp until it waits for the block or has ended; true if any of its lanes ran.
inline bool run_warp(Thread* lanes, unsigned count) {
  bool progress = false;
  do {
    for (unsigned i = 0; i < count; ++i) {
      Thread& thread = lanes[machine.descending ? count - 1 - i : i];
      if (thread.state != State::kRuns) continue;
      progress = true;
      resume(thread);
    }
  } while (release_warp(lanes, count));
  return progress;
}

/// Runs one block to its end. Each warp runs as far ahead of the others as barriers let it, so that a missing one
/// shows.
inline void run_block() {
  const unsigned warps = (machine.count + kWarp - 1) / kWarp;
  for (;;) {
    bool progress = false;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned first = (machine.descending ? warps - 1 - i : i) * kWarp;
      progress = run_warp(&machine.threads[first], std::min(machine.count - first, kWarp)) || progress;
    }
    unsigned ended = 0;
    for (unsigned i = 0; i < machine.count; ++i) ended += machine.threads[i].state == State::kEnded;
    if (ended == machine.count) return;
    progress = release_named() || release_block() || progress;
    if (!progress) fail_with_states("deadlock: a divergent barrier or warp intrinsic");
  }
}

}  // namespace emu
