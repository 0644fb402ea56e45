#include <stdexcept>
#include <string>

#include "bind.h"
#include "paged_attention/cpu.h"

namespace fastrlhf {

namespace {

void check(const PagedAttentionArgs& a, int64_t table_rows, int64_t blocks, int64_t angles) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t position = a.positions[t], row = a.sequences[t];
    if (row < 0 || row >= table_rows)
      throw py::index_error("sequences: " + std::to_string(row) + " at " + std::to_string(t) + ", the block table has " + std::to_string(table_rows) + " rows");
    if (position < 0 || position >= a.table_width * paged_block || position >= angles)
      throw py::index_error("positions: " + std::to_string(position) + " at " + std::to_string(t) + " lies outside the block table or the angles");
    for (int64_t i = 0; i <= position / paged_block; ++i) {
      const int32_t block = a.block_table[row * a.table_width + i];
      if (block < 0 || block >= blocks)
        throw py::index_error("block_table: " + std::to_string(block) + " in row " + std::to_string(row) + ", the cache has " + std::to_string(blocks) + " blocks");
    }
  }
}

}  // namespace

void bind_generation(py::module_& m) {
  // sizes: tokens, heads, kv_heads, dim, padded, table rows, table width, blocks, angles; qkv: three (address, stride)
  m.def("paged_attention", [](int dtype, const py::tuple& sizes, const py::tuple& qkv, uintptr_t cos, uintptr_t sin,
                              uintptr_t positions, uintptr_t sequences, uintptr_t block_table, uintptr_t k_cache,
                              uintptr_t v_cache, double scale, int64_t window, uintptr_t out, int threads) {
    PagedAttentionArgs a;
    auto size = [&](int i) { return sizes[i].cast<int64_t>(); };
    a.dtype = static_cast<DType>(dtype);
    a.tokens = size(0), a.heads = size(1), a.kv_heads = size(2), a.dim = size(3), a.padded = size(4), a.table_width = size(6);
    a.q = pointer<const void>(qkv[0].cast<uintptr_t>()), a.q_stride = qkv[1].cast<int64_t>();
    a.k = pointer<const void>(qkv[2].cast<uintptr_t>()), a.k_stride = qkv[3].cast<int64_t>();
    a.v = pointer<const void>(qkv[4].cast<uintptr_t>()), a.v_stride = qkv[5].cast<int64_t>();
    a.cos = pointer<const float>(cos), a.sin = pointer<const float>(sin);
    a.positions = pointer<const int64_t>(positions), a.sequences = pointer<const int64_t>(sequences);
    a.block_table = pointer<const int32_t>(block_table);
    a.k_cache = pointer(k_cache), a.v_cache = pointer(v_cache);
    a.scale = static_cast<float>(scale), a.window = window;
    a.out = pointer(out);
    a.threads = threads;
    check(a, size(5), size(7), size(8));
    py::gil_scoped_release release;
    paged_attention(a);
  });
}

}  // namespace fastrlhf
