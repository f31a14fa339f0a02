// Shared by all kernels: element types by code, vector access, reductions within a warp.
//
// C ABI of every launcher: pointers, int64_t and double only, the stream last; returns 0, a CUDA
// error (> 0) or one of the codes below (< 0). Nothing here allocates, waits or reads the device,
// so every launcher may be captured in a CUDA graph.
#pragma once

#include "port.cuh"

namespace esp {

enum Type : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum Failure : int { BAD_TYPE = -1, BAD_OPTION = -2, SMALL_WORKSPACE = -3, BAD_SHAPE = -4 };

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;

ESP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ESP_HOST_DEVICE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
ESP_HOST_DEVICE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// V elements that are read and written in one instruction of up to 16 bytes.
template <class T, int V> struct alignas(sizeof(T) * V) Vector {
  T value[V];
};

template <int V, class T> ESP_DEVICE Vector<T, V> load(const T* pointer) {
  if (!ESP_MAY_ACCESS(pointer, sizeof(T) * V)) return {};
  return *reinterpret_cast<const Vector<T, V>*>(pointer);
}

template <int V, class T> ESP_DEVICE void store(T* pointer, const Vector<T, V>& vector) {
  if (!ESP_MAY_ACCESS(pointer, sizeof(T) * V)) return;
  *reinterpret_cast<Vector<T, V>*>(pointer) = vector;
}

// One element of a small vector (bias, mask, gate) whose type is known at run time only: such
// vectors are read outside the loops, where a branch costs less than more instances of the kernel.
ESP_DEVICE float load_typed(const void* pointer, int64_t type, int64_t index) {
  if (type == FLOAT32) return load<1>(static_cast<const float*>(pointer) + index).value[0];
  if (type == FLOAT16) return to_float(load<1>(static_cast<const half*>(pointer) + index).value[0]);
  return to_float(load<1>(static_cast<const bfloat16*>(pointer) + index).value[0]);
}

ESP_DEVICE void store_typed(void* pointer, int64_t type, int64_t index, float value) {
  if (type == FLOAT32) {
    store<1>(static_cast<float*>(pointer) + index, Vector<float, 1>{{value}});
  } else if (type == FLOAT16) {
    store<1>(static_cast<half*>(pointer) + index, Vector<half, 1>{{from_float<half>(value)}});
  } else {
    store<1>(static_cast<bfloat16*>(pointer) + index,
             Vector<bfloat16, 1>{{from_float<bfloat16>(value)}});
  }
}

// Sum over the 32 lanes, the same bits in every lane and every run.
template <class T> ESP_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(FULL, value, offset);
  }
  return value;
}

// Host side: whether every row of a matrix can be read V elements at a time.
inline bool rows_aligned(const void* base, int64_t row_stride, int64_t element_bytes, int64_t width) {
  int64_t bytes = width * element_bytes;
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && row_stride % width == 0;
}

// Calls `body(T())` with the element type of a code; `body` is a generic lambda that returns int.
template <class Body> int with_type(int64_t type, Body body) {
  switch (type) {
    case FLOAT32: return body(float());
    case FLOAT16: return body(half());
    case BFLOAT16: return body(bfloat16());
    default: return BAD_TYPE;
  }
}

}  // namespace esp
