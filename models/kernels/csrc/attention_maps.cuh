// The maps of two attentions, tile by tile: what they are made of, loading it, and their scores.
//
// A block owns rows of the map, or keys, and goes over the other in tiles of shared memory; a warp
// owns 16 of the block's and forms 32 columns at a time. Nothing of a map is stored.
#pragma once

#include "tensor_core.cuh"

namespace esp {

constexpr int PANEL = 32, PARTS = PANEL / 8;
constexpr int DEPTH_PARTS = TILE_DEPTH / 8;

// Static shared memory ends at 48 KiB: float tiles are half as tall.
template <class S> constexpr int KD_WARPS = sizeof(S) == 2 ? 4 : 2;
template <class S> constexpr int KD_THREADS = KD_WARPS<S> * WARP;
template <class S> constexpr int KD_ROWS = KD_WARPS<S> * 16;  // of either side of a tile

// One of a side's two matrices: (B, H, rows, depth), unit stride in depth.
struct KdMatrix {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
  int64_t vectors;  // whether its rows may be read 16 bytes (of float: 4 elements) at a time
};

struct KdSide {
  KdMatrix q, k;
  const uint8_t* visible;  // (B, Nk); null: all keys
  int64_t visible_stride;
  int64_t type, causal;
  int depth;
  float scale;  // of the products; with log2(e) in it where they go into a softmax
};

struct KdProblem {
  KdSide side[2];  // student, teacher
  int64_t batch, heads;
  int queries, keys;
  const float* weight;  // by (batch, head), with strides; null: 1
  int64_t weight_batch_stride, weight_head_stride;
  float normaliser;  // 1 / (B H Nq)
};

// Which rows of which head a block owns. Blocks of one head follow each other: they share its
// tiles.
struct KdPlace {
  int64_t batch, head, map, first;

  ESP_DEVICE KdPlace(const KdProblem& problem, int64_t rows, int64_t step) {
    int64_t tiles = ceil_div(rows, step);
    map = blockIdx.x / tiles;
    first = blockIdx.x % tiles * step;
    batch = map / problem.heads;
    head = map % problem.heads;
  }
};

ESP_DEVICE float kd_weight(const KdProblem& problem, const KdPlace& at) {
  if (!problem.weight) return 1.0f;
  int64_t index = at.batch * problem.weight_batch_stride + at.head * problem.weight_head_stride;
  return load<1>(problem.weight + index).value[0];
}

ESP_DEVICE Bits tile_element(Bits value, Bits) { return value; }
template <class T> ESP_DEVICE float tile_element(T value, float) { return to_float(value); }

// Rows first .. first + KD_ROWS of one head; zeros after the last row and up to the padded depth.
template <class S, class T, int V>
ESP_DEVICE void fill_tile(S* tile, const T* rows, int64_t row_stride, int64_t left, int depth) {
  constexpr int PER_ROW = TILE_DEPTH / V;
  for (int i = threadIdx.x; i < KD_ROWS<S> * PER_ROW; i += KD_THREADS<S>) {
    int row = i / PER_ROW, column = i % PER_ROW * V;
    Vector<T, V> in = {};
    if (row < left && column < depth) in = load<V>(rows + row * row_stride + column);
    Vector<S, V> out;
#pragma unroll
    for (int x = 0; x < V; ++x) out.value[x] = tile_element(in.value[x], S());
    *reinterpret_cast<Vector<S, V>*>(tile + row * TILE_STRIDE<S> + column) = out;
  }
}

template <class S, class T> ESP_DEVICE void fill_tile_of(S* tile, const KdMatrix& from,
                                                         int64_t offset, int64_t left, int depth) {
  const T* rows = static_cast<const T*>(from.data) + offset;
  if (from.vectors) {
    fill_tile<S, T, 16 / sizeof(S)>(tile, rows, from.row_stride, left, depth);
  } else {
    fill_tile<S, T, 1>(tile, rows, from.row_stride, left, depth);
  }
}

// `left`: rows of the matrix from `first` on.
ESP_DEVICE void load_tile(Bits* tile, const KdSide& side, const KdMatrix& from, const KdPlace& at,
                          int64_t first, int64_t left) {
  int64_t offset =
      at.batch * from.batch_stride + at.head * from.head_stride + first * from.row_stride;
  fill_tile_of<Bits, Bits>(tile, from, offset, left, side.depth);
}

ESP_DEVICE void load_tile(float* tile, const KdSide& side, const KdMatrix& from, const KdPlace& at,
                          int64_t first, int64_t left) {
  int64_t offset =
      at.batch * from.batch_stride + at.head * from.head_stride + first * from.row_stride;
  if (side.type == FLOAT32) fill_tile_of<float, float>(tile, from, offset, left, side.depth);
  if (side.type == FLOAT16) fill_tile_of<float, half>(tile, from, offset, left, side.depth);
  if (side.type == BFLOAT16) fill_tile_of<float, bfloat16>(tile, from, offset, left, side.depth);
}

// Bit s: side s sees the key, as far as masks say.
ESP_DEVICE unsigned key_flags(const KdProblem& problem, const KdPlace& at, int key) {
  if (key >= problem.keys) return 0;
  unsigned flags = 0;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const KdSide& side = problem.side[s];
    const uint8_t* mask = side.visible;
    bool seen = !mask || load<1>(mask + at.batch * side.visible_stride + key).value[0];
    flags |= static_cast<unsigned>(seen) << s;
  }
  return flags;
}

