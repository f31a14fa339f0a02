// Distance of two attentions, student and teacher, with gradients in the student's q and k.
//
//   S = scale q k^T, T likewise of the teacher;  P, Q their softmax over the visible keys, else 0
//   probabilities   row = sum_j (P - Q)^2              dS = 2 P ((P - Q) - D),   D = sum_j P (P -
//   Q) kl              row = sum_j Q (log Q - log P)      dS = P D - Q,             D = sum_j Q
//   scores          row = sum_j (S - T)^2              dS = 2 (S - T), keys that both see
//
//   loss = sum_bh w_bh sum_i row_i / (B H Nq)     dq = c dS k     dk = c dS^T q     c = w scale /
//   (B H Nq)
//
// No map is stored. Four kernels go over tiles of the map and form S and T anew each time:
//   kd_normalisers   log of the softmax's denominators, online; a block owns rows of one side
//   kd_rows          loss and D; a block owns rows
//   kd_queries       dq; a block owns rows          kd_keys   dk; a block owns keys
// Each result has one owner, so there are no atomics and every bit is repeated. Differences are
// taken of the probabilities themselves: the loss in terms of normalisers cancels as P nears Q.
#pragma once

#include "attention_maps.cuh"

namespace esp {

enum KdKind : int { PROBABILITIES = 0, KL = 1, SCORES = 2 };

constexpr float LN_2 = 0.69314718055994531f;

// log2 of both softmaxes' denominators, and D.
struct RowStatistics {
  float normaliser[2], dot;
};

// (3, B H, Nq) in memory.
ESP_DEVICE RowStatistics load_statistics(const float* from, const KdProblem& problem, int64_t map,
                                         int query, bool with_dot) {
  if (query >= problem.queries) return {};
  int64_t plane = problem.batch * problem.heads * problem.queries;
  const float* row = from + map * problem.queries + query;
  return {{load<1>(row).value[0], load<1>(row + plane).value[0]},
          with_dot ? load<1>(row + 2 * plane).value[0] : 0.0f};
}

// Gradients of a row's scores lie between -1 and 1 and are tiny in long rows: scaled so, they keep
// their bits in fp16 (normal down to 2^-28), and nothing overflows.
template <int KIND> constexpr float KD_ENLARGED = KIND == SCORES ? 1.0f : 16384.0f;

// Gradient of a row's loss in one score of the student, enlarged.
template <int KIND>
ESP_DEVICE float score_gradient(float s, float t, unsigned seen, const RowStatistics& row) {
  if (KIND == SCORES) return seen == 3 ? 2.0f * (s - t) : 0.0f;
  float p = seen & 1 ? exp2_approx(s - row.normaliser[0]) : 0.0f;
  float q = seen & 2 ? exp2_approx(t - row.normaliser[1]) : 0.0f;
  if (KIND == PROBABILITIES) return 2.0f * KD_ENLARGED<KIND> * p * ((p - q) - row.dot);
  return seen & 1 ? KD_ENLARGED<KIND> * (p * row.dot - q) : 0.0f;
}

// One entry's share of its row's loss and of D.
template <int KIND> ESP_DEVICE void add_entry(float s, float t, unsigned seen,
                                              const RowStatistics& row, float& loss, float& dot) {
  if (KIND == SCORES) {
    float gap = seen == 3 ? s - t : 0.0f;
    loss = fmaf(gap, gap, loss);
    return;
  }
  float log_p = seen & 1 ? s - row.normaliser[0] : -INFINITY;
  float log_q = seen & 2 ? t - row.normaliser[1] : -INFINITY;
  float p = exp2_approx(log_p), q = exp2_approx(log_q);
  if (KIND == PROBABILITIES) {
    float gap = p - q;
    loss = fmaf(gap, gap, loss);
    dot = fmaf(p, gap, dot);
  } else {
    loss += q == 0.0f ? 0.0f : q * (log_q - log_p) * LN_2;
    dot += q;
  }
}

// Sum over the four lanes that share a row of a fragment.
ESP_DEVICE float quad_sum(float value) {
  value += __shfl_xor_sync(FULL, value, 1);
  return value + __shfl_xor_sync(FULL, value, 2);
}

ESP_DEVICE float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(FULL, value, 1));
  return fmaxf(value, __shfl_xor_sync(FULL, value, 2));
}

