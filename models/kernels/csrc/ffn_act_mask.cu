// Launchers of ffn_act_mask: choose the vector width and the grid.
#include "ffn_act_mask.cuh"

namespace esp {
namespace {

// Blocks of a launch that fill any current GPU several times over. A constant, not the device's
// number of processors: the order of sums, and so every bit of them, depends on sizes alone.
constexpr int64_t FORWARD_BLOCKS = 1056, BACKWARD_BLOCKS = 528;

// Rows are shared out among this many blocks, for each tile of columns.
int64_t row_chunks(int64_t rows, int64_t columns, int64_t width, int64_t blocks) {
  int64_t tiles = ceil_div(columns, WARP * width);
  return most(1, least(ceil_div(blocks, tiles), ceil_div(rows, FFN_WARPS)));
}

// Calls body with the activation and the mask's place as compile-time constants.
template <class Body> int with_options(int64_t activation, int64_t mask_first, Body body) {
  auto place = [&](auto a) {
    return mask_first ? body(a, std::true_type()) : body(a, std::false_type());
  };
  switch (activation) {
    case GELU: return place(std::integral_constant<int, GELU>());
    case GELU_TANH: return place(std::integral_constant<int, GELU_TANH>());
    case QUICK_GELU: return place(std::integral_constant<int, QUICK_GELU>());
    default: return BAD_OPTION;
  }
}

// Calls body with the widest vector that all of the rows are aligned for: 16 bytes, 8 bytes, or one
// element.
template <class T, class Aligned, class Body> int with_width(Aligned aligned, Body body) {
  constexpr int widest = 16 / sizeof(T);
  if (aligned(widest)) return body(std::integral_constant<int, widest>());
  if (aligned(widest / 2)) return body(std::integral_constant<int, widest / 2>());
  return body(std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace esp

extern "C" int espalier_ffn_act_mask(
    const void* x, const void* bias, const void* mask, void* y, int64_t rows, int64_t columns,
    int64_t x_stride, int64_t type, int64_t bias_type, int64_t mask_type, int64_t activation,
    int64_t mask_first, void* stream) {
  using namespace esp;
  if (rows == 0 || columns == 0) return 0;
  FfnShape shape{rows, columns, x_stride, columns};
  FfnVectors vectors{bias, mask, bias_type, mask_type};
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    auto aligned = [&](int64_t width) {
      return rows_aligned(x, x_stride, sizeof(T), width) && rows_aligned(y, columns, sizeof(T), width);
    };
    return with_options(activation, mask_first, [&](auto a, auto first) {
      return with_width<T>(aligned, [&](auto width) {
        constexpr int A = decltype(a)::value, V = decltype(width)::value;
        constexpr bool FIRST = decltype(first)::value;
        int64_t chunks = row_chunks(rows, columns, V, FORWARD_BLOCKS);
        dim3 grid(ceil_div(columns, WARP * V), chunks), block(WARP, FFN_WARPS);
        const T* in = static_cast<const T*>(x);
        T* out = static_cast<T*>(y);
        ESP_LAUNCH((ffn_forward<T, A, FIRST, V>), grid, block, stream, in, vectors, out, shape);
        return ESP_STATUS();
      });
    });
  });
}

// Bytes of workspace; the widest vector has the fewest tiles and so the most chunks.
extern "C" int64_t espalier_ffn_act_mask_backward_workspace(int64_t rows, int64_t columns) {
  using namespace esp;
  if (columns == 0) return 0;
  return row_chunks(rows, columns, 8, BACKWARD_BLOCKS) * 2 * columns * sizeof(float);
}

// dmask and dbias: null where not wanted. Without rows they are zero.
extern "C" int espalier_ffn_act_mask_backward(
    const void* gradient, const void* x, const void* bias, const void* mask, void* dx, void* dmask,
    void* dbias, void* workspace, int64_t bytes, int64_t rows, int64_t columns,
    int64_t gradient_stride, int64_t x_stride, int64_t type, int64_t bias_type, int64_t mask_type,
    int64_t activation, int64_t mask_first, void* stream) {
  using namespace esp;
  if (columns == 0) return 0;
  if (bytes < espalier_ffn_act_mask_backward_workspace(rows, columns)) return SMALL_WORKSPACE;
  FfnShape shape{rows, columns, x_stride, gradient_stride};
  FfnVectors vectors{bias, mask, bias_type, mask_type};
  FfnSums sums{dmask, dbias, mask_type, bias_type};
  float* partial = static_cast<float*>(workspace);
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    auto aligned = [&](int64_t width) {
      return rows_aligned(x, x_stride, sizeof(T), width) &&
             rows_aligned(gradient, gradient_stride, sizeof(T), width) &&
             rows_aligned(dx, columns, sizeof(T), width);
    };
    return with_options(activation, mask_first, [&](auto a, auto first) {
      return with_width<T>(aligned, [&](auto width) {
        constexpr int A = decltype(a)::value, V = decltype(width)::value;
        constexpr bool FIRST = decltype(first)::value;
        int64_t chunks = row_chunks(rows, columns, V, BACKWARD_BLOCKS);
        dim3 grid(ceil_div(columns, WARP * V), chunks), block(WARP, FFN_WARPS);
        const T* up = static_cast<const T*>(gradient);
        const T* in = static_cast<const T*>(x);
        T* down = static_cast<T*>(dx);
        ESP_LAUNCH((ffn_backward<T, A, FIRST, V>), grid, block, stream, up, in, vectors, down,
                   partial, shape);
        if (dmask || dbias) {
          dim3 finish(ceil_div(columns, WARP), 2);
          ESP_LAUNCH(ffn_finish, finish, block, stream, partial, sums, chunks, columns);
        }
        return ESP_STATUS();
      });
    });
  });
}
