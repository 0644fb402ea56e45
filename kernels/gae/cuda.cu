#include "cuda.h"

#include "common/cuda/tokens.cuh"
#include "common/kl_math.h"
#include "common/scan.h"

// A block takes a row from its end, a tile at a time: four tokens a lane, 128 a warp. Lanes scan by doubling, warps are folded one
// after the other, so the bits of a row depend on its distance to its own end alone, not on how many warps share it.
//
// Two scans, as on the CPU: the value that a token finds to its right is the nearest counted one's, found exactly by a ballot;
// then A = d + c A' with c = 0 or gamma lambda.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int warp_tokens = 32 * group;
constexpr int most_warps = 8;

// What a thread holds of its four tokens; index 0 is the nearest to the row's end.
struct Inputs { float rewards[group], ref[group], values[group], mask[group]; };

// A thread's tokens lie at the distances [from, from + 4) of the row's end; `left` is how many there are from there to its start.
__device__ __forceinline__ void load_back(const Place& place, const Array& a, int64_t left, float (&x)[group]) {
  if (left >= group) {
    float forward[group];
    place.load(a, left - group, group, forward);
#pragma unroll
    for (int i = 0; i < group; ++i) x[i] = forward[group - 1 - i];
  } else {
#pragma unroll
    for (int i = 0; i < group; ++i) x[i] = i < left ? place.at(a, left - 1 - i) : 0.f;
  }
}

template <bool Shaping>
__device__ __forceinline__ Inputs load_inputs(const RolloutArgs& a, const Place& place, int64_t from) {
  Inputs in{};
  const int64_t left = place.size() - from;
  if (left <= 0) return in;
  load_back(place, Shaping ? a.logprobs : a.rewards, left, in.rewards);
  if (Shaping) load_back(place, a.ref_logprobs, left, in.ref);
  if (a.values) load_back(place, a.values, left, in.values);
  if (a.mask) {
    load_back(place, a.mask, left, in.mask);
  } else {
#pragma unroll
    for (int i = 0; i < group; ++i) in.mask[i] = i < left ? 1.f : 0.f;
  }
  return in;
}

__device__ __forceinline__ void store_back(void* to, const Place& place, int64_t from, const float (&x)[group]) {
  const int64_t left = place.size() - from;
  if (!to || left <= 0) return;
  float* end = static_cast<float*>(to) + place.start() + left;
  if (left >= group) {
    float forward[group];
#pragma unroll
    for (int i = 0; i < group; ++i) forward[i] = x[group - 1 - i];
    store_run(end - group, group, forward);
  } else {
#pragma unroll
    for (int i = 0; i < group; ++i) if (i < left) end[-1 - i] = x[i];
  }
}

struct WarpTotals {
  float c[most_warps], d[most_warps], value[most_warps];
  int has_value[most_warps], has_mask[most_warps];
};

