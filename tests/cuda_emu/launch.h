// Launching a kernel: what a GPU would refuse, shared memory, and the blocks one after another.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "devices.h"
#include "fibers.h"

// shared_pages.ld names the ends of the section of __shared__ variables.
extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emu {

inline constexpr size_t kSharedBytesByDefault = 48 * 1024;  // dynamic and static
inline constexpr int kPoison = 0xFF;                        // NaN in all floating types

/// Bytes of dynamic shared memory that cudaFuncSetAttribute allowed a kernel.
inline std::map<std::pair<const void*, int>, size_t> allowed_shared_bytes;  // by kernel and device

/// Dynamic shared memory that ends where a page without access begins.
class DynamicShared {
 public:
  DynamicShared() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), size_((kMostSharedBytes / page_ + 2) * page_) {
    void* memory = mmap(nullptr, size_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap failed");
    begin_ = static_cast<unsigned char*>(memory) + page_;
    mprotect(begin_, size_, PROT_READ | PROT_WRITE);
  }
  DynamicShared(const DynamicShared&) = delete;
  ~DynamicShared() { munmap(begin_ - page_, size_ + 2 * page_); }

  /// Its start, aligned to 16 bytes; the bytes in it and shortly before it are poison.
  unsigned char* prepare(size_t bytes) const {
    unsigned char* start = begin_ + size_ - (bytes + 15) / 16 * 16;
    const size_t pages = (bytes + kMargin + page_ - 1) / page_ * page_;
    if (!order::renew(begin_ + size_ - pages, pages)) fail("mmap failed");
    std::memset(start - kMargin, kPoison, bytes + kMargin);
    return start;
  }
  /// Whether something was written shortly before the start.
  bool underrun(const unsigned char* start) const {
    return std::any_of(start - kMargin, start, [](unsigned char byte) { return byte != kPoison; });
  }
  bool guards(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return (p >= begin_ + size_ && p < begin_ + size_ + page_) || (p >= begin_ - page_ && p < begin_);
  }

 private:
  static constexpr size_t kMargin = 1024;
  size_t page_, size_;
  unsigned char* begin_;
};

inline const DynamicShared& dynamic_shared() {
  static const DynamicShared memory;
  return memory;
}

/// While it lives, a fault in the guard page names itself; other faults go where they went before.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &before());
  }
  FaultHandler(const FaultHandler&) = delete;
  ~FaultHandler() { sigaction(SIGSEGV, &before(), nullptr); }

 private:
  static struct sigaction& before() {
    static struct sigaction action;
    return action;
  }
  static void handle(int, siginfo_t* info, void*) {
    if (dynamic_shared().guards(info->si_addr)) fail("an access outside dynamic shared memory");
    sigaction(SIGSEGV, &before(), nullptr);  // the instruction faults again
  }
};

/// The error that a GPU gives before it runs anything.
inline cudaError_t launch_error(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7FFFFFFFu || grid.y > 0xFFFFu || grid.z > 0xFFFFu) return cudaErrorInvalidConfiguration;
  const auto allowed = allowed_shared_bytes.find({kernel, current_device});
  const size_t limit = allowed == allowed_shared_bytes.end() ? kSharedBytesByDefault : allowed->second;
  return shared_bytes > std::min(limit, kSharedBytes[current_device]) ? cudaErrorInvalidValue : cudaSuccess;
}

inline bool environment_is(const char* name, const char* value) {
  const char* found = std::getenv(name);
  return found != nullptr && std::strcmp(found, value) == 0;
}

/// FILE:LINE of the barrier or fence that is to order nothing.
inline Place without_from_environment() {
  static std::string file;
  const char* const found = std::getenv("PEARL_EMU_WITHOUT");
  const char* const colon = found == nullptr ? nullptr : std::strrchr(found, ':');
  if (colon == nullptr) return {"", 0};
  file.assign(found, colon);
  return {file.c_str(), std::atoi(colon + 1)};
}

inline void prepare_fiber(Fiber& fiber) {
  if (fiber.context.stack) return;
  fiber.context.stack.reset(new char[kStackBytes]);
  fiber.watched = order::create_fiber();
}

