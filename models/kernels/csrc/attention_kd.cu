// Launchers of attention_kd.
#include "attention_kd.cuh"

namespace esp {
namespace {

constexpr double LOG2_E = 1.4426950408889634;

bool is_short(int64_t type) { return type == FLOAT16 || type == BFLOAT16; }

// Float tiles when either side is float: short values become floats without loss, and so any two
// types may meet. Two short types may differ too: each product has one type.
bool float_tiles(const KdProblem& problem) {
  return !is_short(problem.side[0].type) || !is_short(problem.side[1].type);
}

int64_t element_bytes(int64_t type) { return type == FLOAT32 ? 4 : 2; }

KdMatrix matrix(const void* data, int64_t batch_stride, int64_t head_stride, int64_t row_stride,
                int64_t depth, int64_t type, int64_t width) {
  bool vectors = depth % width == 0;
  for (int64_t stride : {batch_stride, head_stride, row_stride}) {
    vectors = vectors && rows_aligned(data, stride, element_bytes(type), width);
  }
  return {data, batch_stride, head_stride, row_stride, vectors};
}

int64_t row_blocks(const KdProblem& problem, int64_t rows) {
  int64_t step = float_tiles(problem) ? KD_ROWS<float> : KD_ROWS<Bits>;
  return problem.batch * problem.heads * ceil_div(rows, step);
}

int check(const KdProblem& problem) {
  for (const KdSide& side : problem.side) {
    if (side.type < FLOAT32 || side.type > BFLOAT16) return BAD_TYPE;
    if (side.depth < 1 || side.depth > TILE_DEPTH) return BAD_SHAPE;
  }
  int64_t blocks = most(row_blocks(problem, problem.queries), row_blocks(problem, problem.keys));
  return blocks < (int64_t(1) << 31) ? 0 : BAD_SHAPE;
}

// Calls body with the element type of the tiles and the kind as compile-time constants.
template <class Body> int with_kind(const KdProblem& problem, int64_t kind, Body body) {
  if (int failure = check(problem)) return failure;
  auto tiles = [&](auto k) { return float_tiles(problem) ? body(float(), k) : body(Bits(), k); };
  switch (kind) {
    case PROBABILITIES:
      return tiles(std::integral_constant<int, PROBABILITIES>());
    case KL:
      return tiles(std::integral_constant<int, KL>());
    case SCORES:
      return tiles(std::integral_constant<int, SCORES>());
    default:
      return BAD_OPTION;
  }
}

}  // namespace
}  // namespace esp

// The parameters that say what a problem is, the same for every launcher; strides in elements.
#define KD_SIDE(name)                                                                             \
  const void *name##_q, const void *name##_k, const void *name##_visible, int64_t name##_type,    \
      int64_t name##_depth, int64_t name##_causal, int64_t name##_q_batch, int64_t name##_q_head, \
      int64_t name##_q_row, int64_t name##_k_batch, int64_t name##_k_head, int64_t name##_k_row,  \
      int64_t name##_visible_batch, double name##_scale
#define KD_PROBLEM                                                                      \
  KD_SIDE(student), KD_SIDE(teacher), const void *weight, int64_t weight_batch,         \
      int64_t weight_head, int64_t batch, int64_t heads, int64_t queries, int64_t keys, \
      int64_t kind
#define KD_MAKE_SIDE(name)                                                                        \
  esp::KdSide {                                                                                   \
    esp::matrix(name##_q, name##_q_batch, name##_q_head, name##_q_row, name##_depth, name##_type, \
                width),                                                                           \
        esp::matrix(name##_k, name##_k_batch, name##_k_head, name##_k_row, name##_depth,          \
                    name##_type, width),                                                          \
        static_cast<const uint8_t*>(name##_visible), name##_visible_batch, name##_type,           \
        name##_causal, static_cast<int>(name##_depth),                                            \
        static_cast<float>(name##_scale * (kind == esp::SCORES ? 1.0 : esp::LOG2_E))              \
  }
#define KD_MAKE_PROBLEM()                                                                     \
  int64_t width = esp::is_short(student_type) && esp::is_short(teacher_type) ? 8 : 4;         \
  esp::KdProblem problem {                                                                    \
    {KD_MAKE_SIDE(student), KD_MAKE_SIDE(teacher)}, batch, heads, static_cast<int>(queries),  \
        static_cast<int>(keys), static_cast<const float*>(weight), weight_batch, weight_head, \
        static_cast<float>(1.0 / esp::most(1, batch * heads * queries))                       \
  }

// Floats of workspace of the forward: a partial loss from every block.
extern "C" int64_t espalier_attention_kd_workspace(int64_t batch, int64_t heads, int64_t queries) {
  return batch * heads * esp::ceil_div(queries, esp::KD_ROWS<float>);
}

// loss: one float. statistics: (3, batch, heads, queries) floats that the backward takes; none of
// scores.
extern "C" int espalier_attention_kd(KD_PROBLEM, void* loss, void* statistics, void* workspace,
                                     int64_t floats, void* stream) {
  using namespace esp;
  if (floats < espalier_attention_kd_workspace(batch, heads, queries)) return SMALL_WORKSPACE;
  KD_MAKE_PROBLEM();
  float* rows = static_cast<float*>(statistics);
  float* partial = static_cast<float*>(workspace);
  float* total = static_cast<float*>(loss);
  return with_kind(problem, kind, [&](auto element, auto k) {
    using S = decltype(element);
    constexpr int KIND = decltype(k)::value;
    int64_t blocks = row_blocks(problem, problem.queries);
    if (blocks > 0) {
      dim3 both(blocks, 2), grid(blocks), block(KD_THREADS<S>);
      if (KIND != SCORES) ESP_LAUNCH(kd_normalisers<S>, both, block, stream, problem, rows);
      ESP_LAUNCH((kd_rows<S, KIND>), grid, block, stream, problem, rows, partial);
    }
    dim3 one(1), block(KD_TOTAL_THREADS);
    ESP_LAUNCH(kd_total, one, block, stream, partial, blocks, problem.normaliser, total);
    return ESP_STATUS();
  });
}

// dq, dk: in the type of the student; null where not wanted. upstream: one float.
extern "C" int espalier_attention_kd_backward(KD_PROBLEM, const void* statistics,
                                              const void* upstream, void* dq, void* dk,
                                              int64_t dq_batch, int64_t dq_head, int64_t dq_row,
                                              int64_t dk_batch, int64_t dk_head, int64_t dk_row,
                                              void* stream) {
  using namespace esp;
  KD_MAKE_PROBLEM();
  const float* rows = static_cast<const float*>(statistics);
  const float* up = static_cast<const float*>(upstream);
  float scale = static_cast<float>(student_scale);
  return with_kind(problem, kind, [&](auto element, auto k) {
    using S = decltype(element);
    constexpr int KIND = decltype(k)::value;
    dim3 block(KD_THREADS<S>);
    int64_t of_queries = row_blocks(problem, problem.queries),
            of_keys = row_blocks(problem, problem.keys);
    if (dq && of_queries > 0) {
      KdGradient to{dq, dq_batch, dq_head, dq_row};
      dim3 grid(of_queries);
      ESP_LAUNCH((kd_queries<S, KIND>), grid, block, stream, problem, rows, up, scale, to);
    }
    if (dk && of_keys > 0) {
      KdGradient to{dk, dk_batch, dk_head, dk_row};
      dim3 grid(of_keys);
      ESP_LAUNCH((kd_keys<S, KIND>), grid, block, stream, problem, rows, up, scale, to);
    }
    return ESP_STATUS();
  });
}
