#include "cpu/thread_pool.h"

#include <unistd.h>

#include <chrono>

namespace pearl {
namespace {

using Clock = std::chrono::steady_clock;

/// Longer than the serial part between two stages and than the spread of a stage's last pieces, shorter than what the
/// kernel charges for sleeping and waking.
constexpr std::chrono::microseconds kSpin{5};
constexpr int kPausesPerLook = 16;  // the clock costs as much as several pauses

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Whether done() came true within kSpin.
template <class Done>
bool spin_until(Done done) {
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

}  // namespace

ThreadPool::ThreadPool(int64_t threads) : shares_(static_cast<size_t>(threads)), process_(getpid()) {
  try {
    for (int64_t i = 1; i < threads; ++i) threads_->helpers.emplace_back([this, i] { help(i); });
  } catch (...) {  // the system has no more threads
    close();
    throw;
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() == process_) {
    close();
  } else {
    threads_.release();
  }
}

void ThreadPool::close() {
  {
    const std::lock_guard<std::mutex> lock(threads_->mutex);
    closed_ = true;
  }
  threads_->helper_wakes.notify_all();
  for (std::thread& helper : threads_->helpers) helper.join();
}

void ThreadPool::run_stage(const Stage& stage) {
  stage_ = stage;
  ended_.store(0, std::memory_order_relaxed);
  for (int64_t i = 0; i < threads(); ++i) {
    const uint64_t begin = i * stage.pieces / threads(), end = (i + 1) * stage.pieces / threads();
    shares_[i].bounds.store(begin | end << 32, std::memory_order_release);
  }
  stages_.fetch_add(1);
  if (sleeping_helpers_ > 0) {
    {
      const std::lock_guard<std::mutex> lock(threads_->mutex);
    }
    threads_->helper_wakes.notify_all();
  }
  work(0);
  wait_for_pieces(stage.pieces);
}

/// Does pieces until all are taken.
void ThreadPool::work(int64_t thread) {
  for (int64_t i = 0; i < threads();) {
    int64_t piece;
    if (!take(shares_[(thread + i) % threads()], i == 0, piece)) {
      ++i;
      continue;
    }
    const Stage stage = stage_;  // stays as it is until this piece has ended
    stage.call(stage.work, {piece * stage.items / stage.pieces, (piece + 1) * stage.items / stage.pieces}, thread);
    if (ended_.fetch_add(1) + 1 == stage.pieces && caller_sleeps_) {
      {
        const std::lock_guard<std::mutex> lock(threads_->mutex);
      }
      threads_->caller_wakes.notify_one();
    }
  }
}

/// Takes the first piece of the thread's own share, or the last of another's; false if there is none.
bool ThreadPool::take(Share& share, bool own, int64_t& piece) {
  uint64_t bounds = share.bounds.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t begin = bounds & 0xFFFFFFFF, end = bounds >> 32;
    if (begin >= end) return false;
    const uint64_t rest = own ? (begin + 1) | end << 32 : begin | (end - 1) << 32;
    piece = static_cast<int64_t>(own ? begin : end - 1);
    if (share.bounds.compare_exchange_weak(bounds, rest, std::memory_order_acq_rel, std::memory_order_relaxed)) {
      return true;
    }
  }
}

void ThreadPool::wait_for_pieces(int64_t pieces) {
  const auto done = [&] { return ended_ == pieces; };
  if (spin_until(done)) return;
  std::unique_lock<std::mutex> lock(threads_->mutex);
  caller_sleeps_ = true;
  threads_->caller_wakes.wait(lock, done);
  caller_sleeps_ = false;
}

void ThreadPool::help(int64_t thread) {
  for (uint64_t seen = 0; wait_for_stage(seen);) work(thread);
}

/// Until there are other stages than `seen`, which becomes their number; false once the pool is closed.
bool ThreadPool::wait_for_stage(uint64_t& seen) {
  const auto changed = [&] { return stages_ != seen; };
  if (!spin_until(changed)) {
    std::unique_lock<std::mutex> lock(threads_->mutex);
    ++sleeping_helpers_;
    threads_->helper_wakes.wait(lock, [&] { return closed_ || changed(); });
    --sleeping_helpers_;
  }
  seen = stages_;
  return !closed_;
}

}  // namespace pearl
