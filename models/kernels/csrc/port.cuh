// What differs between nvcc and a plain C++ compiler. Everything else in this folder compiles with
// both: the tests run the same kernels and launchers on a CPU, one fiber per thread, with
// tests/emulation/emulation.h in the place of the CUDA headers.
#pragma once

#include <math.h>
#include <stdint.h>

#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ESP_DEVICE __device__ __forceinline__
#define ESP_HOST_DEVICE __host__ __device__ __forceinline__
#define ESP_KERNEL(threads) __global__ void __launch_bounds__(threads)
// With registers for at least `blocks` blocks on a multiprocessor.
#define ESP_KERNEL_RESIDENT(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A struct passed by value that is indexed at run time, without a copy of it in local memory.
#define ESP_GRID_CONSTANT const __grid_constant__
#define ESP_SHARED(type, name, dims) __shared__ type name dims
// `kernel` in parentheses where it has template arguments.
#define ESP_LAUNCH(kernel, grid, block, stream, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define ESP_STATUS() static_cast<int>(cudaGetLastError())
// The emulation checks that an access is aligned and inside a tensor; on a GPU compute-sanitizer does.
#define ESP_MAY_ACCESS(pointer, bytes) true

namespace esp {
using half = __half;
using bfloat16 = __nv_bfloat16;

ESP_DEVICE float to_float(float value) { return value; }
ESP_DEVICE float to_float(half value) { return __half2float(value); }
ESP_DEVICE float to_float(bfloat16 value) { return __bfloat162float(value); }
template <class T> ESP_DEVICE T from_float(float value);
template <> ESP_DEVICE float from_float<float>(float value) { return value; }
template <> ESP_DEVICE half from_float<half>(float value) { return __float2half_rn(value); }
template <> ESP_DEVICE bfloat16 from_float<bfloat16>(float value) { return __float2bfloat16_rn(value); }

// One instruction each; __expf and __fdividef add range handling that costs 4 to 8 more per element.
ESP_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ESP_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
}  // namespace esp

#else
#include "emulation.h"
#endif
