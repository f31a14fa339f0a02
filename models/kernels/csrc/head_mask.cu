// Launchers of head_mask. Strides are in elements; dc and y may have any, with unit stride in
// depth.
#include "head_mask.cuh"

namespace esp {
namespace {

HeadShape head_shape(int64_t batch, int64_t heads, int64_t tokens, int64_t depth) {
  return {batch, heads, tokens, depth, ceil_div(tokens, HEAD_TOKENS)};
}

bool aligned(const void* data, const HeadLayout& layout, int64_t bytes, int64_t width) {
  return rows_aligned(data, layout.batch_stride, bytes, width) &&
         rows_aligned(data, layout.head_stride, bytes, width) &&
         rows_aligned(data, layout.token_stride, bytes, width);
}

// Calls body with the widest vector that everything is aligned for: 16 bytes, or one element.
template <class T, class Aligned, class Body>
int with_width(int64_t depth, Aligned all, Body body) {
  constexpr int widest = 16 / sizeof(T);
  if (depth % widest == 0 && depth / widest <= HEAD_THREADS && all(widest)) {
    return body(std::integral_constant<int, widest>());
  }
  return depth <= HEAD_THREADS ? body(std::integral_constant<int, 1>()) : BAD_SHAPE;
}

}  // namespace
}  // namespace esp

extern "C" int espalier_head_mask(const void* context, const void* mask, void* y, int64_t batch,
                                  int64_t heads, int64_t tokens, int64_t depth, int64_t in_batch,
                                  int64_t in_head, int64_t in_token, int64_t out_batch,
                                  int64_t out_head, int64_t out_token, int64_t mask_batch,
                                  int64_t mask_head, int64_t type, int64_t mask_type,
                                  void* stream) {
  using namespace esp;
  HeadShape shape = head_shape(batch, heads, tokens, depth);
  int64_t blocks = batch * heads * shape.chunks;
  if (blocks == 0 || depth == 0) return 0;
  HeadLayout in{in_batch, in_head, in_token}, out{out_batch, out_head, out_token};
  HeadVector vector{const_cast<void*>(mask), mask_type, mask_batch, mask_head};
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    auto all = [&](int64_t width) {
      return aligned(context, in, sizeof(T), width) && aligned(y, out, sizeof(T), width);
    };
    return with_width<T>(depth, all, [&](auto width) {
      constexpr int V = decltype(width)::value;
      dim3 grid(blocks), block(HEAD_THREADS);
      const T* from = static_cast<const T*>(context);
      T* to = static_cast<T*>(y);
      ESP_LAUNCH((head_forward<T, V>), grid, block, stream, from, vector, to, in, out, shape);
      return ESP_STATUS();
    });
  });
}

// Floats of workspace: a partial sum from every block.
extern "C" int64_t espalier_head_mask_backward_workspace(int64_t batch, int64_t heads,
                                                         int64_t tokens) {
  return batch * heads * esp::head_shape(batch, heads, tokens, 1).chunks;
}

// dmask: contiguous, (H,) where mask_batch is 0 and `per_row` is 0, else (B, H). Without tokens,
// zero.
extern "C" int espalier_head_mask_backward(
    const void* gradient, const void* context, const void* mask, void* down, void* dmask,
    void* workspace, int64_t floats, int64_t batch, int64_t heads, int64_t tokens, int64_t depth,
    int64_t up_batch, int64_t up_head, int64_t up_token, int64_t in_batch, int64_t in_head,
    int64_t in_token, int64_t out_batch, int64_t out_head, int64_t out_token, int64_t mask_batch,
    int64_t mask_head, int64_t type, int64_t mask_type, int64_t per_row, void* stream) {
  using namespace esp;
  HeadShape shape = head_shape(batch, heads, tokens, depth);
  int64_t blocks = batch * heads * shape.chunks;
  if (floats < blocks) return SMALL_WORKSPACE;
  HeadLayout up{up_batch, up_head, up_token}, in{in_batch, in_head, in_token};
  HeadLayout out{out_batch, out_head, out_token};
  HeadVector vector{const_cast<void*>(mask), mask_type, mask_batch, mask_head};
  HeadVector sums{dmask, mask_type, 0, 0};
  float* partial = static_cast<float*>(workspace);
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    auto all = [&](int64_t width) {
      return aligned(gradient, up, sizeof(T), width) && aligned(context, in, sizeof(T), width) &&
             aligned(down, out, sizeof(T), width);
    };
    return with_width<T>(most(depth, 1), all, [&](auto width) {
      constexpr int V = decltype(width)::value;
      dim3 block(HEAD_THREADS);
      if (blocks > 0 && depth > 0) {
        dim3 grid(blocks);
        const T* g = static_cast<const T*>(gradient);
        const T* c = static_cast<const T*>(context);
        T* to = static_cast<T*>(down);
        ESP_LAUNCH((head_backward<T, V>), grid, block, stream, g, c, vector, to, partial, up, in,
                   out, shape);
      }
      int64_t entries = per_row ? batch * heads : heads, rows = per_row ? 1 : batch;
      if (entries > 0) {
        HeadShape summed = shape;
        if (depth == 0) summed.chunks = 0;
        dim3 grid(ceil_div(entries, HEAD_WARPS));
        ESP_LAUNCH(head_finish, grid, block, stream, partial, sums, summed, entries, rows);
      }
      return ESP_STATUS();
    });
  });
}
