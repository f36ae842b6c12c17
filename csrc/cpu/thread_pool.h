// The threads of one worker. They share a forward's stages, one after another; between forwards they sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "pearl/params.h"

namespace pearl {

/// The calling thread and `threads - 1` helpers. A stage is cut into pieces that lie in a row. Each thread works from
/// the start of its own share towards the end, because what it reads next is then already on its way from memory, and
/// takes from the ends of the others' shares when its own is done. So the caller never waits for a helper that sleeps
/// or has lost its core, only for pieces that have been begun. A helper that finds nothing to do spins for a few
/// microseconds, which is longer than the serial parts of a forward, then sleeps.
///
/// One thread at a time may call `run`.
class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int64_t threads() const { return static_cast<int64_t>(shares_.size()); }

  /// Calls work(range, thread) for [0, items) in at most `pieces` nearly equal parts; returns when all have ended. The
  /// threads' numbers begin with the caller's, 0. `work` must not throw.
  template <class Work>
  void run(int64_t items, int64_t pieces, const Work& work) {
    if (pieces > items) pieces = items;
    if (pieces <= 1 || threads() == 1) {
      if (items > 0) work(Range{0, items}, int64_t{0});
      return;
    }
    const auto call = [](const void* w, Range range, int64_t thread) { (*static_cast<const Work*>(w))(range, thread); };
    run_stage({call, &work, items, pieces});
  }

 private:
  struct Stage {
    void (*call)(const void* work, Range range, int64_t thread);
    const void* work;
    int64_t items, pieces;
  };

  /// Pieces of one thread that nobody has taken: the first in the lower half, the end in the upper one. Moving a bound
  /// is what takes a piece, so a helper that is late can only take what there is.
  struct alignas(64) Share {
    std::atomic<uint64_t> bounds{0};
  };

  void close();
  void run_stage(const Stage& stage);
  void work(int64_t thread);
  bool take(Share& share, bool own, int64_t& piece);
  void help(int64_t thread);
  bool wait_for_stage(uint64_t& seen);
  void wait_for_pieces(int64_t pieces);

  Stage stage_ = {};  // written by the caller while no piece is left, read by whoever has taken one
  std::vector<Share> shares_;
  alignas(64) std::atomic<uint64_t> stages_{0};  // so far
  alignas(64) std::atomic<int64_t> ended_{0};    // pieces of this stage

  // Who sleeps is counted before it looks again whether it may: a wake-up cannot be lost.
  alignas(64) std::atomic<int64_t> sleeping_helpers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::atomic<bool> closed_{false};

  /// What waits for helpers when it is destroyed. In a forked process they are not there: it is left as it is.
  struct Threads {
    std::mutex mutex;
    std::condition_variable helper_wakes, caller_wakes;
    std::vector<std::thread> helpers;
  };
  std::unique_ptr<Threads> threads_ = std::make_unique<Threads>();
  const int process_;
};

}  // namespace pearl
