// Where a row's cutoff is, without sorting: among the tokens that its coarse bins leave in question.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.cuh"
#include "cuda/tally.cuh"
#include "cuda/verify_task.cuh"

namespace pearl::cuda {

/// A row's statistics, merged from its tiles.
struct RowStatistics {
  float peak, sum, floor;  // floor: in z; the cutoff is not below it
  int32_t token;
};

/// Where the cutoff is to be sought: the values of these bins decide.
struct Search {
  int first_bin, last_bin;
  bool top_k, top_p;  // whose cutoff is among them
  Wide wanted_count;  // from first_bin on
  Wide wanted_mass;   // likewise; 0: top_p of what top-k keeps
  Wide mass_before;   // of the bins before first_bin
};

/// As many values are gathered in shared memory. If more are equal than bins can part, the row is read instead.
inline constexpr int kGathered = 2048;

struct CutoffShared {
  Tally mass;
  uint32_t count[kBins];
  float gathered[kGathered];
  int gathered_count, listed_count;
  bool leaves, last;
  Task task;
  RowStatistics row;
  Distribution z;
  Search search;
  LocateScratch scratch;
};

/// x[i], without an address: the vector stays in registers.
__device__ __forceinline__ float pick(const float (&x)[kVector], int i) {
  const float a = i & 1 ? x[1] : x[0], b = i & 1 ? x[3] : x[2], c = i & 1 ? x[5] : x[4], d = i & 1 ? x[7] : x[6];
  const float ab = i & 2 ? b : a, cd = i & 2 ? d : c;
  return i & 4 ? cd : ab;
}

/// Calls visit(z) for the tokens [begin, end) of a row whose z is at least `floor`.
template <int kVectors, class Visit>
__device__ __forceinline__ void for_each_scaled(LogitsRow row, const Distribution& d, int begin, int end, float floor,
                                                const Visit& visit) {
  row.size = min(row.size, end);
  for (int first = begin; first < row.size; first += kCutoffThreads * kVectors * kVector) {
    float x[kVectors][kVector];
    load(row, first + static_cast<int>(threadIdx.x) * kVector, kCutoffThreads * kVector, x);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float largest = x[v][0];
#pragma unroll
      for (int e = 1; e < kVector; ++e) largest = fmaxf(largest, x[v][e]);
      if (!(d.scaled(largest) >= floor)) continue;
      unsigned above = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) above |= (d.scaled(x[v][e]) >= floor ? 1u : 0u) << e;
      for (; above != 0; above &= above - 1) visit(d.scaled(pick(x[v], __ffs(static_cast<int>(above)) - 1)));
    }
  }
}

/// The same for a whole row by one block, which waits for memory more than anything else: as many vectors are on their
/// way as registers allow.
template <class Visit>
__device__ __forceinline__ void for_each_of_row(const CutoffShared& shared, float floor, const Visit& visit) {
  for_each_scaled<2>(shared.task.row, shared.z, 0, INT32_MAX, floor, visit);
}

/// Calls visit(z) for the values among which the cutoff is: the gathered ones or, if they are too many, the row's.
template <class Visit>
__device__ __forceinline__ void for_each_candidate(const CutoffShared& shared, const Visit& visit) {
  const int count = shared.gathered_count;
  if (count > kGathered) return for_each_of_row(shared, kMinusInfinity, visit);
  for (int i = threadIdx.x; i < count; i += kCutoffThreads) visit(shared.gathered[i]);
}

enum class Weight { kCount, kMass };  // top-k counts tokens, top-p adds exp(z)

/// The mass that top-p wants of a total. Above 0, because the first token always stays.
__device__ __forceinline__ Wide wanted_mass(float top_p, double total) {
  const Wide wanted = static_cast<Wide>(ceil(static_cast<double>(top_p) * total));
  return wanted > 0 ? wanted : 1;
}

/// The smallest key such that the candidates with keys from range.low up to it weigh at least `wanted`, or, if that is
/// 0, top_p of what all in the range weigh; kLastKey if all of them weigh less.
__device__ inline uint32_t find_key(KeyBounds range, Weight weight, Wide wanted, float top_p, CutoffShared& shared) {
  Tally& tally = shared.mass;
  const auto weight_of_bin = [&](int bin) { return tally.at(bin); };
  for (;;) {
    const uint32_t span = range.high - range.low;
    const int bits = 32 - __clz(static_cast<int>(span)), shift = bits > kBinBits ? bits - kBinBits : 0;
    for (int bin = threadIdx.x; bin < kBins; bin += kCutoffThreads) tally.set(bin, 0);
    __syncthreads();  // bins are zero before another thread adds to them
    for_each_candidate(shared, [&](float z) {
      const uint32_t distance = key_of(z) - range.low;
      if (distance <= span) tally.add(static_cast<int>(distance >> shift), weight == Weight::kCount ? 1 : mass_of(z));
    });
    __syncthreads();  // all has been added before bins are read
    if (wanted == 0) {
      const Wide total = sum_of_bins<kCutoffThreads>(kBins, shared.scratch, weight_of_bin);
      wanted = wanted_mass(top_p, static_cast<double>(total));
    }
    const Found found = locate<kCutoffThreads>(wanted, shared.scratch, weight_of_bin);
    if (found.bin == kBins) return kLastKey;
    wanted -= found.before;
    range.low += static_cast<uint32_t>(found.bin) << shift;
    if (shift == 0) return range.low;
    range.high = min(range.high, range.low + (1u << shift) - 1);
  }
}

