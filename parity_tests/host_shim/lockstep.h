// Runs one threadgroup of a Metal kernel on the host: a fiber a thread, 32 fibers a SIMD-group.
//
// A fiber runs until it waits: at a SIMD operation for the other lanes of its SIMD-group, at a threadgroup barrier for
// every thread. Which fiber goes on is the schedule: a race that one schedule hides, another shows. Lanes that meet at
// different operations, a barrier that some thread never reaches and more than 32 KB of threadgroup memory are errors.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define LOCKSTEP_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LOCKSTEP_ASAN 1
#endif
#endif
#ifdef LOCKSTEP_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

// lockstep_switch(&saved_stack_pointer, stack_pointer): save the callee-saved registers here, restore them there.
extern "C" void lockstep_switch(void** save, void* restore);
#if defined(__x86_64__)
__asm__(
    ".text\n.type lockstep_switch,@function\nlockstep_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#elif defined(__aarch64__)
__asm__(
    ".text\n.type lockstep_switch,%function\nlockstep_switch:\n"
    "sub sp,sp,#160\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
    "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\n"
    "stp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\nmov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\n"
    "ldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\n"
    "ldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\nadd sp,sp,#160\nret\n");
#else
#error "lockstep.h knows the context switch of x86-64 and of aarch64 only"
#endif

namespace lockstep {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kThreadgroupBytes = 32768;
#ifdef LOCKSTEP_ASAN
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

// fair: SIMD-groups take turns, operation by operation. ahead, behind: the first (last) SIMD-group that can go on runs
// until it waits for the others, lanes ascending (descending; threadgroups too). shuffled: random at every choice,
// threadgroups in random order.
enum class Schedule : uint32_t { fair, ahead, behind, shuffled };

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::fflush(stderr);
  _exit(3);
}

// `bytes` that end where an unmapped page begins, filled with `fill`: a read or write past the end is a fault.
inline void* guarded_alloc(size_t bytes, int fill) {
#ifdef LOCKSTEP_ASAN
  void* block = std::malloc(bytes);
  std::memset(block, fill, bytes);
  return block;
#else
  const size_t page = sysconf(_SC_PAGESIZE);
  const size_t body = (bytes + page - 1) / page * page;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  char* base = (char*)mmap(nullptr, body + 2 * page, PROT_NONE, flags, -1, 0);
  if (base == MAP_FAILED || mprotect(base + page, body, PROT_READ | PROT_WRITE)) fail("lockstep: out of memory");
  std::memset(base + page, fill, body);
  return base + page + body - bytes;
#endif
}

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  const char* waits_for = nullptr;
  int line = 0;
};

struct SimdGroup {
  uint32_t width = 0, ready = 0, arrived = 0;
  const char* operation = nullptr;
  int line = 0;
  void* slots[kLanes];
  uint32_t all() const { return width == kLanes ? ~0u : (1u << width) - 1; }
};

struct Scratch {
  int line;
  size_t bytes;
  void* data;
};

struct Threadgroup {
  uint32_t threads = 0, position[3], groups[3];
  Schedule schedule = Schedule::fair;
  uint64_t random = 1;
  void (*kernel)() = nullptr;
  Fiber fibers[kMaxThreads];
  std::vector<SimdGroup> simd;
  std::vector<Scratch> scratch;
  size_t scratch_bytes = 0;
  uint32_t current = 0, at_barrier = 0, done = 0;
  int barrier_line = 0;
  void* main_stack_pointer = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void* main_fake_stack = nullptr;
};

inline Threadgroup tg;

inline uint32_t lane() { return tg.current % kLanes; }
inline SimdGroup& group() { return tg.simd[tg.current / kLanes]; }

inline uint32_t draw(uint32_t below) {
  tg.random = tg.random * 6364136223846793005ull + 1442695040888963407ull;
  return (uint32_t)((tg.random >> 33) % below);
}

[[noreturn]] inline void fail_waiting() {
  std::fprintf(stderr, "lockstep: deadlock in threadgroup (%u, %u, %u): ", tg.position[0], tg.position[1], tg.position[2]);
  for (uint32_t i = 0; i < tg.threads; i++) {
    const Fiber &fiber = tg.fibers[i], &before = tg.fibers[i ? i - 1 : 0];
    if (i == 0 || fiber.waits_for != before.waits_for || fiber.line != before.line)
      std::fprintf(stderr, "thread %u %s line %d; ", i, fiber.waits_for ? fiber.waits_for : "finished", fiber.line);
  }
  fail("");
}

// The SIMD-group that goes on: its index, or -1 if none can.
inline int choose_group(bool keep_current) {
  const int n = (int)tg.simd.size(), own = (int)(tg.current / kLanes);
  if (keep_current && tg.simd[own].ready && tg.schedule != Schedule::shuffled) return own;
  const int start = tg.schedule == Schedule::fair ? own + 1 : tg.schedule == Schedule::shuffled ? (int)draw(n) : 0;
  for (int i = 0; i < n; i++) {
    const int candidate = tg.schedule == Schedule::behind ? n - 1 - i : (start + i) % n;
    if (tg.simd[candidate].ready) return candidate;
  }
  return -1;
}

inline uint32_t choose_lane(uint32_t ready) {
  if (tg.schedule == Schedule::behind) return 31 - __builtin_clz(ready);
  if (tg.schedule != Schedule::shuffled) return __builtin_ctz(ready);
  for (uint32_t skip = draw(__builtin_popcount(ready)); skip; skip--) ready &= ready - 1;
  return __builtin_ctz(ready);
}

