// What a GPU's memory model orders, told to ThreadSanitizer (-fsanitize=thread). In other builds all of this is empty.
//
// A thread of a block is a fiber of the sanitizer, and switching to one orders nothing. So two accesses of which one
// writes are a race, and reported, unless one of these lies between them:
//   barriers            of a block, a warp's mask or a named one: among the threads that meet there
//   fences and atomics  what came before a fence and an atomic behind it, to what follows an atomic that saw its value
//                       and a fence behind that; without fences atomics order nothing, but do not race with each other
//   cp.async            writes between being issued and being waited for, and only by the thread that waits
//   kernels             the start and end of a launch
// Shuffles, votes and matrix loads order nothing. The blocks of a grid are concurrent, although they run one after
// another: only atomics and fences order them. (A fiber serves one block in two or more, which hides a race between
// blocks that far apart.) Shared memory is another block's each time.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_THREAD__
#include <sys/mman.h>

extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_set_fiber_name(void* fiber, const char* name);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

// Volatile accesses are relaxed atomic ones (PTX ISA, "ld.volatile"); g++ calls these before it makes them.
extern "C" {
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int order);
unsigned short __tsan_atomic16_load(const volatile unsigned short* address, int order);
unsigned __tsan_atomic32_load(const volatile unsigned* address, int order);
unsigned long __tsan_atomic64_load(const volatile unsigned long* address, int order);
#define PEARL_VOLATILE(bytes, Type, bits)                                                               \
  __attribute__((used, weak)) inline void __tsan_volatile_read##bytes(void* address) {                  \
    static_cast<void>(__tsan_atomic##bits##_load(static_cast<const Type*>(address), __ATOMIC_RELAXED)); \
  }
PEARL_VOLATILE(1, unsigned char, 8)
PEARL_VOLATILE(2, unsigned short, 16)
PEARL_VOLATILE(4, unsigned, 32)
PEARL_VOLATILE(8, unsigned long, 64)
#undef PEARL_VOLATILE
}

/// A function whose own accesses are not looked at.
#define PEARL_UNWATCHED __attribute__((no_sanitize_thread))

namespace emu::order {

inline constexpr bool kWatches = true;
using Fiber = void*;

inline Fiber current_fiber() { return __tsan_get_current_fiber(); }
inline Fiber create_fiber() { return __tsan_create_fiber(0); }
PEARL_UNWATCHED inline void switch_to(Fiber fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void name_fiber(Fiber fiber, const char* name) { __tsan_set_fiber_name(fiber, name); }
PEARL_UNWATCHED inline void release(void* order) { __tsan_release(order); }
PEARL_UNWATCHED inline void acquire(void* order) { __tsan_acquire(order); }
PEARL_UNWATCHED inline void reads(const void* address, size_t bytes) {
  __tsan_read_range(const_cast<void*>(address), bytes);
}
PEARL_UNWATCHED inline void writes(void* address, size_t bytes) { __tsan_write_range(address, bytes); }

/// While it lives, the current fiber's accesses are not looked at.
class Unwatched {
 public:
  PEARL_UNWATCHED Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  Unwatched(const Unwatched&) = delete;
  PEARL_UNWATCHED ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};

/// Pages whose earlier accesses nobody remembers; their contents are lost.
inline bool renew(void* pages, size_t bytes) {
  return mmap(pages, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == pages;
}

}  // namespace emu::order

#else

#define PEARL_UNWATCHED

namespace emu::order {

inline constexpr bool kWatches = false;
using Fiber = void*;

inline Fiber current_fiber() { return nullptr; }
inline Fiber create_fiber() { return nullptr; }
inline void switch_to(Fiber) {}
inline void name_fiber(Fiber, const char*) {}
inline void release(void*) {}
inline void acquire(void*) {}
inline void reads(const void*, size_t) {}
inline void writes(void*, size_t) {}
struct Unwatched {
  Unwatched() {}
};
inline bool renew(void*, size_t) { return true; }

}  // namespace emu::order
#endif
