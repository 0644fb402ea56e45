#include "cuda_sm90.h"

#include "common/cuda/hopper.cuh"
#include "fragment.cuh"

// Persistent blocks of three warpgroups: one copies tiles of hidden states and weights into a ring of four stages, two multiply
// them, 64 rows of logits each, and fold what they have in registers. Two blocks of a cluster take neighbouring rows, and each
// fetches half of the weights for both. What leaves the chip: statistics, and where asked for exponentials or a strip's gradient.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int tile_rows = 128, tile_columns = static_cast<int>(VocabSplit::tile), stages = 4;
constexpr int warpgroup = 128, consumers = 2, linear_threads = (1 + consumers) * warpgroup;
constexpr int copied_columns = tile_columns / 2;  // of a copy: what each of two blocks fetches
constexpr int hidden_tile = tile_rows * tile_depth, weight_tile = tile_columns * tile_depth;
constexpr uint32_t stage_bytes = 2 * (hidden_tile + weight_tile);
constexpr int64_t linear_shared = stages * static_cast<int64_t>(stage_bytes) + 2 * stages * 8 + 1024;  // 1024: to align it
static_assert(linear_shared <= 227 * 1024, "");
// 64 K registers: a product's accumulators are 128 a thread
constexpr int producer_registers = 40, consumer_registers = 232;
// Clocks for which the second multiplying warpgroup waits at the beginning, so that one folds while the other multiplies: the first tiles
// come after some 2000, four steps of the first take 2048, and the ring lets it be no more ahead. NOTES.md; 0: none.
constexpr int lag = 4096;
// Clusters of rows that are worked on at the same time: 2048 rows, whose hidden states stay in the L2 cache while the weights pass
constexpr int64_t row_group = 8;

struct TensorMaps { TensorMap hidden, weight; };

// The order of the work: groups of rows, in them parts of the vocabulary, in those the rows again. A unit is one part for the rows
// of a cluster.
struct Plan {
  int64_t row_clusters, parts, tiles, tiles_per_part, units;

  struct Unit { int64_t row_cluster, part; };

  FASTRLHF_HOST_DEVICE Plan(int64_t rows, int cluster, int64_t tiles_, int64_t tiles_per_part_)
      : row_clusters((rows + cluster * tile_rows - 1) / (cluster * tile_rows)), parts((tiles_ + tiles_per_part_ - 1) / tiles_per_part_),
        tiles(tiles_), tiles_per_part(tiles_per_part_), units(row_clusters * parts) {}
  FASTRLHF_HOST_DEVICE Unit at(int64_t i) const {
    const int64_t group = i / (row_group * parts), rest = i - group * row_group * parts, first = group * row_group;
    const int64_t size = row_clusters - first < row_group ? row_clusters - first : row_group;
    return {first + rest % size, rest / size};
  }
  FASTRLHF_HOST_DEVICE int64_t begin(const Unit& u) const { return u.part * tiles_per_part; }
  FASTRLHF_HOST_DEVICE int64_t end(const Unit& u) const {
    const int64_t e = begin(u) + tiles_per_part;
    return e < tiles ? e : tiles;
  }
};

// A place in the ring of stages; the phase turns with every round.
struct Turn {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage < stages) return;
    stage = 0;
    phase ^= 1;
  }
};

struct Ring {
  uint16_t *hidden, *weight;
  uint64_t *full, *empty;  // a stage's bytes are there; all warps of the cluster that multiply are through with it

  __device__ __forceinline__ Ring() {
    unsigned char* memory = block_memory();
#if !defined(FASTRLHF_CUDA_HOST)
    memory += (1024 - shared_address(memory) % 1024) % 1024;
#endif
    hidden = reinterpret_cast<uint16_t*>(memory);
    weight = hidden + stages * hidden_tile;
    full = reinterpret_cast<uint64_t*>(memory + stages * static_cast<int64_t>(stage_bytes));
    empty = full + stages;
  }
};

// One thread.
__device__ __forceinline__ void copy_tiles(const TensorMaps& maps, const Plan& plan, const Ring& ring, int depth_tiles, int cluster, int rank) {
  Turn turn;
  for (int64_t i = blockIdx.x / cluster; i < plan.units; i += gridDim.x / cluster) {
    const Plan::Unit unit = plan.at(i);
    const int row = static_cast<int>(unit.row_cluster * cluster + rank) * tile_rows;
    for (int64_t tile = plan.begin(unit); tile < plan.end(unit); ++tile) {
      for (int k = 0; k < depth_tiles; ++k, turn.next()) {
        uint64_t* full = &ring.full[turn.stage];
        bulk_wait(&ring.empty[turn.stage], turn.phase ^ 1);
        bulk_expect(full, stage_bytes);
        tensor_load(maps.hidden, ring.hidden + turn.stage * hidden_tile, full, k * tile_depth, row, 1u << rank);
        for (int half = rank; half < 2; half += cluster)
          tensor_load(maps.weight, ring.weight + turn.stage * weight_tile + half * copied_columns * tile_depth, full, k * tile_depth,
                      static_cast<int>(tile) * tile_columns + half * copied_columns, (1u << cluster) - 1);
      }
    }
  }
}

