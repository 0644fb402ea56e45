#include "one_read.h"

#include "common/cuda/cluster.cuh"
#include "common/cuda/tokens.cuh"
#include "policy_loss/math.h"
#include "row.cuh"

// A cluster of blocks holds a row in its shared memory, a slice each, copied there in bulk while the rows before are worked on. Each
// block's statistics go to all over distributed shared memory; the token's loss says what its gradient is multiplied by; the
// gradient is computed from the copy on chip. Memory is read once and written once.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int one_read_threads = 512;
constexpr int most_stages = 4, most_blocks = 8;
constexpr int64_t head_bytes = 2048, shared_limit = 227 * 1024;

struct Slices {
  int64_t columns;  // of a block, whole chunks
  int cluster, stages;
};

struct BlockTotals { double sum, weighted; float max, label; };

// The gradient of a row's logits: factor and constant as for `row_gradient`, in units of log 2; `label` more at the label.
struct RowSlope {
  float max, constant, factor, label;
  bool nothing;
};

struct Head {
  uint64_t arrived[most_stages];
  BlockTotals totals[2];                            // by turns: a block may be a row ahead
  RowSlope slope;
  double space[2 * (one_read_threads / 32)];
};
static_assert(sizeof(Head) <= head_bytes, "");

// By the mathematics of policy_loss.
template <PolicyKind kind>
__device__ __forceinline__ RowSlope row_slope(const cuda::OneReadArgs& args, int64_t row, const RowTotals& all, float label, double scale) {
  const PolicyArgs& p = args.policy;
  const double log_sum = log_of_sum(all.sum), entropy = entropy_of(log_sum, all.weighted, all.sum);
  const float logprob = static_cast<float>(logprob_of(label, all.max, scale, log_sum));
  const Place place{&p.rows, 0, true};
  auto value = [&](const Array& from) {
    float v[group] = {};
    if (from) place.load(from, row, 1, v);
    return Lane{v[0]};
  };
  float mask[group];
  place.load_mask(p.mask, row, 1, mask);
  const Token<Lane> token{{mask[0]}, {logprob}, value(p.old_logprobs), value(p.advantages), value(p.rollout_logprobs),
                          value(p.ref_logprobs), {static_cast<float>(entropy)}};
  TokenSums<Lane> sums;
  const Lane slope = sums.template add<kind>(p, RowPlan{}, token);
  const double weight = mask[0] != 0 ? static_cast<double>(mask[0]) * *args.share : 0.0;
  const double g = weight != 0 ? weight * slope.r : 0.0, g_entropy = args.entropy_term ? -weight * p.entropy_coef : 0.0;
  const RowGradient of = row_gradient(g, g_entropy, 0, entropy, static_cast<float>(log_sum), scale);
  return {all.max, static_cast<float>(of.constant), static_cast<float>(of.slope * static_cast<double>(ln2)), static_cast<float>(g * scale),
          g == 0 && g_entropy == 0};
}

