// Products of small tiles in shared memory by one warp, sums in fp32.
//
// A tile row holds up to 64 elements and is padded so that eight neighbouring rows lie in different
// banks. 16-bit tiles go through the tensor cores (mma.sync m16n8k16, sm_80 and newer); float tiles
// through fused multiply-adds, which keep all bits. Both leave a 16 x 8N result where mma.sync
// does: element e of part n of a lane is
//
//   row lane / 4 + 8 (e / 2),   column 8 n + 2 (lane % 4) + e % 2.
//
// On a CPU the two instructions below are emulated as the PTX manual defines them, so that the way
// fragments are gathered and combined is tested; the arithmetic inside is plain fp32.
#pragma once

#include "common.cuh"

namespace esp {

using Bits = uint16_t;  // half or bfloat16: the tensor core is told which by the instruction alone

constexpr int TILE_DEPTH = 64;  // elements of a row, at most
// Elements from one row of a tile to the next: 16-byte steps, each row four banks further.
template <class S> constexpr int TILE_STRIDE = TILE_DEPTH + 16 / sizeof(S);

ESP_DEVICE int fragment_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
ESP_DEVICE int fragment_column(int lane, int n, int e) { return 8 * n + 2 * (lane % 4) + e % 2; }

#ifdef __CUDACC__

// Four 8 x 8 matrices; lane l points to row l % 8 of matrix l / 8. TRANSPOSED: the lane gets a
// column pair of rows instead of a row pair of columns.
template <bool TRANSPOSED> ESP_DEVICE void load_matrices(uint32_t (&to)[4], const Bits* row) {
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (TRANSPOSED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  }
}

// c += a b, (16 x 16) (16 x 8).
template <bool HALF>
ESP_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (HALF) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

template <bool HALF> ESP_DEVICE uint32_t pack(float low, float high) {
  if (HALF) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&both);
  }
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

#else

// What the lanes of a warp hand each other. Two of each, used in turn: a lane that is ahead by one
// call must not overwrite what others still read, and cannot be ahead by two.
struct WarpExchange {
  const Bits* rows[2][WARP];
  uint32_t a[2][WARP][4], b[2][WARP][2];
  unsigned loads[WARP], products[WARP];
};

inline WarpExchange& warp_exchange() {
  static WarpExchange warps[32];
  return warps[threadIdx.x / WARP];
}

template <bool TRANSPOSED> inline void load_matrices(uint32_t (&to)[4], const Bits* row) {
  WarpExchange& warp = warp_exchange();
  unsigned lane = threadIdx.x % WARP, turn = warp.loads[lane]++ % 2;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail(emulation::MISALIGNED);
  warp.rows[turn][lane] = row;
  __syncwarp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    const Bits* const* rows = warp.rows[turn] + 8 * matrix;
    unsigned one = lane / 4, two = 2 * (lane % 4);
    Bits low = TRANSPOSED ? rows[two][one] : rows[one][two];
    Bits high = TRANSPOSED ? rows[two + 1][one] : rows[one][two + 1];
    to[matrix] = low | uint32_t(high) << 16;
  }
}

template <bool HALF> inline float unpack(uint32_t both, int which) {
  auto bits = static_cast<uint16_t>(both >> 16 * which);
  return HALF ? to_float(half{bits}) : to_float(bfloat16{bits});
}

template <bool HALF>
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  WarpExchange& warp = warp_exchange();
  int lane = threadIdx.x % WARP, turn = warp.products[lane]++ % 2;
  for (int i = 0; i < 4; ++i) warp.a[turn][lane][i] = a[i];
  warp.b[turn][lane][0] = b0, warp.b[turn][lane][1] = b1;
  __syncwarp();
  for (int e = 0; e < 4; ++e) {
    int row = lane / 4, column = 2 * (lane % 4) + e % 2;
    for (int k = 0; k < 16; ++k) {
      int owner = k % 8 / 2;
      float x = unpack<HALF>(warp.a[turn][row * 4 + owner][e / 2 + 2 * (k / 8)], k % 2);
      c[e] += x * unpack<HALF>(warp.b[turn][column * 4 + owner][k / 8], k % 2);
    }
  }
}

template <bool HALF> inline uint32_t pack(float low, float high) {
  if (HALF) return from_float<half>(low).bits | uint32_t(from_float<half>(high).bits) << 16;
  return from_float<bfloat16>(low).bits | uint32_t(from_float<bfloat16>(high).bits) << 16;
}

#endif