__device__ __forceinline__ void release(const Ring& ring, int stage, int cluster) {
  if (lane_id() < cluster) barrier_arrive(&ring.empty[stage], static_cast<unsigned>(lane_id()));
}

// A warpgroup's 64 rows of a tile of logits. One product is always under way while the next one's operands are waited for.
__device__ __forceinline__ void multiply(float (&d)[fragment_size], const Ring& ring, Turn& turn, int depth_tiles, int first_row, int cluster) {
  int before = 0;
  for (int k = 0; k < depth_tiles; ++k, turn.next()) {
    bulk_wait(&ring.full[turn.stage], turn.phase);
    const uint16_t* a = ring.hidden + turn.stage * hidden_tile + first_row * tile_depth;
    const uint16_t* b = ring.weight + turn.stage * weight_tile;
    product_fence(d);
    product_begin();
#pragma unroll
    for (int i = 0; i < tile_depth; i += product_depth) product(d, operand(a + i), operand(b + i), k > 0 || i > 0);
    product_commit();
    product_fence(d);
    product_wait<1>();
    if (k > 0) release(ring, before, cluster);
    before = turn.stage;
  }
  product_wait<0>();
  product_fence(d);
  release(ring, before, cluster);
}

struct PartialsTask {
  LinearLogprobsArgs linear;
};
template <bool Plain>
struct FoldParts {
  using Task = PartialsTask;
  static constexpr bool whole_parts = true;
  PartStatistics<Plain, false> statistics;

  __device__ __forceinline__ void begin(const Task& t, int64_t row, int64_t count) { statistics.begin(t.linear, row, count); }
  __device__ __forceinline__ void tile(const Task& t, const float (&d)[fragment_size], int64_t, int64_t tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[row_part];
      statistics.add(t.linear, d, h, static_cast<int>(tile) * tile_columns, x);
    }
  }
  __device__ __forceinline__ void end(const Task& t, int64_t part, int64_t row, int64_t count) { statistics.end(t.linear, part, row, count); }
  __device__ __forceinline__ static void rest(const Task&, int64_t) {}
};

template <bool Plain>
struct KeepExponentials {
  using Task = LinearLogprobsExponentialsArgs;
  static constexpr bool whole_parts = true;
  PartStatistics<Plain, true> statistics;

  __device__ __forceinline__ void begin(const Task& t, int64_t row, int64_t count) { statistics.begin(t.linear, row, count); }
  __device__ __forceinline__ void tile(const Task& t, const float (&d)[fragment_size], int64_t row, int64_t tile) {
    const LogprobsArgs& a = t.linear.forward;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[row_part];
      statistics.add(t.linear, d, h, static_cast<int>(tile) * tile_columns, x);
      const int64_t at = row + 8 * h;
      store_part(static_cast<bf16*>(t.exponentials) + at * t.stride, x, static_cast<int>(tile) * tile_columns, static_cast<int>(a.vocab), at < a.rows);
      if (at < a.rows && lane_id() % 4 == 0) t.references[tile * a.rows + at] = statistics.rows[h].state.max;
    }
  }
  __device__ __forceinline__ void end(const Task& t, int64_t part, int64_t row, int64_t count) { statistics.end(t.linear, part, row, count); }
  __device__ __forceinline__ static void rest(const Task&, int64_t) {}
};

template <bool Plain, class S>
struct WriteGradient {
  using Task = LinearLogprobsGradientArgs;
  static constexpr bool whole_parts = false;
  TileGradient<Plain, S> gradient;

  __device__ __forceinline__ void begin(const Task& t, int64_t row, int64_t count) { gradient.begin(t, row, count); }
  __device__ __forceinline__ void tile(const Task& t, const float (&d)[fragment_size], int64_t row, int64_t tile) {
    gradient.add(t, d, row, static_cast<int>(tile) * tile_columns);
  }
  __device__ __forceinline__ void end(const Task&, int64_t, int64_t, int64_t) {}
  // Zeros in the rows from `first` on: the products that read the strip read all rows.
  __device__ __forceinline__ static void rest(const Task& t, int64_t first) {
    const LogprobsArgs& a = t.linear.forward;
    const int thread = static_cast<int>(threadIdx.x) - warpgroup;
    for (int64_t row = first + blockIdx.x; row < a.rows; row += gridDim.x) {
      S* out = static_cast<S*>(t.grad) + row * t.grad_stride;
      for (int64_t column = thread; column < a.vocab; column += consumers * warpgroup) round_to(0.f, out[column]);
    }
  }
};

