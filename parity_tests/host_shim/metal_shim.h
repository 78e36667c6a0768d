// The part of the Metal standard library that the kernels use, on the host (see lockstep.h for how threads run).
//
// With FLUX_ADDRESS_SPACES (clang, syntax check only) device, constant and threadgroup are real address spaces;
// otherwise they are erased. FLUX_THREADGROUP replaces declarations of threadgroup arrays.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>

#include "lockstep.h"

using uint = unsigned int;
using ushort = unsigned short;
using half = _Float16;
using float16_t = half;

#ifdef FLUX_ADDRESS_SPACES
using bfloat = __bf16;
#else
// Truncated float32, rounded to nearest even; arithmetic is float32.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  explicit bfloat(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = value != value ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
  }
  operator float() const {
    const uint32_t word = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};
#endif
using bfloat16_t = bfloat;

struct uint3 {
  uint x, y, z;
};

struct int3 {
  int x, y, z;
  explicit int3(uint3 u) : x(int(u.x)), y(int(u.y)), z(int(u.z)) {}
};

// The kernel parameters that Metal fills in, by the names of their attributes.
namespace attribute {
inline uint thread_index_in_simdgroup() { return lockstep::lane(); }
inline uint simdgroup_index_in_threadgroup() { return lockstep::tg.current / lockstep::kLanes; }
inline uint thread_index_in_threadgroup() { return lockstep::tg.current; }
inline uint3 threadgroup_position_in_grid() {
  return {lockstep::tg.position[0], lockstep::tg.position[1], lockstep::tg.position[2]};
}
inline uint3 threadgroups_per_grid() { return {lockstep::tg.groups[0], lockstep::tg.groups[1], lockstep::tg.groups[2]}; }
}  // namespace attribute

namespace metal {

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

template <typename T, int N>
struct vec {
  T values[N];
  T& operator[](int i) { return values[i]; }
  const T& operator[](int i) const { return values[i]; }
};

template <typename T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline float log2(float x) { return std::log2(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float tanh(float x) { return std::tanh(x); }
namespace fast {
inline float exp2(float x) { return std::exp2(x); }
}  // namespace fast

inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { lockstep::barrier(line); }

inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) {
  lockstep::meet(nullptr, "simdgroup_barrier", line, [](void**, uint32_t) {});
}

// Every lane brings a value and gets one; `combine(values, lanes, lane)` says which.
template <typename T, typename Combine>
inline T exchange(T value, const char* name, int line, Combine combine) {
  struct Slot {
    T in, out;
  } slot{value, value};
  lockstep::meet(&slot, name, line, [combine](void** slots, uint32_t lanes) {
    T values[lockstep::kLanes];
    for (uint32_t i = 0; i < lanes; i++) values[i] = ((Slot*)slots[i])->in;
    for (uint32_t i = 0; i < lanes; i++) ((Slot*)slots[i])->out = combine(values, lanes, i);
  });
  return slot.out;
}

template <typename T>
inline T simd_sum(T value, int line = __builtin_LINE()) {
  return exchange(value, "simd_sum", line, [](const T* values, uint32_t lanes, uint32_t) {
    T total = values[0];
    for (uint32_t i = 1; i < lanes; i++) total = total + values[i];
    return total;
  });
}

template <typename T>
inline T simd_max(T value, int line = __builtin_LINE()) {
  return exchange(value, "simd_max", line, [](const T* values, uint32_t lanes, uint32_t) {
    T top = values[0];
    for (uint32_t i = 1; i < lanes; i++) top = max(top, values[i]);
    return top;
  });
}

template <typename T>
inline T simd_shuffle_xor(T value, ushort mask, int line = __builtin_LINE()) {
  return exchange(value, "simd_shuffle_xor", line, [mask](const T* values, uint32_t lanes, uint32_t lane) {
    if ((lane ^ mask) >= lanes) lockstep::fail("metal_shim: simd_shuffle_xor reads a lane that does not exist");
    return values[lane ^ mask];
  });
}

// Lane l holds row (l/4 & 4) + (l/2) % 4, columns c and c + 1 with c = (l/4 & 2) * 2 + (l % 2) * 2.
struct MatrixLayout {
  int row[32], col[32];
  constexpr MatrixLayout() : row(), col() {
    for (int lane = 0; lane < 32; lane++) {
      const int quad = lane / 4;
      row[lane] = (quad & 4) + (lane / 2) % 4;
      col[lane] = (quad & 2) * 2 + (lane % 2) * 2;
    }
  }
};
inline constexpr MatrixLayout kMatrixLayout{};

template <typename T, int Rows, int Cols>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Cols == 8, "Metal has 8 x 8 matrices only");
  vec<T, 2> elements;
  simdgroup_matrix() : elements{{T(NAN), T(NAN)}} {}
  vec<T, 2>& thread_elements() { return elements; }
};

template <typename T, int Rows, int Cols>
inline simdgroup_matrix<T, Rows, Cols> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Cols> matrix;
  matrix.elements[0] = matrix.elements[1] = value;
  return matrix;
}

template <typename T>
using Matrix8x8 = simdgroup_matrix<T, 8, 8>;

// d = a b + c, in float32.
template <typename D, typename A, typename B, typename C>
inline void simdgroup_multiply_accumulate(
    Matrix8x8<D>& d, Matrix8x8<A> a, Matrix8x8<B> b, Matrix8x8<C> c, int line = __builtin_LINE()) {
  struct Slot {
    vec<D, 2>* d;
    float a[2], b[2], c[2];
  } slot{&d.elements, {a.elements[0], a.elements[1]}, {b.elements[0], b.elements[1]}, {c.elements[0], c.elements[1]}};
  lockstep::meet(&slot, "simdgroup_multiply_accumulate", line, [](void** slots, uint32_t lanes) {
    if (lanes != lockstep::kLanes) lockstep::fail("metal_shim: a matrix operation in a partial SIMD-group");
    float left[8][8], right[8][8], sum[8][8];
    for (int lane = 0; lane < 32; lane++) {
      const Slot& slot = *(Slot*)slots[lane];
      const int row = kMatrixLayout.row[lane], col = kMatrixLayout.col[lane];
      for (int e = 0; e < 2; e++) {
        left[row][col + e] = slot.a[e];
        right[row][col + e] = slot.b[e];
        sum[row][col + e] = slot.c[e];
      }
    }
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++) sum[i][j] += left[i][k] * right[k][j];
    for (int lane = 0; lane < 32; lane++)
      for (int e = 0; e < 2; e++)
        (*((Slot*)slots[lane])->d)[e] = D(sum[kMatrixLayout.row[lane]][kMatrixLayout.col[lane] + e]);
  });
}

}  // namespace metal

using namespace metal;

#define METAL_FUNC inline
#define thread
#ifdef FLUX_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define FLUX_THREADGROUP(type, name, count) static __attribute__((address_space(3))) type name[count]
#else
#define device
#define constant
#define threadgroup
#define FLUX_THREADGROUP(type, name, count) type* name = lockstep::threadgroup_array<type>(count, __LINE__)
#endif