// c = a b^T: 16 rows of a, 8N rows of b, over the first `depth` elements of each (a multiple of
// 16).
template <bool HALF, int N>
ESP_DEVICE void multiply_as(float (&c)[N][4], const Bits* a, const Bits* b, int depth) {
  int lane = threadIdx.x % WARP;
  a += (lane % 16) * TILE_STRIDE<Bits> + lane / 16 * 8;
  b += (lane / 16 * 8 + lane % 8) * TILE_STRIDE<Bits> + lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < TILE_DEPTH; k += 16) {
    if (k >= depth) break;
    uint32_t left[4], right[4];
    load_matrices<false>(left, a + k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      load_matrices<false>(right, b + n * 8 * TILE_STRIDE<Bits> + k);
      mma<HALF>(c[n], left, right[0], right[1]);
      mma<HALF>(c[n + 1], left, right[2], right[3]);
    }
  }
}

template <int N>
ESP_DEVICE void multiply(float (&c)[N][4], const Bits* a, const Bits* b, int depth, bool is_half) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
  }
  if (is_half) {
    multiply_as<true>(c, a, b, depth);
  } else {
    multiply_as<false>(c, a, b, depth);
  }
}

template <int N>
ESP_DEVICE void multiply(float (&c)[N][4], const float* a, const float* b, int depth, bool) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[n][e] = 0.0f;
  }
  using Quad = Vector<float, 4>;
#pragma unroll 2
  for (int k = 0; k < depth; k += 4) {
    Quad left[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = fragment_row(lane, 2 * i);
      left[i] = *reinterpret_cast<const Quad*>(a + row * TILE_STRIDE<float> + k);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int column = fragment_column(lane, n, j);
        Quad right = *reinterpret_cast<const Quad*>(b + column * TILE_STRIDE<float> + k);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int x = 0; x < 4; ++x) {
            c[n][2 * i + j] = fmaf(left[i].value[x], right.value[x], c[n][2 * i + j]);
          }
        }
      }
    }
  }
}

// c += p b: p is a 16 x 8K result, b has 8K rows of `depth` elements. p is rounded to the type of
// b.
template <bool HALF, int K, int N>
ESP_DEVICE void accumulate_as(float (&c)[N][4], const float (&p)[K][4], const Bits* b, int depth) {
  int lane = threadIdx.x % WARP;
  b += (lane % 16) * TILE_STRIDE<Bits> + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    // Where mma.sync leaves two neighbouring parts of a result is where it takes its left operand.
    uint32_t left[4] = {pack<HALF>(p[k][0], p[k][1]), pack<HALF>(p[k][2], p[k][3]),
                        pack<HALF>(p[k + 1][0], p[k + 1][1]), pack<HALF>(p[k + 1][2], p[k + 1][3])};
    uint32_t right[4];
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      if (n * 8 >= depth) break;
      load_matrices<true>(right, b + k * 8 * TILE_STRIDE<Bits> + n * 8);
      mma<HALF>(c[n], left, right[0], right[1]);
      mma<HALF>(c[n + 1], left, right[2], right[3]);
    }
  }
}

template <int K, int N> ESP_DEVICE void accumulate(float (&c)[N][4], const float (&p)[K][4],
                                                   const Bits* b, int depth, bool is_half) {
  if (is_half) {
    accumulate_as<true>(c, p, b, depth);
  } else {
    accumulate_as<false>(c, p, b, depth);
  }
}

template <int K, int N> ESP_DEVICE void accumulate(float (&c)[N][4], const float (&p)[K][4],
                                                   const float* b, int depth, bool) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    for (int owner = 0; owner < 4;
         ++owner) {  // the lane of this row that holds columns 2 owner + j
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float first = __shfl_sync(FULL, p[k][j], lane / 4 * 4 + owner);
        float second = __shfl_sync(FULL, p[k][2 + j], lane / 4 * 4 + owner);
        const float* row = b + (8 * k + 2 * owner + j) * TILE_STRIDE<float> + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          if (n * 8 >= depth) break;
          Vector<float, 2> right = *reinterpret_cast<const Vector<float, 2>*>(row + 8 * n);
          c[n][0] = fmaf(first, right.value[0], c[n][0]);
          c[n][1] = fmaf(first, right.value[1], c[n][1]);
          c[n][2] = fmaf(second, right.value[0], c[n][2]);
          c[n][3] = fmaf(second, right.value[1], c[n][3]);
        }
      }
    }
  }
}

}  // namespace esp