template <bool Shaping, bool Advantages>
__global__ void __launch_bounds__(32 * most_warps) rollout_kernel(RolloutArgs a) {
  WarpTotals* totals = reinterpret_cast<WarpTotals*>(block_memory());  // two, by turns
  const int64_t b = blockIdx.x;
  const Place place{&a.rows, b, false};
  const int64_t size = place.size(), tile = static_cast<int64_t>(warp_count()) * warp_tokens;
  const int lane = lane_id(), warp = warp_id();
  const float gamma = static_cast<float>(a.gamma), gl = static_cast<float>(a.gamma * (a.lams ? a.lams[b] : a.lam));
  const bool zeroing = a.mask_mode == MaskMode::zero && a.mask, carrying = a.mask_mode == MaskMode::carry && a.mask;
  float score = Shaping ? row_element(a.scores, b) : 0.f;
  if (score > a.score_clip) score = static_cast<float>(a.score_clip);
  if (score < -a.score_clip) score = static_cast<float>(-a.score_clip);
  float next_value = a.bootstrap ? row_element(a.bootstrap, b) : 0.f, carried = 0.f;
  bool score_given = false;
  const unsigned before_me = (1u << lane) - 1;

  Inputs in = load_inputs<Shaping>(a, place, threadIdx.x * static_cast<int64_t>(group));
  int turn = 0;
  for (int64_t begin = 0; begin < size; begin += tile, turn ^= 1) {
    const int64_t from = begin + threadIdx.x * group;
    const Inputs ahead = begin + tile < size ? load_inputs<Shaping>(a, place, from + tile) : Inputs{};
    WarpTotals& shared = totals[turn];

    bool counted[group];
    float values[group];
    bool any_mask = false, any_value = false;
    float last_value = 0.f;
#pragma unroll
    for (int i = 0; i < group; ++i) {
      const bool inside = from + i < size;
      counted[i] = inside && (!carrying || in.mask[i] != 0);
      values[i] = zeroing ? (in.mask[i] != 0 ? in.mask[i] * in.values[i] : 0.f) : in.values[i];
      any_mask = any_mask || in.mask[i] != 0;
      if (counted[i]) any_value = true, last_value = values[i];
    }
    const unsigned with_value = __ballot_sync(all_lanes, any_value), with_mask = __ballot_sync(all_lanes, any_mask);
    const unsigned nearer = with_value & before_me;
    const float from_lane = __shfl_sync(all_lanes, last_value, nearer ? 31 - __clz(static_cast<int>(nearer)) : 0);
    const float of_warp = __shfl_sync(all_lanes, last_value, with_value ? 31 - __clz(static_cast<int>(with_value)) : 0);
    if (lane == 0) shared.has_value[warp] = with_value != 0, shared.value[warp] = of_warp, shared.has_mask[warp] = with_mask != 0;
    __syncthreads();

    float kl[group];
    if (Shaping) {
      bool given = score_given || (with_mask & before_me) != 0;
      for (int w = 0; w < warp; ++w) given = given || shared.has_mask[w];
#pragma unroll
      for (int i = 0; i < group; ++i) {
        Lane value, slope;
        kl_clamped(static_cast<KlKind>(a.kl_kind), Lane{in.rewards[i] - in.ref[i]}, Lane{INFINITY}, Lane{static_cast<float>(a.kl_clip)}, false, value, slope);
        const bool here = in.mask[i] != 0;
        kl[i] = here ? value.r : 0.f;
        float reward = static_cast<float>(-a.kl_coef) * kl[i];
        if (here && !given) reward += score, given = true;
        in.rewards[i] = reward;
      }
      for (int w = 0; w < warp_count(); ++w) score_given = score_given || shared.has_mask[w];
    }
    if (Advantages) {
      float value = next_value;
      for (int w = 0; w < warp; ++w) if (shared.has_value[w]) value = shared.value[w];
      if (nearer) value = from_lane;
      for (int w = 0; w < warp_count(); ++w) if (shared.has_value[w]) next_value = shared.value[w];
      Lane c[group], d[group], all_c{1.f}, all_d{0.f};
#pragma unroll
      for (int i = 0; i < group; ++i) {
        const float reward = zeroing ? (in.mask[i] != 0 ? in.mask[i] * in.rewards[i] : 0.f) : in.rewards[i];
        c[i] = {counted[i] ? gl : 1.f};
        d[i] = {counted[i] ? fmaf(gamma, value, reward) - values[i] : 0.f};
        if (counted[i]) value = values[i];
        Lane step_c = c[i], step_d = d[i];
        compose(step_c, step_d, all_c, all_d);
        all_c = step_c, all_d = step_d;
      }
      // lanes: each after all lanes nearer to the end
#pragma unroll
      for (int distance = 1; distance < 32; distance <<= 1) {
        const Lane other_c{__shfl_up_sync(all_lanes, all_c.r, distance)}, other_d{__shfl_up_sync(all_lanes, all_d.r, distance)};
        if (lane >= distance) compose(all_c, all_d, other_c, other_d);
      }
      const Lane up_c{__shfl_up_sync(all_lanes, all_c.r, 1)}, up_d{__shfl_up_sync(all_lanes, all_d.r, 1)};
      if (lane == 31) shared.c[warp] = all_c.r, shared.d[warp] = all_d.r;
      __syncthreads();
      float y = carried;
      for (int w = 0; w < warp_count(); ++w) {
        if (w == warp) carried = y;
        y = fmaf(shared.c[w], y, shared.d[w]);
      }
      float mine = lane == 0 ? carried : fmaf(up_c.r, carried, up_d.r);
      carried = y;
      float out[group], returns[group];
#pragma unroll
      for (int i = 0; i < group; ++i) {
        mine = fmaf(c[i].r, mine, d[i].r);
        out[i] = mine;
        returns[i] = mine + values[i];
      }
      store_back(a.advantages, place, from, out);
      store_back(a.returns, place, from, returns);
    }
    if (Shaping) {
      store_back(a.shaped, place, from, in.rewards);
      store_back(a.kl, place, from, kl);
    }
    in = ahead;
  }
}

// Warps for rows of this length: enough that a row is a few tiles, few enough that short rows leave none idle.
inline int warps_for(int64_t length) {
  int warps = 1;
  while (warps < most_warps && warps * warp_tokens < length) warps *= 2;
  return warps;
}

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int rollout(const RolloutArgs& a, const Launch& l) {
  if (a.rows.total() == 0) return 0;  // and an empty tensor's address is null, which elsewhere says that there is none
  const int64_t rows = a.rows.count, length = a.rows.cu_seqlens ? (a.rows.total() + rows - 1) / rows : a.rows.length;
  const Grid grid{rows, 32 * warps_for(length), 2 * sizeof(WarpTotals)};
  const auto stream = static_cast<cudaStream_t>(l.stream);
  const bool shaping = !a.rewards, advantages = a.advantages != nullptr;
  if (shaping && advantages) return launch(rollout_kernel<true, true>, grid, stream, a);
  if (shaping) return launch(rollout_kernel<true, false>, grid, stream, a);
  return launch(rollout_kernel<false, true>, grid, stream, a);
}

}}  // namespace