// Bit s: the query sees the key on side s.
ESP_DEVICE unsigned seen_by(const KdProblem& problem, unsigned flags, int query, int key) {
  if (query >= problem.queries) return 0;
  if (key <= query) return flags;
  return flags & ~((problem.side[0].causal ? 1u : 0u) | (problem.side[1].causal ? 2u : 0u));
}

template <class S> struct alignas(16) KdTile {
  S row[KD_ROWS<S> * TILE_STRIDE<S>];
};

// What a block owns of both sides, and what it goes over.
template <class S> struct KdTiles {
  KdTile<S> own[2], other[2];
};

ESP_DEVICE int padded_depth(const KdSide& side) { return (side.depth + 15) / 16 * 16; }

// Scaled products of this warp's 16 rows with 32 rows of the other tile, of side s.
template <class S> ESP_DEVICE void score_panel(float (&scores)[PARTS][4], const KdSide& side,
                                               const KdTile<S>& own, const KdTile<S>& other,
                                               int panel) {
  const S* rows = own.row + threadIdx.x / WARP * 16 * TILE_STRIDE<S>;
  multiply(scores, rows, other.row + panel * TILE_STRIDE<S>, padded_depth(side),
           side.type == FLOAT16);
#pragma unroll
  for (int n = 0; n < PARTS; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[n][e] *= side.scale;
  }
}

// The part of the map that this block owns, in panels: body(s, t, first, panel) gets the scores of
// both sides with rows first + panel .. + 31 of the other matrix. prepare(first) fills what else is
// shared about rows first .. first + KD_ROWS. BY_KEYS: the block owns keys and goes over queries.
template <bool BY_KEYS, class S, class Prepare, class Body>
ESP_DEVICE void for_each_panel(const KdProblem& problem, const KdPlace& at, KdTiles<S>& tiles,
                               Prepare prepare, Body body) {
  int own_rows = BY_KEYS ? problem.keys : problem.queries;
  int other_rows = BY_KEYS ? problem.queries : problem.keys;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const KdSide& side = problem.side[s];
    load_tile(tiles.own[s].row, side, BY_KEYS ? side.k : side.q, at, at.first, own_rows - at.first);
  }
  for (int first = 0; first < other_rows; first += KD_ROWS<S>) {
    __syncthreads();  // all have done with the last tile
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const KdSide& side = problem.side[s];
      load_tile(tiles.other[s].row, side, BY_KEYS ? side.q : side.k, at, first, other_rows - first);
    }
    prepare(first);
    __syncthreads();
    for (int panel = 0; panel < KD_ROWS<S>; panel += PANEL) {
      float s[PARTS][4], t[PARTS][4];
      score_panel(s, problem.side[0], tiles.own[0], tiles.other[0], panel);
      score_panel(t, problem.side[1], tiles.own[1], tiles.other[1], panel);
      body(s, t, first, panel);
    }
  }
}

}  // namespace esp