// Grid: (tiles of queries of every head, side).
template <class S> ESP_KERNEL_RESIDENT(KD_THREADS<S>, 4)
kd_normalisers(ESP_GRID_CONSTANT KdProblem problem, float* statistics) {
  constexpr int ROWS = KD_ROWS<S>;
  ESP_SHARED(KdTile<S>, tiles, [2]);
  ESP_SHARED(unsigned, flags, [ROWS]);
  KdPlace at(problem, problem.queries, ROWS);
  const KdSide& side = problem.side[blockIdx.y];
  int lane = threadIdx.x % WARP;
  int query = at.first + threadIdx.x / WARP * 16 + lane / 4;  // and query + 8
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  load_tile(tiles[0].row, side, side.q, at, at.first, problem.queries - at.first);
  for (int first = 0; first < problem.keys; first += ROWS) {
    __syncthreads();
    load_tile(tiles[1].row, side, side.k, at, first, problem.keys - first);
    for (int i = threadIdx.x; i < ROWS; i += KD_THREADS<S>)
      flags[i] = key_flags(problem, at, first + i);
    __syncthreads();
    for (int panel = 0; panel < ROWS; panel += PANEL) {
      float scores[PARTS][4];
      score_panel(scores, side, tiles[0], tiles[1], panel);
      float before[2] = {top[0], top[1]};
#pragma unroll
      for (int n = 0; n < PARTS; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int column = panel + fragment_column(lane, n, e);
          unsigned seen = seen_by(problem, flags[column], query + e / 2 * 8, first + column);
          if (!(seen >> blockIdx.y & 1)) scores[n][e] = -INFINITY;
          top[e / 2] = fmaxf(top[e / 2], scores[n][e]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Without any visible key so far the maximum is no number to subtract.
        float base = top[i] == -INFINITY ? 0.0f : top[i];
        sum[i] *= exp2_approx(before[i] - base);
#pragma unroll
        for (int n = 0; n < PARTS; ++n) {
          sum[i] += exp2_approx(scores[n][2 * i] - base) + exp2_approx(scores[n][2 * i + 1] - base);
        }
      }
    }
  }
  int64_t plane = problem.batch * problem.heads * problem.queries;
  float* row = statistics + blockIdx.y * plane + at.map * problem.queries;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float whole = quad_max(top[i]);
    float base = whole == -INFINITY ? 0.0f : whole;
    float total = quad_sum(sum[i] * exp2_approx(top[i] - base));
    if (lane % 4 == 0 && query + 8 * i < problem.queries) {
      store<1>(row + query + 8 * i, Vector<float, 1>{{base + log2f(total)}});
    }
  }
}

// D of every row, and each block's share of the weighted loss: partial[blockIdx.x].
template <class S, int KIND> ESP_KERNEL_RESIDENT(KD_THREADS<S>, 4)
kd_rows(ESP_GRID_CONSTANT KdProblem problem, float* statistics, float* partial) {
  constexpr int ROWS = KD_ROWS<S>;
  ESP_SHARED(KdTiles<S>, tiles, [1]);
  ESP_SHARED(unsigned, flags, [ROWS]);
  ESP_SHARED(float, losses, [KD_WARPS<S>]);
  KdPlace at(problem, problem.queries, ROWS);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int query = at.first + warp * 16 + lane / 4;  // and query + 8
  RowStatistics row[2] = {};
  float loss = 0.0f, dot[2] = {};
  if (KIND != SCORES) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row[i] = load_statistics(statistics, problem, at.map, query + 8 * i, false);
  }
  auto prepare = [&](int first) {
    for (int i = threadIdx.x; i < ROWS; i += KD_THREADS<S>)
      flags[i] = key_flags(problem, at, first + i);
  };
  for_each_panel<false>(
      problem, at, tiles[0], prepare, [&](auto& s, auto& t, int first, int panel) {
#pragma unroll
        for (int n = 0; n < PARTS; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int column = panel + fragment_column(lane, n, e);
            unsigned seen = seen_by(problem, flags[column], query + e / 2 * 8, first + column);
            add_entry<KIND>(s[n][e], t[n][e], seen, row[e / 2], loss, dot[e / 2]);
          }
        }
      });
  int64_t plane = problem.batch * problem.heads * problem.queries;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = quad_sum(dot[i]);
    if (KIND != SCORES && lane % 4 == 0 && query + 8 * i < problem.queries) {
      float* to = statistics + 2 * plane + at.map * problem.queries + query + 8 * i;
      store<1>(to, Vector<float, 1>{{total}});
    }
  }
  loss = warp_sum(loss);
  if (lane == 0) losses[warp] = loss;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < KD_WARPS<S>; ++w) total += losses[w];
    store<1>(partial + blockIdx.x, Vector<float, 1>{{total * kd_weight(problem, at)}});
  }
}

// loss = normaliser * sum of the blocks' shares, in one order. One block.
constexpr int KD_TOTAL_THREADS = 256;
ESP_KERNEL(KD_TOTAL_THREADS)
kd_total(const float* partial, int64_t count, float normaliser, float* loss) {
  ESP_SHARED(double, sums, [KD_TOTAL_THREADS / WARP]);
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += KD_TOTAL_THREADS)
    sum += load<1>(partial + i).value[0];
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int w = 0; w < KD_TOTAL_THREADS / WARP; ++w) total += sums[w];
    store<1>(loss, Vector<float, 1>{{static_cast<float>(total * normaliser)}});
  }
}

