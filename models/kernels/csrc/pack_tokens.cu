// Launchers of pack_tokens and unpack_tokens. Strides come in elements of `bytes` bytes each.
#include "pack_tokens.cuh"

namespace esp {
namespace {

// Calls body(T(), V) with the unit that everything is aligned for: 16 bytes, or one element.
template <class Body> int with_unit(int64_t bytes, bool wide, Body body) {
  using One = std::integral_constant<int, 1>;
  if (wide) return body(uint32_t(), std::integral_constant<int, 4>());
  switch (bytes) {
    case 1:
      return body(uint8_t(), One());
    case 2:
      return body(uint16_t(), One());
    case 4:
      return body(uint32_t(), One());
    case 8:
      return body(uint64_t(), One());
    default:
      return BAD_TYPE;
  }
}

template <bool BACK> int move(void* padded, const void* keep, void* packed, void* cumulative,
                              void* indices, PackShape shape, int64_t width, int64_t bytes,
                              void* stream) {
  int64_t blocks = ceil_div(shape.rows * shape.tokens, PACK_TOKENS);
  if (blocks == 0) return 0;
  bool wide = width * bytes % 16 == 0;
  for (int64_t stride : {shape.row_stride, shape.token_stride}) {
    wide = wide && rows_aligned(padded, stride * bytes, 1, 16);
  }
  wide = wide && rows_aligned(packed, shape.packed_stride * bytes, 1, 16);
  return with_unit(bytes, wide, [&](auto element, auto vector) {
    using T = decltype(element);
    constexpr int V = decltype(vector)::value;
    PackShape scaled = shape;
    scaled.units = width * bytes / (V * sizeof(T));
    for (int64_t* stride : {&scaled.row_stride, &scaled.token_stride, &scaled.packed_stride}) {
      *stride = *stride * bytes / static_cast<int64_t>(sizeof(T));
    }
    dim3 grid(blocks), block(PACK_THREADS);
    T *outer = static_cast<T*>(padded), *inner = static_cast<T*>(packed);
    const uint8_t* kept = static_cast<const uint8_t*>(keep);
    int32_t* sums = static_cast<int32_t*>(cumulative);
    int64_t* places = static_cast<int64_t*>(indices);
    ESP_LAUNCH((move_tokens<BACK, T, V>), grid, block, stream, outer, kept, inner, sums, places,
               scaled);
    return ESP_STATUS();
  });
}

}  // namespace
}  // namespace esp

// x (rows, tokens, width), keep (rows, tokens) -> packed (packed_rows, width), cumulative (rows +
// 1), indices (packed_rows); all but x contiguous; packed_rows is at most rows tokens. Writes
// nothing without tokens.
extern "C" int espalier_pack_tokens(const void* x, const void* keep, void* packed, void* cumulative,
                                    void* indices, int64_t rows, int64_t tokens, int64_t width,
                                    int64_t packed_rows, int64_t row_stride, int64_t token_stride,
                                    int64_t bytes, void* stream) {
  esp::PackShape shape{rows, tokens, 0, packed_rows, row_stride, token_stride, width};
  return esp::move<false>(const_cast<void*>(x), keep, packed, cumulative, indices, shape, width,
                          bytes, stream);
}

// packed (packed_rows, width) with unit stride -> x (rows, tokens, width), contiguous.
extern "C" int espalier_unpack_tokens(const void* packed, const void* keep, void* x, int64_t rows,
                                      int64_t tokens, int64_t width, int64_t packed_rows,
                                      int64_t packed_stride, int64_t bytes, void* stream) {
  esp::PackShape shape{rows, tokens, 0, packed_rows, tokens * width, width, packed_stride};
  return esp::move<true>(x, keep, const_cast<void*>(packed), nullptr, nullptr, shape, width, bytes,
                         stream);
}
