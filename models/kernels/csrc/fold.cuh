// Gates into weights, with a cast, for several weights in one launch; and the way back.
//
//   out[i, j] = weight[r(i), c(j)] * row_gate[i] * column_gate[j]
//
// r and c pick the rows and columns that take part (null: all, in their order). The backward
// scatters to the same places, which are distinct, so nothing needs an atomic; the rest of dweight
// is the caller's zeros. A thread owns V neighbouring columns, a block's 8 warps stride over the rows
// of its share, as in ffn_act_mask.cuh.
#pragma once

#include "common.cuh"

namespace esp {

constexpr int FOLD_WARPS = 8;
constexpr int FOLD_THREADS = FOLD_WARPS * WARP;
constexpr int FOLD_WIDTH = 4;   // columns of a thread where vectors fit
constexpr int FOLD_ITEMS = 24;  // weights of a launch: what 4 KB of kernel parameters hold

// One weight. The caller fills the first part (models/kernels/fold.py), the launcher the second.
struct FoldItem {
  const void* weight;
  const int64_t* rows;
  const int64_t* columns;
  const float* row_gate;
  const float* column_gate;
  void* out;             // forward: the operand; backward: its gradient
  void* dweight;         // backward
  float* drow_gate;      // backward, null: not wanted
  float* dcolumn_gate;
  int64_t n_rows, n_columns, stride;  // of the operand; of a row of the weight, in elements

  int32_t first_block, tiles, chunks, width;
  float* row_partial;     // [tiles][n_rows]
  float* column_partial;  // [chunks][n_columns]
};

struct FoldTable {
  FoldItem item[FOLD_ITEMS];
  int32_t count;
};

ESP_DEVICE const FoldItem& find_item(const FoldTable& table, int block) {
  int i = 0;
  while (i + 1 < table.count && block >= table.item[i + 1].first_block) ++i;
  return table.item[i];
}

// Where a thread of a block works.
struct FoldPlace {
  int64_t column, row, step;
  int tile, chunk;
  bool inside;
};

template <int V> ESP_DEVICE FoldPlace find_place(const FoldItem& item) {
  int block = blockIdx.x - item.first_block;
  FoldPlace place;
  place.tile = block % item.tiles;
  place.chunk = block / item.tiles;
  place.column = (static_cast<int64_t>(place.tile) * WARP + threadIdx.x) * V;
  place.row = static_cast<int64_t>(place.chunk) * FOLD_WARPS + threadIdx.y;
  place.step = static_cast<int64_t>(item.chunks) * FOLD_WARPS;
  place.inside = place.column < item.n_columns;
  return place;
}

ESP_DEVICE int64_t pick(const int64_t* index, int64_t i) {
  return index ? load<1>(index + i).value[0] : i;
}

ESP_DEVICE float gate_at(const float* gate, int64_t i) {
  return gate ? load<1>(gate + i).value[0] : 1.0f;
}

// V > 1 only where all columns take part: then they are neighbours in memory.
template <class T, int V> ESP_DEVICE Vector<T, V> gather(const T* row, const int64_t (&column)[V]) {
  return load<V>(row + column[0]);
}

template <class In, class Out, int V> ESP_DEVICE void fold_item(const FoldItem& item) {
  FoldPlace at = find_place<V>(item);
  if (!at.inside) return;
  int64_t column[V];
  float gate[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    column[i] = pick(item.columns, at.column + i);
    gate[i] = gate_at(item.column_gate, at.column + i);
  }
  for (int64_t row = at.row; row < item.n_rows; row += at.step) {
    const In* from = static_cast<const In*>(item.weight) + pick(item.rows, row) * item.stride;
    Vector<In, V> in = gather<In, V>(from, column);
    Vector<Out, V> out;
    float row_gate = gate_at(item.row_gate, row);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out.value[i] = from_float<Out>(to_float(in.value[i]) * row_gate * gate[i]);
    }
    store<V>(static_cast<Out*>(item.out) + row * item.n_columns + at.column, out);
  }
}

