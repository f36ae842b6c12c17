// verify: drafted tokens against the target's rows, one after the other or, under the block rule, together.

namespace pearl::PEARL_ISA {

/// The mass of max(weight * p - q, 0) at `row`. All of `weight` where the target's row is no distribution, so that the
/// tokens before it are judged as a block that ends there.
inline float spare_mass(const VerifyParams& p, const Distribution& target, int64_t request, int64_t row, float weight) {
  if (!__builtin_isfinite(target.peak)) return weight;
  const int64_t certain = certain_token(p, request, row);
  if (certain >= 0) return weight * (1.0f - __builtin_expf(target.log_probability_of(certain)));
  const Distribution draft = draft_at(p, request, row);
  const bool drafts = __builtin_isfinite(draft.peak);
  return static_cast<float>(sum_over(target.row.size, [&](int64_t i) {
    const Vec scaled = broadcast(weight) * exp(target.log_probability(i));
    return drafts ? max(scaled - exp(draft.log_probability(i)), broadcast(0.0f)) : scaled;
  }));
}

/// How far a block holds. From the end: what later tokens decide must be known first, and seldom are all asked.
struct BlockTest {
  int64_t accepted;  // the row after the last token that holds; kNoToken: none from the tested row on
  float weight;      // of the tokens that hold
  float spare;       // if none does: the mass at the tested row
};

/// Tests the tokens from `row` on, at least one, to `end`, behind the block's last. weight: of those before `row`.
BlockTest test_block(const VerifyParams& p, int64_t request, int64_t row, int64_t end, float weight) {
  const Distribution target = distribution_at(p, request, row);
  const float product = weight * ratio_at(p, target, row);
  const float here = product > 0 ? (product < 1 ? product : 1.0f) : 0.0f;  // a NaN is a token that nobody drafts
  float share = here;
  if (row + 1 < end && here > 0) {
    const BlockTest later = test_block(p, request, row + 1, end, here);
    if (later.accepted != kNoToken) return later;
    const float left = later.spare + 1.0f - here;
    share = left > 0 ? later.spare / left : 1.0f;
  }
  if (acceptance_noise(p, request, row) < share) return {row + 1, here, 0};
  return {kNoToken, 0, spare_mass(p, target, request, row, weight)};
}

/// Moves `row`, the first of a request, behind the tokens that hold. Returns what follows them, or kNoToken.
inline int64_t judge_block(const VerifyParams& p, int64_t request, int64_t& row, int64_t end) {
  const bool bonus = row < end && p.draft_tokens[end - 1] < 0;
  const int64_t last = bonus ? end - 1 : end;
  float weight = 1;
  if (row < last) {
    const BlockTest test = test_block(p, request, row, last, weight);
    if (test.accepted != kNoToken) {
      row = test.accepted;
      weight = test.weight;
    }
  }
  if (row < last) return replace(p, distribution_at(p, request, row), request, row, weight);
  return bonus ? draw_at(p, request, last) : kNoToken;
}

void verify(const VerifyParams& p) {
  for (int64_t request = 0; request < p.requests; ++request) {
    const int64_t begin = p.row_start[request], end = p.row_start[request + 1];
    int64_t row = begin, next = kNoToken;
    if (p.rule == Rule::kBlock && p.sampling.temperature[request] > 0) {
      next = judge_block(p, request, row, end);
    } else {
      while (row < end && (next = test_row(p, request, row)) == kNoToken) ++row;
    }
    p.accepted[request] = static_cast<int32_t>(row - begin);
    p.next_token[request] = next;
  }
}

}  // namespace pearl::PEARL_ISA
