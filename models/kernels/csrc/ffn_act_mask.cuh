// Bias, activation and mask between the two products of a feed-forward layer.
//
//   mask last    h = x + b    y = f(h) z    dx = g z f'(h)    dz = sum_t g f(h)      db = sum_t dx
//   mask first   v = h z      y = f(v)      dx = g f'(v) z    dz = sum_t g f'(v) h   db = sum_t dx
//
// A thread owns V neighbouring columns, a warp 32 V, and a block's 8 warps stride over the rows of
// its share. Products and sums are fp32 in registers, so nothing overflows or is rounded between.
// The backward recomputes f from x instead of keeping it: 2 bytes an element less to hold.
#pragma once

#include "common.cuh"

namespace esp {

enum Activation : int { GELU = 0, GELU_TANH = 1, QUICK_GELU = 2 };

constexpr int FFN_WARPS = 8;
constexpr int FFN_THREADS = FFN_WARPS * WARP;

struct ValueAndSlope {
  float value, slope;
};

// f(x) and f'(x). A part that is not used costs nothing: everything is inlined.
template <int A> ESP_DEVICE ValueAndSlope activate(float x) {
  if (A == GELU) {
    // The normal distribution function from the exponential that its density needs anyway:
    // Abramowitz and Stegun 7.1.26, absolute error 1.5e-7. erff would leave the memory idle.
    float e = exp2_approx(-0.72134752f * x * x);  // exp(-x^2 / 2)
    float t = reciprocal_approx(fmaf(0.23164189f, fabsf(x), 1.0f));
    float series = fmaf(t, 1.061405429f, -1.453152027f);
    series = fmaf(t, series, 1.421413741f);
    series = fmaf(t, series, -0.284496736f);
    series = fmaf(t, series, 0.254829592f);
    float tail = 0.5f * t * e * series;
    float below = x >= 0.0f ? 1.0f - tail : tail;
    return {x * below, fmaf(x * 0.39894228f, e, below)};
  }
  if (A == GELU_TANH) {
    // (1 + tanh u) / 2 = sigmoid(2u)
    float square = x * x;
    float u = 0.79788456f * x * fmaf(0.044715f, square, 1.0f);
    float s = reciprocal_approx(1.0f + exp2_approx(-2.8853901f * u));
    float inner = 1.59576912f * fmaf(0.134145f, square, 1.0f);
    return {x * s, fmaf(x * s * (1.0f - s), inner, s)};
  }
  float s = reciprocal_approx(1.0f + exp2_approx(-2.4554670f * x));
  return {x * s, fmaf(1.702f * x * s, 1.0f - s, s)};
}

struct FfnShape {
  int64_t rows, columns, x_stride, gradient_stride;  // strides of rows, in elements
};

// Bias and mask may be null: 0 and 1.
struct FfnVectors {
  const void* bias;
  const void* mask;
  int64_t bias_type, mask_type;
};

template <int V>
ESP_DEVICE void load_vectors(const FfnVectors& from, int64_t column, float (&bias)[V], float (&mask)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    bias[i] = from.bias ? load_typed(from.bias, from.bias_type, column + i) : 0.0f;
    mask[i] = from.mask ? load_typed(from.mask, from.mask_type, column + i) : 1.0f;
  }
}

template <class T, int A, bool MASK_FIRST, int V>
ESP_KERNEL(FFN_THREADS) ffn_forward(const T* x, FfnVectors vectors, T* y, FfnShape shape) {
  int64_t column = (static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x) * V;
  if (column >= shape.columns) return;
  float bias[V], mask[V];
  load_vectors<V>(vectors, column, bias, mask);
  int64_t step = static_cast<int64_t>(gridDim.y) * FFN_WARPS;
#pragma unroll 4
  for (int64_t row = blockIdx.y * FFN_WARPS + threadIdx.y; row < shape.rows; row += step) {
    Vector<T, V> in = load<V>(x + row * shape.x_stride + column), out;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float h = to_float(in.value[i]) + bias[i];
      float result = MASK_FIRST ? activate<A>(h * mask[i]).value : activate<A>(h).value * mask[i];
      out.value[i] = from_float<T>(result);
    }
    store<V>(y + row * shape.columns + column, out);
  }
}

// dx, and the sums of dz and db over this block's rows: partial[blockIdx.y][2][columns].
template <class T, int A, bool MASK_FIRST, int V>
ESP_KERNEL_RESIDENT(FFN_THREADS, 4)
ffn_backward(const T* gradient, const T* x, FfnVectors vectors, T* dx, float* partial, FfnShape shape) {
  ESP_SHARED(float, sums, [2][FFN_WARPS][V][WARP]);
  int lane = threadIdx.x, warp = threadIdx.y;
  int64_t column = (static_cast<int64_t>(blockIdx.x) * WARP + lane) * V;
  bool inside = column < shape.columns;
  float bias[V], mask[V], dmask[V] = {}, dbias[V] = {};
  if (inside) {
    load_vectors<V>(vectors, column, bias, mask);
    int64_t step = static_cast<int64_t>(gridDim.y) * FFN_WARPS;
#pragma unroll 2
    for (int64_t row = blockIdx.y * FFN_WARPS + warp; row < shape.rows; row += step) {
      Vector<T, V> g = load<V>(gradient + row * shape.gradient_stride + column);
      Vector<T, V> in = load<V>(x + row * shape.x_stride + column), out;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float h = to_float(in.value[i]) + bias[i], up = to_float(g.value[i]), down;
        ValueAndSlope f = activate<A>(MASK_FIRST ? h * mask[i] : h);
        if (MASK_FIRST) {
          dmask[i] = fmaf(up * f.slope, h, dmask[i]);
        } else {
          dmask[i] = fmaf(up, f.value, dmask[i]);
        }
        down = up * f.slope * mask[i];
        dbias[i] += down;
        out.value[i] = from_float<T>(down);
      }
      store<V>(dx + row * shape.columns + column, out);
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    sums[0][warp][i][lane] = dmask[i];
    sums[1][warp][i][lane] = dbias[i];
  }
  __syncthreads();
  // Warp w adds up the columns w, w + 8, ... of the 2 V that each lane owns, always in one order.
  for (int k = warp; k < 2 * V; k += FFN_WARPS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < FFN_WARPS; ++w) sum += sums[k / V][w][k % V][lane];
    if (inside) {
      int64_t at = (static_cast<int64_t>(blockIdx.y) * 2 + k / V) * shape.columns + column + k % V;
      store<1>(partial + at, Vector<float, 1>{{sum}});
    }
  }
}

// Second stage: sums over the chunks, in one order. blockIdx.y 0 is dz, 1 is db; null: not wanted.
struct FfnSums {
  void* mask;
  void* bias;
  int64_t mask_type, bias_type;
};

ESP_KERNEL(FFN_THREADS)
ffn_finish(const float* partial, FfnSums sums, int64_t chunks, int64_t columns) {
  ESP_SHARED(float, part, [FFN_WARPS][WARP]);
  int which = blockIdx.y, lane = threadIdx.x, warp = threadIdx.y;
  void* out = which ? sums.bias : sums.mask;
  if (out == nullptr) return;
  int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + lane;
  bool inside = column < columns;
  float sum = 0.0f;
  for (int64_t chunk = warp; inside && chunk < chunks; chunk += FFN_WARPS) {
    sum += load<1>(partial + (chunk * 2 + which) * columns + column).value[0];
  }
  part[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !inside) return;
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < FFN_WARPS; ++w) sum += part[w][lane];
  store_typed(out, which ? sums.bias_type : sums.mask_type, column, sum);
}

}  // namespace esp
