// Kept tokens of all rows moved together, and back, without the host knowing how many there are.
//
// Every token has exactly one place among B N packed rows: the i-th kept one (from 0) is row i; the
// i-th dropped one is row B N - 1 - i and leaves zeros there. Where fewer rows are there, those
// behind them are left out. So one pass fills everything, and a block has to know only how many tokens are kept before its own. It counts them itself: that
// reads at most B N bytes, which lie in the cache, and spares a second launch.
//
// Elements are moved as they are, whatever their type: T and V make up a unit of 1 to 16 bytes.
#pragma once

#include "common.cuh"

namespace esp {

constexpr int PACK_THREADS = 256, PACK_WARPS = PACK_THREADS / WARP;
constexpr int PACK_TOKENS = 64;  // a block's share

struct PackShape {
  int64_t rows, tokens, units, packed_rows;         // units in a token
  int64_t row_stride, token_stride, packed_stride;  // of the padded and the packed tensor, in T
};

// Kept tokens among the first `count`; all threads of the block call it and get the sum.
ESP_DEVICE int64_t count_kept(const uint8_t* keep, int64_t count) {
  ESP_SHARED(int64_t, sums, [PACK_WARPS]);
  bool aligned = reinterpret_cast<uintptr_t>(keep) % 16 == 0;
  int64_t wide = aligned ? count / 16 : 0, sum = 0;
  for (int64_t i = threadIdx.x; i < wide; i += PACK_THREADS) {
    Vector<uint32_t, 4> sixteen = load<4>(reinterpret_cast<const uint32_t*>(keep) + 4 * i);
#pragma unroll
    for (int x = 0; x < 4; ++x) sum += __popc(sixteen.value[x]);  // a bool is a byte of 0 or 1
  }
  for (int64_t i = 16 * wide + threadIdx.x; i < count; i += PACK_THREADS) {
    sum += load<1>(keep + i).value[0];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  int64_t total = 0;
#pragma unroll
  for (int w = 0; w < PACK_WARPS; ++w) total += sums[w];
  return total;
}

// For each of this block's tokens the number of kept ones before it; ~number where it is dropped.
ESP_DEVICE void rank_tokens(const uint8_t* keep, int64_t first, int64_t all,
                            int64_t (&ranks)[PACK_TOKENS]) {
  int64_t before = count_kept(keep, first);
  if (threadIdx.x < WARP) {
    int lane = threadIdx.x;
#pragma unroll
    for (int part = 0; part < PACK_TOKENS; part += WARP) {
      int64_t token = first + part + lane;
      bool kept = token < all && load<1>(keep + token).value[0];
      unsigned votes = __ballot_sync(FULL, kept);
      int64_t rank = before + __popc(votes & ((1u << lane) - 1));
      ranks[part + lane] = kept ? rank : ~rank;
      before += __popc(votes);
    }
  }
  __syncthreads();
}

// cumulative[b]: tokens kept before row b; cumulative[B]: in all. indices: token of a packed row,
// or -1.
ESP_DEVICE void store_index(int64_t token, int64_t rank, bool kept, int64_t place, int64_t all,
                            const PackShape& shape, int32_t* cumulative, int64_t* indices) {
  if (place < shape.packed_rows) {
    store<1>(indices + place, Vector<int64_t, 1>{{kept ? token : -1}});
  }
  if (token % shape.tokens == 0) {
    int32_t* entry = cumulative + token / shape.tokens;
    store<1>(entry, Vector<int32_t, 1>{{static_cast<int32_t>(rank)}});
  }
  if (token == all - 1) {
    int32_t total = static_cast<int32_t>(rank + kept);
    store<1>(cumulative + shape.rows, Vector<int32_t, 1>{{total}});
  }
}

// BACK false: padded -> packed, cumulative, indices. BACK true: packed -> padded, with zeros on
// dropped tokens. A warp moves one token at a time.
template <bool BACK, class T, int V> ESP_KERNEL(PACK_THREADS)
move_tokens(T* padded, const uint8_t* keep, T* packed, int32_t* cumulative, int64_t* indices,
            PackShape shape) {
  ESP_SHARED(int64_t, ranks, [PACK_TOKENS]);
  int64_t all = shape.rows * shape.tokens, first = static_cast<int64_t>(blockIdx.x) * PACK_TOKENS;
  rank_tokens(keep, first, all, ranks);
  int lane = threadIdx.x % WARP, own = least(PACK_TOKENS, all - first);
  for (int i = threadIdx.x / WARP; i < own; i += PACK_WARPS) {
    bool kept = ranks[i] >= 0;
    int64_t rank = kept ? ranks[i] : ~ranks[i], token = first + i;
    int64_t place = kept ? rank : all - 1 - (token - rank);
    if (!BACK && lane == 0) {
      store_index(token, rank, kept, place, all, shape, cumulative, indices);
    }
    bool there = place < shape.packed_rows;
    int64_t row = token / shape.tokens;
    T* outer = padded + row * shape.row_stride + (token - row * shape.tokens) * shape.token_stride;
    T* inner = packed + place * shape.packed_stride;
    for (int64_t unit = lane; unit < shape.units; unit += WARP) {
      Vector<T, V> value = {};
      if (kept && (there || !BACK)) value = load<V>((BACK ? inner : outer) + unit * V);
      if (BACK || there) store<V>((BACK ? outer : inner) + unit * V, value);
    }
  }
}

}  // namespace esp