// Stack switches, told to AddressSanitizer.
inline void switch_stacks(void** save, void* restore, void** fake, const void* bottom, size_t bytes) {
#ifdef LOCKSTEP_ASAN
  __sanitizer_start_switch_fiber(fake, bottom, bytes);
#endif
  lockstep_switch(save, restore);
#ifdef LOCKSTEP_ASAN
  __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#endif
  (void)fake, (void)bottom, (void)bytes;
}

inline void resume_another(bool keep_current) {
  const int next_group = choose_group(keep_current);
  Fiber& me = tg.fibers[tg.current];
  if (next_group < 0) {
    if (tg.done != tg.threads) fail_waiting();
    switch_stacks(&me.stack_pointer, tg.main_stack_pointer, &me.fake_stack, tg.main_stack, tg.main_stack_bytes);
    return;
  }
  const uint32_t next = next_group * kLanes + choose_lane(tg.simd[next_group].ready);
  if (next == tg.current) return;
  tg.current = next;
  Fiber& other = tg.fibers[next];
  switch_stacks(&me.stack_pointer, other.stack_pointer, &me.fake_stack, other.stack, kStackBytes);
}

// All lanes of the SIMD-group bring a slot; the last to come applies `operation(slots, lanes)` for all of them.
template <typename Operation>
inline void meet(void* slot, const char* name, int line, Operation operation) {
  SimdGroup& simd = group();
  if (simd.arrived == 0) {
    simd.operation = name, simd.line = line;
  } else if (simd.line != line || std::strcmp(simd.operation, name) != 0) {
    std::fprintf(stderr, "lockstep: lanes diverge: %s line %d and %s line %d\n", simd.operation, simd.line, name, line);
    fail("");
  }
  simd.slots[lane()] = slot;
  if (++simd.arrived == simd.width) {
    simd.arrived = 0;
    operation(simd.slots, simd.width);
    simd.ready = simd.all();
    if (tg.schedule == Schedule::fair || tg.schedule == Schedule::shuffled) resume_another(false);
    return;
  }
  Fiber& me = tg.fibers[tg.current];
  me.waits_for = name, me.line = line;
  simd.ready &= ~(1u << lane());
  resume_another(true);
}

inline void barrier(int line) {
  if (tg.at_barrier == 0) tg.barrier_line = line;
  if (tg.barrier_line != line) {
    std::fprintf(stderr, "lockstep: divergent barrier: lines %d and %d\n", tg.barrier_line, line);
    fail("");
  }
  Fiber& me = tg.fibers[tg.current];
  me.waits_for = "threadgroup_barrier", me.line = line;
  group().ready &= ~(1u << lane());
  if (++tg.at_barrier == tg.threads) {
    tg.at_barrier = 0;
    for (SimdGroup& simd : tg.simd) simd.ready = simd.all();
  }
  resume_another(false);
}

// Threadgroup memory: one block for each declaration, told apart by its line; NaN in every threadgroup before use.
template <typename T>
inline T* threadgroup_array(size_t count, int line) {
  for (Scratch& block : tg.scratch)
    if (block.line == line) return (T*)block.data;
  const size_t bytes = count * sizeof(T);
  tg.scratch_bytes += (bytes + 15) / 16 * 16;
  if (tg.scratch_bytes > kThreadgroupBytes) fail("lockstep: more than 32768 bytes of threadgroup memory");
  tg.scratch.push_back({line, bytes, guarded_alloc(bytes, 0xff)});
  return (T*)tg.scratch.back().data;
}

inline void fiber_main() {
#ifdef LOCKSTEP_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (!tg.main_stack) tg.main_stack = bottom, tg.main_stack_bytes = bytes;
#endif
  tg.kernel();
  tg.fibers[tg.current].waits_for = nullptr, tg.fibers[tg.current].line = 0;
  group().ready &= ~(1u << lane());
  tg.done++;
  resume_another(true);
  fail("lockstep: a finished thread was resumed");
}

inline void prepare_fiber(Fiber& fiber) {
  if (!fiber.stack) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    fiber.stack = (char*)mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (fiber.stack == MAP_FAILED) fail("lockstep: out of memory");
  }
  void** top = (void**)(fiber.stack + kStackBytes);
#if defined(__x86_64__)
  *--top = nullptr;  // a return address: the stack is 16-byte aligned above it
  *--top = (void*)fiber_main;
  top -= 6;
#else
  top -= 20;
  top[11] = (void*)fiber_main;
#endif
  fiber.stack_pointer = top;
}

// Run every thread of one threadgroup to its end.
inline void run_threadgroup() {
  tg.simd.assign((tg.threads + kLanes - 1) / kLanes, SimdGroup());
  for (uint32_t i = 0; i < tg.simd.size(); i++) {
    tg.simd[i].width = i + 1 < tg.simd.size() || tg.threads % kLanes == 0 ? kLanes : tg.threads % kLanes;
    tg.simd[i].ready = tg.simd[i].all();
  }
  for (uint32_t i = 0; i < tg.threads; i++) prepare_fiber(tg.fibers[i]);
  for (Scratch& block : tg.scratch) std::memset(block.data, 0xff, block.bytes);
  tg.at_barrier = tg.done = tg.current = 0;
  const int first = choose_group(false);
  tg.current = first * kLanes + choose_lane(tg.simd[first].ready);
  Fiber& fiber = tg.fibers[tg.current];
  switch_stacks(&tg.main_stack_pointer, fiber.stack_pointer, &tg.main_fake_stack, fiber.stack, kStackBytes);
}

}  // namespace lockstep