template <class Fold>
__global__ void __launch_bounds__(linear_threads, 1)
linear_kernel(const FASTRLHF_GRID_CONSTANT TensorMaps maps, const FASTRLHF_GRID_CONSTANT typename Fold::Task task, int cluster) {
#if defined(FASTRLHF_SM90A)
  const LinearLogprobsArgs& a = task.linear;
  const Ring ring;
  const int rank = static_cast<int>(cluster_rank()), group = static_cast<int>(threadIdx.x) / warpgroup;
  if (threadIdx.x == 0) {
    tensor_prefetch(maps.hidden);
    tensor_prefetch(maps.weight);
    for (int s = 0; s < stages; ++s) {
      barrier_init(&ring.full[s], 1);
      barrier_init(&ring.empty[s], consumers * (warpgroup / 32) * cluster);
    }
    barrier_init_done();
  }
  cluster_barrier();
  const int64_t count = counted_rows(a);
  const VocabSplit split(a.forward.vocab);
  const Plan plan(count, cluster, split.tiles, Fold::whole_parts ? split.tiles_per_part : 1);
  const int depth_tiles = static_cast<int>((a.width + tile_depth - 1) / tile_depth);
  if (group == 0) {
    give_registers<producer_registers>();
    if (threadIdx.x == 0) copy_tiles(maps, plan, ring, depth_tiles, cluster, rank);
    __syncwarp();
    cluster_barrier();  // no block leaves while another may still arrive at its barriers
  } else {
    if (group == consumers && lag > 0) pass_time(lag);  // before: after it, ptxas spills
    take_registers<consumer_registers>();
    const int thread = static_cast<int>(threadIdx.x) % warpgroup, first_row = (group - 1) * (tile_rows / consumers);
    Turn turn;
    for (int64_t i = blockIdx.x / cluster; i < plan.units; i += gridDim.x / cluster) {
      const Plan::Unit unit = plan.at(i);
      const int64_t row = (unit.row_cluster * cluster + rank) * tile_rows + first_row + fragment_row(thread, 0);
      Fold fold;
      fold.begin(task, row, count);
      for (int64_t tile = plan.begin(unit); tile < plan.end(unit); ++tile) {
        float d[fragment_size];
        multiply(d, ring, turn, depth_tiles, first_row, cluster);
        fold.tile(task, d, row, tile);
      }
      fold.end(task, unit.part, row, count);
    }
    Fold::rest(task, plan.row_clusters * cluster * tile_rows);
    __syncwarp();
    cluster_barrier();
  }
#endif
}

template <class Fold>
inline int launch_linear(const typename Fold::Task& task, const Launch& l) {
  const LinearLogprobsArgs& a = task.linear;
  if (a.forward.rows == 0 || a.forward.vocab == 0) return 0;
  TensorMaps maps;
  if (const int error = encode_tensor_map(maps.hidden, a.hidden.data, a.forward.rows, a.width, a.hidden.row_stride, tile_rows)) return error;
  if (const int error = encode_tensor_map(maps.weight, a.weight.data, a.forward.vocab, a.width, a.weight.row_stride, copied_columns)) return error;
  const int cluster = a.forward.rows > tile_rows ? 2 : 1;
  const VocabSplit split(a.forward.vocab);
  const Plan plan(a.forward.rows, cluster, split.tiles, Fold::whole_parts ? split.tiles_per_part : 1);
  const int64_t resident = processors() / cluster > 0 ? processors() / cluster : 1;
  const Grid grid{cluster * (plan.units < resident ? plan.units : resident), linear_threads, linear_shared, cluster};
  return launch(linear_kernel<Fold>, grid, static_cast<cudaStream_t>(l.stream), maps, task, cluster);
}

inline bool plain(const LinearLogprobsArgs& a) { return a.forward.softcap == 0 && !a.bias; }

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int linear_logprobs_partials(const LinearLogprobsArgs& a, const Launch& l) {
  return plain(a) ? launch_linear<FoldParts<true>>({a}, l) : launch_linear<FoldParts<false>>({a}, l);
}

int linear_logprobs_exponentials(const LinearLogprobsExponentialsArgs& e, const Launch& l) {
  return plain(e.linear) ? launch_linear<KeepExponentials<true>>(e, l) : launch_linear<KeepExponentials<false>>(e, l);
}

int linear_logprobs_strip_gradient(const LinearLogprobsGradientArgs& g, const Launch& l) {
  if (g.grad_dtype == DType::bf16)
    return plain(g.linear) ? launch_linear<WriteGradient<true, bf16>>(g, l) : launch_linear<WriteGradient<false, bf16>>(g, l);
  return plain(g.linear) ? launch_linear<WriteGradient<true, float>>(g, l) : launch_linear<WriteGradient<false, float>>(g, l);
}

}}  // namespace