// A gradient in memory, laid out as its q or k.
struct KdGradient {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// Writes a warp's 16 rows, multiplied by what their sums have in common.
template <int KIND> ESP_DEVICE void store_gradient(const float (&sum)[DEPTH_PARTS][4],
                                                   const KdProblem& problem, const KdGradient& to,
                                                   const KdPlace& at, int rows, float scale,
                                                   const float* upstream) {
  int lane = threadIdx.x % WARP, row = at.first + threadIdx.x / WARP * 16 + lane / 4;
  float factor = load<1>(upstream).value[0] * kd_weight(problem, at) * problem.normaliser * scale;
  factor /= KD_ENLARGED<KIND>;
#pragma unroll
  for (int n = 0; n < DEPTH_PARTS; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int this_row = row + e / 2 * 8, column = fragment_column(lane, n, e);
      if (this_row >= rows || column >= problem.side[0].depth) continue;
      int64_t offset = at.batch * to.batch_stride + at.head * to.head_stride + column;
      offset += this_row * to.row_stride;
      store_typed(to.data, problem.side[0].type, offset, sum[n][e] * factor);
    }
  }
}

// dq. `scale`: on q k^T, as given. `upstream`: the gradient of the loss, one float on the device.
template <class S, int KIND> ESP_KERNEL_RESIDENT(KD_THREADS<S>, 3)
kd_queries(ESP_GRID_CONSTANT KdProblem problem, const float* statistics, const float* upstream,
           float scale, KdGradient to) {
  constexpr int ROWS = KD_ROWS<S>;
  ESP_SHARED(KdTiles<S>, tiles, [1]);
  ESP_SHARED(unsigned, flags, [ROWS]);
  KdPlace at(problem, problem.queries, ROWS);
  const KdSide& student = problem.side[0];
  int lane = threadIdx.x % WARP;
  int query = at.first + threadIdx.x / WARP * 16 + lane / 4;  // and query + 8
  RowStatistics row[2] = {};
  float sum[DEPTH_PARTS][4] = {};
  if (KIND != SCORES) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      row[i] = load_statistics(statistics, problem, at.map, query + 8 * i, true);
  }
  auto prepare = [&](int first) {
    for (int i = threadIdx.x; i < ROWS; i += KD_THREADS<S>)
      flags[i] = key_flags(problem, at, first + i);
  };
  for_each_panel<false>(
      problem, at, tiles[0], prepare, [&](auto& s, auto& t, int first, int panel) {
#pragma unroll
        for (int n = 0; n < PARTS; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int column = panel + fragment_column(lane, n, e);
            unsigned seen = seen_by(problem, flags[column], query + e / 2 * 8, first + column);
            s[n][e] = score_gradient<KIND>(s[n][e], t[n][e], seen, row[e / 2]);
          }
        }
        const S* keys = tiles[0].other[0].row + panel * TILE_STRIDE<S>;
        accumulate(sum, s, keys, padded_depth(student), student.type == FLOAT16);
      });
  store_gradient<KIND>(sum, problem, to, at, problem.queries, scale, upstream);
}

// dk: a warp owns 16 keys, and the columns are queries, whose statistics are shared by the block.
template <class S, int KIND> ESP_KERNEL_RESIDENT(KD_THREADS<S>, 3)
kd_keys(ESP_GRID_CONSTANT KdProblem problem, const float* statistics, const float* upstream,
        float scale, KdGradient to) {
  constexpr int ROWS = KD_ROWS<S>;
  ESP_SHARED(KdTiles<S>, tiles, [1]);
  ESP_SHARED(RowStatistics, rows, [ROWS]);
  KdPlace at(problem, problem.keys, ROWS);
  const KdSide& student = problem.side[0];
  int lane = threadIdx.x % WARP;
  int key = at.first + threadIdx.x / WARP * 16 + lane / 4;  // and key + 8
  unsigned flags[2] = {key_flags(problem, at, key), key_flags(problem, at, key + 8)};
  float sum[DEPTH_PARTS][4] = {};
  auto prepare = [&](int first) {
    for (int i = threadIdx.x; i < ROWS; i += KD_THREADS<S>) {
      if (KIND != SCORES) rows[i] = load_statistics(statistics, problem, at.map, first + i, true);
    }
  };
  for_each_panel<true>(problem, at, tiles[0], prepare, [&](auto& s, auto& t, int first, int panel) {
#pragma unroll
    for (int n = 0; n < PARTS; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int column = panel + fragment_column(lane, n, e);
        unsigned seen = seen_by(problem, flags[e / 2], first + column, key + e / 2 * 8);
        s[n][e] = score_gradient<KIND>(s[n][e], t[n][e], seen, rows[column]);
      }
    }
    const S* queries = tiles[0].other[0].row + panel * TILE_STRIDE<S>;
    accumulate(sum, s, queries, padded_depth(student), student.type == FLOAT16);
  });
  store_gradient<KIND>(sum, problem, to, at, problem.keys, scale, upstream);
}

}  // namespace esp
