// The threads of a block as fibers, and their waiting for each other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emu {

inline constexpr unsigned kWarp = 32, kMaxThreads = 1024;
inline constexpr size_t kStackBytes = 256 * 1024, kSlotBytes = 64;

enum class State { kRuns, kWaitsForBlock, kWaitsForWarp, kEnded };

struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
  size_t bytes;
};

struct Thread {
  std::unique_ptr<char[]> stack;
  bool started = false;
  jmp_buf here;  // where it goes on, once started
  ucontext_t start;
  State state;
  uint3 index;
  unsigned number;                                   // in the block
  const char* what;                                  // while it waits: the intrinsic,
  int line;                                          // the line of a barrier,
  unsigned mask;                                     // the lanes of a warp intrinsic
  unsigned participants;                             // of the last warp intrinsic: the mask's lanes that had not ended
  int vote;                                          // handed over at a barrier
  alignas(16) unsigned char slot[kSlotBytes];        // what it hands over at a warp intrinsic
  alignas(16) unsigned char shown[kSlotBytes];       // the same, kept until the next is complete: what other lanes read
  std::vector<std::vector<AsyncCopy>> async_groups;  // committed, not waited for
  std::vector<AsyncCopy> async_open;

  unsigned lane() const { return number % kWarp; }
};

/// One GPU that runs one block at a time.
struct Machine {
  const char* kernel = "";
  dim3 grid, block;
  uint3 block_index;
  unsigned char* dynamic_shared = nullptr;
  std::function<void()> body;
  std::vector<Thread> threads;
  unsigned count = 0;  // threads of the block
  Thread* current = nullptr;
  jmp_buf scheduler;
  int votes_for = 0, votes = 0;  // of the last barrier
  bool descending = false, async_early = false;
  cudaError_t last_error = cudaSuccess;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_emu: %s, block (%u, %u, %u): %s\n", machine.kernel, machine.block_index.x,
               machine.block_index.y, machine.block_index.z, message);
  std::abort();
}

/// Gives control back to the scheduler until the current thread may run again.
__attribute__((noinline)) inline void pause(State state) {
  machine.current->state = state;
  if (_setjmp(machine.current->here) == 0) _longjmp(machine.scheduler, 1);
}

/// A fiber runs every block's thread of its number.
inline void fiber_main() {
  for (;;) {
    machine.body();
    pause(State::kEnded);
  }
}

__attribute__((noinline)) inline void resume(Thread& thread) {
  machine.current = &thread;
  if (_setjmp(machine.scheduler) != 0) return;
  if (thread.started) _longjmp(thread.here, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack.get();
  thread.start.uc_stack.ss_size = kStackBytes;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, fiber_main, 0);
  setcontext(&thread.start);
}

/// Prints where the threads are, and aborts.
[[noreturn]] inline void fail_with_states(const char* message) {
  std::fprintf(stderr, "cuda_emu: the threads of the block:\n");
  for (unsigned i = 0, end; i < machine.count; i = end) {
    const Thread& t = machine.threads[i];
    const auto same = [&](const Thread& u) {
      return t.state == u.state && (t.state == State::kEnded || (t.what == u.what && t.line == u.line));
    };
    for (end = i + 1; end < machine.count && same(machine.threads[end]);) ++end;
    std::fprintf(stderr, "  %u to %u ", i, end - 1);
    if (t.state == State::kEnded) std::fprintf(stderr, "have ended\n");
    if (t.state == State::kWaitsForBlock) std::fprintf(stderr, "wait in %s, line %d\n", t.what, t.line);
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
    if (t.line != first->line || t.what != first->what) fail_with_states("a divergent barrier");
    ++machine.votes;
    machine.votes_for += t.vote != 0;
  }
  for (unsigned i = 0; i < machine.count; ++i) {
    if (machine.threads[i].state == State::kWaitsForBlock) machine.threads[i].state = State::kRuns;
  }
  return first != nullptr;
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
    progress = release_block() || progress;
    if (!progress) fail_with_states("deadlock: a divergent barrier or warp intrinsic");
  }
}

}  // namespace emu
