// Outputs of attention's heads times a mask of heads, one for all rows or one for each.
//
//   y = c z_bh      dc = g z_bh      dz_bh = sum_{n,d} g c    (summed over b too where z is (H,))
//
// A block owns a share of the tokens of one (row, head). Its threads lie over a token's d elements,
// V neighbouring ones each, and over as many tokens as there are threads for.
#pragma once

#include "common.cuh"

namespace esp {

constexpr int HEAD_THREADS = 256, HEAD_WARPS = HEAD_THREADS / WARP;
constexpr int HEAD_TOKENS = 256;  // a block's share

// (batch, heads, tokens, depth), unit stride in depth.
struct HeadLayout {
  int64_t batch_stride, head_stride, token_stride;
};

struct HeadShape {
  int64_t batch, heads, tokens, depth, chunks;  // chunks: blocks of one (row, head)
};

// z by (batch, head); batch_stride 0: one for all rows.
struct HeadVector {
  void* data;
  int64_t type, batch_stride, head_stride;
};

// Which tokens a thread sees: first, first + step, ... below end, elements column .. column + V.
struct HeadPlace {
  int64_t map, batch, head, first, end, step, column;
  bool inside;

  ESP_DEVICE HeadPlace(const HeadShape& shape, int64_t width) {
    map = blockIdx.x / shape.chunks;
    batch = map / shape.heads;
    head = map % shape.heads;
    int64_t begin = blockIdx.x % shape.chunks * HEAD_TOKENS;
    end = least(begin + HEAD_TOKENS, shape.tokens);
    int64_t vectors = shape.depth / width;  // at most HEAD_THREADS
    step = HEAD_THREADS / vectors;
    first = begin + threadIdx.x / vectors;
    column = threadIdx.x % vectors * width;
    inside = threadIdx.x / vectors < step;
  }
  ESP_DEVICE int64_t start(const HeadLayout& layout) const {
    return batch * layout.batch_stride + head * layout.head_stride + column;
  }
};

ESP_DEVICE float head_value(const HeadVector& mask, const HeadPlace& at) {
  return load_typed(mask.data, mask.type,
                    at.batch * mask.batch_stride + at.head * mask.head_stride);
}

template <class T, int V> ESP_KERNEL(HEAD_THREADS)
head_forward(const T* context, HeadVector mask, T* y, HeadLayout in, HeadLayout out,
             HeadShape shape) {
  HeadPlace at(shape, V);
  if (!at.inside) return;
  float z = head_value(mask, at);
  const T* from = context + at.start(in);
  T* to = y + at.start(out);
  for (int64_t token = at.first; token < at.end; token += at.step) {
    Vector<T, V> value = load<V>(from + token * in.token_stride);
#pragma unroll
    for (int i = 0; i < V; ++i) value.value[i] = from_float<T>(to_float(value.value[i]) * z);
    store<V>(to + token * out.token_stride, value);
  }
}

// dc, and each block's share of dz: partial[blockIdx.x].
template <class T, int V> ESP_KERNEL(HEAD_THREADS)
head_backward(const T* gradient, const T* context, HeadVector mask, T* down, float* partial,
              HeadLayout up, HeadLayout in, HeadLayout out, HeadShape shape) {
  ESP_SHARED(float, sums, [HEAD_WARPS]);
  HeadPlace at(shape, V);
  float sum = 0.0f;
  if (at.inside) {
    float z = head_value(mask, at);
    for (int64_t token = at.first; token < at.end; token += at.step) {
      Vector<T, V> g = load<V>(gradient + at.start(up) + token * up.token_stride);
      Vector<T, V> c = load<V>(context + at.start(in) + token * in.token_stride);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float value = to_float(g.value[i]);
        sum = fmaf(value, to_float(c.value[i]), sum);
        g.value[i] = from_float<T>(value * z);
      }
      store<V>(down + at.start(out) + token * out.token_stride, g);
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < HEAD_WARPS; ++w) total += sums[w];
    store<1>(partial + blockIdx.x, Vector<float, 1>{{total}});
  }
}

// dz: a warp adds up one entry's shares in one order. rows: 1 where dz is (B, H), B where it is
// (H,).
ESP_KERNEL(HEAD_THREADS)
head_finish(const float* partial, HeadVector dmask, HeadShape shape, int64_t entries,
            int64_t rows) {
  int64_t entry = static_cast<int64_t>(blockIdx.x) * HEAD_WARPS + threadIdx.x / WARP;
  if (entry >= entries) return;
  int lane = threadIdx.x % WARP;
  float sum = 0.0f;
  for (int64_t i = lane; i < rows * shape.chunks; i += WARP) {
    int64_t map = entry + i / shape.chunks * shape.heads;
    sum += load<1>(partial + map * shape.chunks + i % shape.chunks).value[0];
  }
  sum = warp_sum(sum);
  if (lane == 0) store_typed(dmask.data, dmask.type, entry, sum);
}

}  // namespace esp