template <class S, PolicyKind kind>
__global__ void __launch_bounds__(one_read_threads, 1) one_read_kernel(cuda::OneReadArgs args, Slices slices) {
#if defined(FASTRLHF_CLUSTERS)
  const LogprobsArgs& a = args.logprobs;
  Head& head = *reinterpret_cast<Head*>(block_memory());
  const unsigned rank = cluster_rank();
  const int64_t begin = rank * slices.columns, end = begin + slices.columns < a.vocab ? begin + slices.columns : a.vocab;
  const int64_t mine = end > begin ? end - begin : 0, slice_bytes = slices.columns * static_cast<int64_t>(sizeof(S));
  const int64_t clusters = gridDim.x / slices.cluster, first = blockIdx.x / slices.cluster;
  auto buffer = [&](int stage) { return reinterpret_cast<S*>(block_memory() + head_bytes + stage * slice_bytes); };
  auto fetch = [&](int64_t row, int stage) {  // one thread; ignored rows are not read
    if (row >= a.rows || mine == 0 || row_ignored(a, row)) return;
    const S* x = static_cast<const S*>(a.logits.data) + a.logits.offset(row) + begin;
    bulk_expect(&head.arrived[stage], static_cast<uint32_t>(mine * sizeof(S)));
    bulk_load(buffer(stage), x, static_cast<uint32_t>(mine * sizeof(S)), &head.arrived[stage]);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < slices.stages; ++s) barrier_init(&head.arrived[s], 1);
    barrier_init_done();
  }
  cluster_barrier();
  if (threadIdx.x == 0)
    for (int s = 0; s < slices.stages; ++s) fetch(first + s * clusters, s);

  uint32_t phases = 0;  // a bit for each stage
  int stage = 0, turn = 0;
  for (int64_t row = first; row < a.rows; row += clusters) {
    S* out = static_cast<S*>(args.grad.data) + args.grad.offset(row) + begin;
    const S* x = buffer(stage);
    auto store = [&](int64_t at, const float (&g)[chunk<S>]) {
      S s[chunk<S>];
#pragma unroll
      for (int i = 0; i < chunk<S>; ++i) round_to(g[i], s[i]);
      Bytes16 bytes;
      memcpy(&bytes, s, 16);
      store_streaming(out + at, bytes);
    };
    if (row_ignored(a, row)) {
      if (rank == 0) write_ignored_row(a, row);
      const float zeros[chunk<S>] = {};
      for (int64_t at = threadIdx.x * chunk<S>; at < mine; at += one_read_threads * chunk<S>) store(at, zeros);
    } else {
      if (mine > 0) {
        bulk_wait(&head.arrived[stage], (phases >> stage) & 1);
        phases ^= 1u << stage;
      }
      const double scale = scale_of(a, row);
      const float c = static_cast<float>(scale * static_cast<double>(log2e));
      auto load = [&](int64_t at, float (&v)[chunk<S>]) {
        const Bytes16 bytes = load_plain(x + at);
        S s[chunk<S>];
        memcpy(s, &bytes, 16);
#pragma unroll
        for (int i = 0; i < chunk<S>; ++i) v[i] = to_float(s[i]);
      };
      RowState state;
      for (int64_t at = threadIdx.x * chunk<S>; at < mine; at += one_read_threads * chunk<S>) {
        float v[chunk<S>];
        load(at, v);
        state.template add<true>(v, c);
      }
      const RowTotals own = block_totals(state, c, head.space);
      const int64_t y = label_column(a, row, 0) - begin;
      if (threadIdx.x == 0) head.totals[turn] = {own.sum, own.weighted, own.max, y >= 0 && y < mine ? to_float(x[y]) : -INFINITY};
      cluster_barrier();
      if (warp_id() == 0) {  // what concerns the row as a whole, much of it in double
        BlockTotals there = {};
        if (lane_id() < slices.cluster) there = *of_block(&head.totals[turn], static_cast<unsigned>(lane_id()));
        RowTotals all;
        float label = -INFINITY;
        for (int r = 0; r < slices.cluster; ++r) {
          RowTotals one;
          one.max = __shfl_sync(all_lanes, there.max, r);
          one.sum = __shfl_sync(all_lanes, there.sum, r), one.weighted = __shfl_sync(all_lanes, there.weighted, r);
          all.merge(one, scale);
          const float other = __shfl_sync(all_lanes, there.label, r);
          if (!(other <= label)) label = other;
        }
        if (rank == 0) write_row(a, row, all, [&](int64_t) { return label; });
        const RowSlope slope = row_slope<kind>(args, row, all, label, scale);
        if (threadIdx.x == 0) head.slope = slope;
      }
      __syncthreads();
      const RowSlope of = head.slope;
      for (int64_t at = threadIdx.x * chunk<S>; at < mine; at += one_read_threads * chunk<S>) {
        float v[chunk<S>];
        load(at, v);
#pragma unroll
        for (int i = 0; i < chunk<S>; ++i) {
          const float u = (v[i] - of.max) * c;
          v[i] = of.nothing ? 0.f : exp2_fast(u) * fmaf(fmaxf(u, -200.f), of.factor, of.constant);
        }
        if (y >= at && y < at + chunk<S>) {
#pragma unroll
          for (int i = 0; i < chunk<S>; ++i) if (at + i == y) v[i] += of.label;
        }
        store(at, v);
      }
      turn ^= 1;
    }
    __syncthreads();  // the copy is read: its place is free
    if (threadIdx.x == 0) fetch(row + slices.stages * clusters, stage);
    stage = stage + 1 == slices.stages ? 0 : stage + 1;
  }
  cluster_barrier();  // no block leaves while another may still read its totals
#endif
}

// The smallest cluster whose blocks hold three rows at a time, or two in the largest.
inline Slices slices_for(int64_t vocab, int64_t bytes) {
  const int64_t elements = 16 / bytes;
  for (int cluster = 1; cluster <= most_blocks; cluster *= 2) {
    const int64_t columns = ((vocab + cluster - 1) / cluster + elements - 1) / elements * elements;
    const int64_t stages = (shared_limit - head_bytes) / (columns * bytes);
    if (stages >= 3 || (cluster == most_blocks && stages >= 2))
      return {columns, cluster, static_cast<int>(stages < most_stages ? stages : most_stages)};
  }
  return {0, 0, 0};
}

template <class S, PolicyKind kind>
inline int launch_kind(const cuda::OneReadArgs& a, const Launch& l) {
  const Slices slices = slices_for(a.logprobs.vocab, sizeof(S));
  Grid grid{slices.cluster, one_read_threads, head_bytes + slices.stages * slices.columns * static_cast<int64_t>(sizeof(S)), slices.cluster};
  const int64_t resident = resident_clusters(one_read_kernel<S, kind>, grid);
  grid.blocks = slices.cluster * (a.logprobs.rows < resident ? a.logprobs.rows : resident);
  return launch(one_read_kernel<S, kind>, grid, static_cast<cudaStream_t>(l.stream), a, slices);
}

template <class S>
inline int launch_one_read(const cuda::OneReadArgs& a, const Launch& l) {
  switch (a.policy.kind) {
    case PolicyKind::reinforce: return launch_kind<S, PolicyKind::reinforce>(a, l);
    case PolicyKind::cispo: return launch_kind<S, PolicyKind::cispo>(a, l);
    case PolicyKind::sapo: return launch_kind<S, PolicyKind::sapo>(a, l);
    default: return launch_kind<S, PolicyKind::ppo>(a, l);
  }
}

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

bool one_read_fits(const Matrix& m, int64_t vocab, int major) {
  const int64_t bytes = element_size(m.dtype);
  const bool aligned = reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.outer_stride * bytes % 16 == 0 && (m.inner == 1 || m.inner_stride * bytes % 16 == 0);
  return major >= 9 && m.dtype != DType::f64 && aligned && vocab * bytes % 16 == 0 && slices_for(vocab, bytes).cluster > 0;
}

int one_read(const OneReadArgs& a, const Launch& l) {
  switch (a.logprobs.logits.dtype) {
    case DType::bf16: return launch_one_read<bf16>(a, l);
    case DType::f16: return launch_one_read<half>(a, l);
    default: return launch_one_read<float>(a, l);
  }
}

}}  // namespace