template <class In, class Out>
ESP_KERNEL_RESIDENT(FOLD_THREADS, 4) fold_forward(ESP_GRID_CONSTANT FoldTable table) {
  const FoldItem& item = find_item(table, blockIdx.x);
  if (item.width == FOLD_WIDTH) {
    fold_item<In, Out, FOLD_WIDTH>(item);
  } else {
    fold_item<In, Out, 1>(item);
  }
}

// dweight, and this block's share of the gates' sums.
template <class In, class Out, int V> ESP_DEVICE void unfold_item(const FoldItem& item) {
  ESP_SHARED(float, sums, [FOLD_WARPS][V][WARP]);
  FoldPlace at = find_place<V>(item);
  int lane = threadIdx.x, warp = threadIdx.y;
  int64_t column[V];
  float gate[V], by_column[V] = {};
#pragma unroll
  for (int i = 0; i < V; ++i) {
    column[i] = at.inside ? pick(item.columns, at.column + i) : 0;
    gate[i] = at.inside ? gate_at(item.column_gate, at.column + i) : 0.0f;
  }
  bool gated = item.drow_gate || item.dcolumn_gate;
  for (int64_t row = at.row; row < item.n_rows; row += at.step) {  // the same for a whole warp
    float row_gate = gate_at(item.row_gate, row), by_row = 0.0f;
    if (at.inside) {
      int64_t start = pick(item.rows, row) * item.stride;
      Vector<Out, V> g =
          load<V>(static_cast<const Out*>(item.out) + row * item.n_columns + at.column);
      Vector<In, V> weight = {}, out;
      if (gated) weight = gather<In, V>(static_cast<const In*>(item.weight) + start, column);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        float up = to_float(g.value[i]), product = up * to_float(weight.value[i]);
        by_row = fmaf(product, gate[i], by_row);
        by_column[i] = fmaf(product, row_gate, by_column[i]);
        out.value[i] = from_float<In>(up * row_gate * gate[i]);
      }
      store<V>(static_cast<In*>(item.dweight) + start + column[0], out);
    }
    if (item.drow_gate) {
      by_row = warp_sum(by_row);
      if (lane == 0) {
        store<1>(item.row_partial + at.tile * item.n_rows + row, Vector<float, 1>{{by_row}});
      }
    }
  }
  if (item.dcolumn_gate == nullptr) return;
#pragma unroll
  for (int i = 0; i < V; ++i) sums[warp][i][lane] = by_column[i];
  __syncthreads();
  for (int i = warp; i < V; i += FOLD_WARPS) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < FOLD_WARPS; ++w) sum += sums[w][i][lane];
    if (at.inside) {
      float* to = item.column_partial + at.chunk * item.n_columns + at.column + i;
      store<1>(to, Vector<float, 1>{{sum}});
    }
  }
}

template <class In, class Out>
ESP_KERNEL_RESIDENT(FOLD_THREADS, 4) fold_backward(ESP_GRID_CONSTANT FoldTable table) {
  const FoldItem& item = find_item(table, blockIdx.x);
  if (item.width == FOLD_WIDTH) {
    unfold_item<In, Out, FOLD_WIDTH>(item);
  } else {
    unfold_item<In, Out, 1>(item);
  }
}

// Second stage: blockIdx.y is the weight, blockIdx.z rows or columns; sums in one order.
ESP_KERNEL(FOLD_THREADS) fold_finish(ESP_GRID_CONSTANT FoldTable table) {
  const FoldItem& item = table.item[blockIdx.y];
  bool rows = blockIdx.z == 0;
  float* out = rows ? item.drow_gate : item.dcolumn_gate;
  const float* partial = rows ? item.row_partial : item.column_partial;
  int64_t count = rows ? item.n_rows : item.n_columns, parts = rows ? item.tiles : item.chunks;
  int64_t i = static_cast<int64_t>(blockIdx.x) * FOLD_THREADS + threadIdx.x;
  if (out == nullptr || i >= count) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += load<1>(partial + part * count + i).value[0];
  store<1>(out + i, Vector<float, 1>{{sum}});
}

}  // namespace esp
