// kernels/common/cuda/tile_layout.h against CuTe: one line for each, with the number of differences.
#define FASTRLHF_ISA host
#include "common/cuda/tile_layout.h"

#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <cutlass/numeric_types.h>

#include <cstdio>

using namespace cute;
using namespace fastrlhf::host;
using Element = cutlass::bfloat16_t;
using Instruction = SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>;

int fragment() {
  const auto layout = typename MMA_Traits<Instruction>::CLayout{};
  int differences = 0;
  for (int thread = 0; thread < 128; ++thread)
    for (int i = 0; i < fragment_size; ++i) differences += layout(thread, i) != fragment_row(thread, i) + 64 * fragment_column(thread, i);
  return differences;
}

template <class Tile>
int swizzle(const Tile& tile, Element* memory) {
  int differences = 0;
  for (int row = 0; row < 256; ++row)
    for (int column = 0; column < tile_depth; ++column)
      differences += reinterpret_cast<uintptr_t>(&tile(row, column)) != swizzled_address(reinterpret_cast<uintptr_t>(memory + row * tile_depth + column));
  return differences;
}

template <class Tile>
int descriptor(const Tile& tile) {
  const auto slice = local_tile(tile, Shape<Int<256>, Int<product_depth>>{}, make_coord(0, 0));
  const uint64_t theirs = SM90::GMMA::make_gmma_desc<GMMA::Major::K>(slice).desc_;  // on the host the address is 0
  const auto steps = make_tiled_mma(Instruction{}).get_slice(0).make_fragment_B(make_tiled_mma(Instruction{}).get_slice(0).partition_B(tile));
  const uint64_t step = steps.layout()(0, 0, 1) - steps.layout()(0, 0, 0);
  return (operand_descriptor(0) != theirs) + (operand_descriptor(product_depth * 2) != theirs + step) + (operand_descriptor(0x40000) != theirs);
}

int main() {
  alignas(1024) static Element memory[256 * tile_depth];
  const auto tile = make_tensor(make_smem_ptr(memory), tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, Shape<_256, Int<tile_depth>>{}));
  std::printf("fragment %d\nswizzle %d\ndescriptor %d\n", fragment(), swizzle(tile, memory), descriptor(tile));
}
