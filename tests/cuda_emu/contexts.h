// Switching between the scheduler's stack and the fibers': setjmp and longjmp, which take no system call, or
// swapcontext, where ThreadSanitizer looks after the first two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <memory>

#include "memory_order.h"

namespace emu {

inline constexpr size_t kStackBytes = 256 * 1024;

/// Where a fiber goes on.
struct Context {
  std::unique_ptr<char[]> stack;
  bool started = false;
  jmp_buf here;  // without the sanitizer, once started
  ucontext_t user;
};

/// Where the scheduler goes on.
struct Scheduler {
  jmp_buf here;
  ucontext_t user;
};

PEARL_UNWATCHED inline void prepare(Context& context, void (*begin)()) {
  getcontext(&context.user);
  context.user.uc_stack.ss_sp = context.stack.get();
  context.user.uc_stack.ss_size = kStackBytes;
  context.user.uc_link = nullptr;
  makecontext(&context.user, begin, 0);
  context.started = true;
}

#ifdef __SANITIZE_THREAD__
PEARL_UNWATCHED inline void enter(Context& context, Scheduler& scheduler, void (*begin)()) {
  if (!context.started) prepare(context, begin);
  swapcontext(&scheduler.user, &context.user);
}
PEARL_UNWATCHED inline void leave(Context& context, Scheduler& scheduler) {
  swapcontext(&context.user, &scheduler.user);
}
#else
inline void enter(Context& context, Scheduler& scheduler, void (*begin)()) {
  if (_setjmp(scheduler.here) != 0) return;
  if (context.started) _longjmp(context.here, 1);
  prepare(context, begin);
  setcontext(&context.user);
}
inline void leave(Context& context, Scheduler& scheduler) {
  if (_setjmp(context.here) == 0) _longjmp(scheduler.here, 1);
}
#endif

}  // namespace emu