/// What the coarse bins tell. With both top-k and top-p the bins from 0 on are needed, since top-p's mass is of what
/// top-k keeps; else one bin is.
__device__ inline Search search_bins(CutoffShared& shared) {
  const Task& task = shared.task;
  const RowStatistics& row = shared.row;
  const auto count = [&](int bin) { return static_cast<Wide>(shared.count[bin]); };
  const auto mass = [&](int bin) { return shared.mass.at(bin); };
  Search s = {0, kBins - 1, task.top_k > 0, task.top_p < 1.0f, 0, 0, 0};
  if (s.top_k) {
    const Found found = locate<kCutoffThreads>(task.top_k, shared.scratch, count);
    s.last_bin = min(s.last_bin, found.bin);
    s.wanted_count = task.top_k - (s.top_p ? 0 : found.before);
    if (s.top_p) return s;
  } else if (s.top_p) {
    // Below the floor nothing was added up: then the statistics know the total.
    const double total = row.floor > kMinusInfinity
                             ? row.sum / kMassUnit
                             : static_cast<double>(sum_of_bins<kCutoffThreads>(kBins, shared.scratch, mass));
    const Wide wanted = wanted_mass(task.top_p, total);
    const Found found = locate<kCutoffThreads>(wanted, shared.scratch, mass);
    s.last_bin = min(s.last_bin, found.bin);
    s.wanted_mass = wanted - found.before;
  }
  const int floor_bin = task.min_p > 0.0f ? coarse_bin(key_of(logf(task.min_p))) : kBins - 1;
  s.top_k = s.top_k && s.last_bin <= floor_bin;
  s.top_p = s.top_p && s.last_bin <= floor_bin;
  s.first_bin = s.last_bin = min(s.last_bin, floor_bin);
  s.mass_before = sum_of_bins<kCutoffThreads>(s.first_bin, shared.scratch, mass);
  return s;
}

/// Where this block of the row, or another, lists values.
__device__ __forceinline__ int64_t part_of(int split) { return static_cast<int64_t>(blockIdx.y) * gridDim.x + split; }

/// Calls visit(z) for each of a list's values. By one warp.
template <class Visit>
__device__ __forceinline__ void for_each_listed(const float* list, int count, const Visit& visit) {
  constexpr int kLoads = 4;  // on their way at once
  for (int first = static_cast<int>(threadIdx.x) % kWarpLanes; first < count; first += kLoads * kWarpLanes) {
    float z[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int at = first + i * kWarpLanes;
      z[i] = at < count ? __ldcg(&list[at]) : kInfinity;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (z[i] < kInfinity) visit(z[i]);
    }
  }
}

/// Gathers the values with keys in the range, from the lists if they are complete. They may be too many: then
/// gathered_count says so. Each lane asks how long the list of one split is, so that all answers come at once; a warp
/// then reads the lists that its lanes asked for.
__device__ inline void gather(const Plan& plan, KeyBounds keys, CutoffShared& shared) {
  constexpr int kWarps = kCutoffThreads / kWarpLanes;
  static_assert(kResidentBlocks <= kCutoffThreads, "a thread for each split");
  const int splits = static_cast<int>(gridDim.x), lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const int own_split = warp + lane * kWarps;
  const int own_count = own_split < splits ? __ldcg(&plan.listed_count[part_of(own_split)]) : 0;
  if (threadIdx.x == 0) shared.gathered_count = 0;
  // A vote; and the count is zero before another thread adds to it.
  const bool complete = __syncthreads_count(own_count > kListed) == 0;
  const auto visit = [&](float z) {
    if (key_of(z) < keys.low || key_of(z) > keys.high) return;
    const int at = atomicAdd(&shared.gathered_count, 1);
    if (at < kGathered) shared.gathered[at] = z;
  };
  if (complete) {
    for (int split = warp; split < splits; split += kWarps) {
      const int count = __shfl_sync(kAllLanes, own_count, split / kWarps);
      for_each_listed(plan.listed + part_of(split) * kListed, count, visit);
    }
  } else {
    for_each_of_row(shared, value_of_key(keys.high), visit);
  }
  __syncthreads();  // all is gathered before it is read
}

/// The row's distribution, from all its coarse bins.
__device__ inline Summary resolve(const Plan& plan, CutoffShared& shared) {
  const Search found = search_bins(shared);
  if (threadIdx.x == 0) shared.search = found;
  __syncthreads();  // written before others read it: there it costs no registers
  const Search& search = shared.search;
  const KeyBounds keys = keys_of_coarse_bins(search.first_bin, search.last_bin);
  gather(plan, keys, shared);
  uint32_t last_key = kLastKey;
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {  // top-k, then top-p of what it keeps
    if (turn == 0 ? !search.top_k : !search.top_p) continue;
    const Weight weight = turn == 0 ? Weight::kCount : Weight::kMass;
    const Wide wanted = turn == 0 ? search.wanted_count : search.wanted_mass;
    const KeyBounds kept_so_far = {keys.low, min(keys.high, last_key)};
    last_key = min(last_key, find_key(kept_so_far, weight, wanted, shared.task.top_p, shared));
  }
  float cutoff = value_of_key(last_key);
  if (shared.task.min_p > 0.0f) cutoff = fmaxf(cutoff, logf(shared.task.min_p));
  Wide mass = 0;
  for_each_candidate(shared, [&](float z) { mass += z >= cutoff ? mass_of(z) : 0; });
  mass = block_reduce<kCutoffThreads>(mass, shared.scratch.warps, Sum());
  if (shared.gathered_count <= kGathered) mass += search.mass_before;
  return {shared.row.peak, cutoff, logf(__ull2float_rn(mass) * static_cast<float>(kMassUnit)), -1};
}

}  // namespace pearl::cuda
