// Launchers of fold_cast and compact.
#include "fold.cuh"

namespace esp {
namespace {

constexpr int64_t BLOCKS = 264;  // of one weight: a constant, so that sums depend on sizes alone
constexpr int FIELDS = 12;       // of an item as the caller gives it

// The caller's table: FIELDS integers an item, addresses and sizes in the order of FoldItem.
FoldItem read_item(const int64_t* field) {
  auto pointer = [&](int i) { return reinterpret_cast<void*>(field[i]); };
  FoldItem item = {};
  item.weight = pointer(0);
  item.rows = static_cast<const int64_t*>(pointer(1));
  item.columns = static_cast<const int64_t*>(pointer(2));
  item.row_gate = static_cast<const float*>(pointer(3));
  item.column_gate = static_cast<const float*>(pointer(4));
  item.out = pointer(5);
  item.dweight = pointer(6);
  item.drow_gate = static_cast<float*>(pointer(7));
  item.dcolumn_gate = static_cast<float*>(pointer(8));
  item.n_rows = field[9], item.n_columns = field[10], item.stride = field[11];
  return item;
}

void plan(FoldItem& item, int64_t in_bytes, int64_t out_bytes) {
  bool vectors = item.columns == nullptr &&
                 rows_aligned(item.weight, item.stride, in_bytes, FOLD_WIDTH) &&
                 rows_aligned(item.out, item.n_columns, out_bytes, FOLD_WIDTH) &&
                 rows_aligned(item.dweight, item.stride, in_bytes, FOLD_WIDTH);
  item.width = vectors ? FOLD_WIDTH : 1;
  item.tiles = ceil_div(item.n_columns, WARP * item.width);
  item.chunks = most(1, least(ceil_div(BLOCKS, most(1, item.tiles)), ceil_div(item.n_rows, FOLD_WARPS)));
}

// The most that any width needs: one column a thread has the most tiles, FOLD_WIDTH the most chunks.
int64_t floats(int64_t n_rows, int64_t n_columns) {
  int64_t tiles = ceil_div(n_columns, WARP);
  int64_t chunks = most(1, least(ceil_div(BLOCKS, most(1, ceil_div(n_columns, WARP * FOLD_WIDTH))),
                                 ceil_div(n_rows, FOLD_WARPS)));
  return tiles * n_rows + chunks * n_columns;
}

// Fills a launch's table and returns its blocks; empty weights take none.
int64_t make_table(FoldTable& table, const int64_t* items, int64_t count, int64_t in_bytes,
                   int64_t out_bytes, float* workspace) {
  int64_t blocks = 0;
  table.count = 0;
  for (int64_t i = 0; i < count; ++i) {
    FoldItem item = read_item(items + i * FIELDS);
    plan(item, in_bytes, out_bytes);
    item.first_block = blocks;
    if (workspace) {
      item.row_partial = workspace;
      item.column_partial = workspace + item.tiles * item.n_rows;
      workspace += floats(item.n_rows, item.n_columns);
    }
    blocks += static_cast<int64_t>(item.tiles) * item.chunks;
    table.item[table.count++] = item;
  }
  return blocks;
}

template <class Body> int with_types(int64_t in, int64_t out, Body body) {
  if (in != out && in != FLOAT32) return BAD_TYPE;
  if (in == out) return with_type(in, [&](auto type) { return body(type, type); });
  return with_type(out, [&](auto type) { return body(float(), type); });
}

}  // namespace
}  // namespace esp

extern "C" int64_t espalier_fold_items() { return esp::FOLD_ITEMS; }

// `items` is host memory, read before the call returns.
extern "C" int espalier_fold(const int64_t* items, int64_t count, int64_t in_type, int64_t out_type,
                             void* stream) {
  using namespace esp;
  if (count > FOLD_ITEMS) return BAD_SHAPE;
  return with_types(in_type, out_type, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    FoldTable table;
    int64_t blocks = make_table(table, items, count, sizeof(In), sizeof(Out), nullptr);
    if (blocks > 0) {
      ESP_LAUNCH((fold_forward<In, Out>), dim3(blocks), dim3(WARP, FOLD_WARPS), stream, table);
    }
    return ESP_STATUS();
  });
}

extern "C" int64_t espalier_fold_workspace(int64_t n_rows, int64_t n_columns) {
  return esp::floats(n_rows, n_columns) * sizeof(float);
}

// Workspace: the sum of espalier_fold_workspace over the items. Where indices leave places out, the
// caller gives dweight full of zeros.
extern "C" int espalier_fold_backward(const int64_t* items, int64_t count, void* workspace,
                                      int64_t bytes, int64_t in_type, int64_t out_type, void* stream) {
  using namespace esp;
  if (count > FOLD_ITEMS) return BAD_SHAPE;
  int64_t needed = 0, longest = 0;
  for (int64_t i = 0; i < count; ++i) {
    FoldItem item = read_item(items + i * FIELDS);
    needed += espalier_fold_workspace(item.n_rows, item.n_columns);
    if (item.drow_gate) longest = most(longest, item.n_rows);
    if (item.dcolumn_gate) longest = most(longest, item.n_columns);
  }
  if (bytes < needed) return SMALL_WORKSPACE;
  return with_types(in_type, out_type, [&](auto in, auto out) {
    using In = decltype(in);
    using Out = decltype(out);
    FoldTable table;
    float* floats = static_cast<float*>(workspace);
    int64_t blocks = make_table(table, items, count, sizeof(In), sizeof(Out), floats);
    dim3 block(WARP, FOLD_WARPS);
    if (blocks > 0) ESP_LAUNCH((fold_backward<In, Out>), dim3(blocks), block, stream, table);
    if (longest > 0) {
      dim3 grid(ceil_div(longest, FOLD_THREADS), table.count, 2);
      ESP_LAUNCH(fold_finish, grid, dim3(FOLD_THREADS), stream, table);
    }
    return ESP_STATUS();
  });
}