/// The threads of the machine's block, and fibers for them: where accesses are watched, others than the block's before.
inline void prepare_threads(uint64_t block) {
  if (machine.threads == nullptr) {
    machine.threads = new Thread[kMaxThreads]();
    machine.fibers = new Fiber[kMaxThreads]();
  }
  const uint64_t first = order::kWatches ? block * machine.count : 0;
  const dim3 b = machine.block;
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& t = machine.threads[i];
    t.fiber = &machine.fibers[(first + i) % kMaxThreads];
    prepare_fiber(*t.fiber);
    t.state = State::kRuns;
    t.number = i;
    t.index = make_uint3(i % b.x, i / b.x % b.y, i / (b.x * b.y));
    t.async_groups.clear();
    t.async_open.clear();
    t.fenced = nullptr;
    t.observed.clear();
    if (!order::kWatches) continue;
    char name[64];
    std::snprintf(name, sizeof(name), "block (%u, %u, %u), thread %u", machine.block_index.x, machine.block_index.y,
                  machine.block_index.z, i);
    order::name_fiber(t.fiber->watched, name);
  }
}

/// Says to all of the block's fibers what is before it, or to what follows the launch what they did.
inline void as_each_thread(void (*act)(void*), void* order) {
  if (!order::kWatches) return;
  order::Fiber fibers[2 * kMaxThreads];
  unsigned count = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    const Fiber& fiber = *machine.threads[i].fiber;
    fibers[count++] = fiber.watched;
    if (fiber.copier != nullptr) fibers[count++] = fiber.copier;
  }
  as_each(fibers, count, act, order);
}

/// Shared memory as a block finds it. What atomics told of there was another block's.
inline void prepare_shared(size_t shared_bytes) {
  machine.dynamic_shared = dynamic_shared().prepare(shared_bytes);
  unsigned char* const begin = __start_emu_shared;
  unsigned char* const end = __stop_emu_shared;
  if (begin != end) {
    if (!order::renew(begin, end - begin)) fail("__shared__ variables do not fill whole pages");
    std::memset(begin, kPoison, end - begin);
  }
  for (auto it = machine.published.begin(); it != machine.published.end();) {
    const auto* const p = static_cast<const unsigned char*>(it->first);
    const bool inside =
        (p >= begin && p < end) || (p >= machine.dynamic_shared && p < machine.dynamic_shared + shared_bytes);
    it = inside ? machine.published.erase(it) : std::next(it);
  }
}

inline void run_blocks(size_t shared_bytes) {
  const dim3 grid = machine.grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = machine.descending ? blocks - 1 - i : i;
    machine.block_index = make_uint3(b % grid.x, b / grid.x % grid.y, b / (uint64_t{grid.x} * grid.y));
    prepare_shared(shared_bytes);
    prepare_threads(i);
    as_each_thread(order::acquire, machine.launched);
    run_block();
    as_each_thread(order::release, machine.ended);
    if (dynamic_shared().underrun(machine.dynamic_shared)) fail("a write before dynamic shared memory");
  }
}

inline cudaError_t launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                          std::function<void()> body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (const cudaError_t error = launch_error(kernel, grid, block, shared_bytes); error != cudaSuccess) {
    return failed(error);
  }
  devices.used[current_device] = true;
  const FaultHandler handler;
  const order::Unwatched unwatched;
  machine.kernel = name;
  machine.grid = grid;
  machine.block = block;
  machine.count = block.x * block.y * block.z;
  machine.body = std::move(body);
  machine.descending = environment_is("PEARL_EMU_ORDER", "descending");
  machine.async_early = environment_is("PEARL_EMU_ASYNC", "early");
  machine.without = without_from_environment();
  machine.watched_scheduler = order::current_fiber();
  machine.published.clear();
  machine.orders_made = 0;
  machine.launched = make_order();
  machine.ended = make_order();
  if (order::kWatches && 2 * machine.count > kMaxThreads) fail("a block without fibers of its own");
  order::release(machine.launched);
  run_blocks(shared_bytes);
  order::acquire(machine.ended);
  return cudaSuccess;
}

}  // namespace emu
