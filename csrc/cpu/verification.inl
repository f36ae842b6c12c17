// verify: drafted tokens against the target's rows, in order, up to the first that fails.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kNoToken = -1;

/// Draw from norm(max(p - q, 0)), q given by log_q(i); from p where that is zero everywhere.
template <class LogQ>
inline int64_t draw_residual(const Distribution& target, const NoiseKey& key, const LogQ& log_q) {
  const auto log_residual = [&](int64_t i) {
    const Vec residual = exp(target.log_probability(i)) - exp(log_q(i));
    const Mask positive = broadcast(0.0f) < residual;
    return select(positive, log(residual), broadcast(kMinusInfinity));
  };
  const int64_t token = gumbel_argmax(key, target.row.size, log_residual);
  return token >= 0 ? token : draw(target, key).token;
}

/// The residual against a point mass is p without that token.
inline int64_t draw_other(const Distribution& target, const NoiseKey& key, int64_t excluded) {
  const auto log_residual = [&](int64_t i) {
    return select(lane_range(excluded - i, excluded - i + 1), broadcast(kMinusInfinity), target.log_probability(i));
  };
  const int64_t token = gumbel_argmax(key, target.row.size, log_residual);
  return token >= 0 ? token : draw(target, key).token;
}

/// The replacement of the token drafted at `row`, which was rejected.
inline int64_t replace(const VerifyParams& p, const Distribution& target, int64_t request, int64_t row) {
  const NoiseKey key = noise_key(p.sampling.seed, request, p.positions[row], kResidualStream);
  const int64_t draft_row = p.draft_rows[row];
  if (draft_row < 0) return draw_other(target, key, p.draft_tokens[row]);
  const LogitsRow logits = row_of(p.draft_logits, draft_row, p.vocab_size);
  const float temperature = p.draft_temperature[request];
  if (temperature <= 0) return draw_other(target, key, argmax(logits));
  const SamplingView& s = p.sampling;
  const Distribution draft =
      make_distribution(logits, temperature, s.top_k[request], s.top_p[request], s.min_p[request]);
  return draw_residual(target, key, [&](int64_t i) { return draft.log_probability(i); });
}

/// kNoToken if the token drafted at `row` holds, else the token that takes its place.
inline int64_t test_row(const VerifyParams& p, int64_t request, int64_t row) {
  const SamplingView& s = p.sampling;
  const LogitsRow logits = row_of(p.logits, row, p.vocab_size);
  const int64_t drafted = p.draft_tokens[row];
  if (drafted < 0 || p.rule == Rule::kCoupled || s.temperature[request] <= 0) {
    const NoiseKey key = noise_key(s.seed, request, p.positions[row], kSampleStream);
    const int64_t drawn = sample_row(logits, s, request, key).token;
    return drawn == drafted ? kNoToken : drawn;
  }
  const Distribution target =
      make_distribution(logits, s.temperature[request], s.top_k[request], s.top_p[request], s.min_p[request]);
  const float u = uniform_one(noise_key(s.seed, request, p.positions[row], kAcceptStream));
  const float ratio = __builtin_expf(target.log_probability_of(drafted) - p.draft_logprobs[row]);
  return u < ratio ? kNoToken : replace(p, target, request, row);
}

void verify(const VerifyParams& p) {
  for (int64_t request = 0; request < p.requests; ++request) {
    const int64_t begin = p.row_start[request], end = p.row_start[request + 1];
    int64_t row = begin, next = kNoToken;
    while (row < end && (next = test_row(p, request, row)) == kNoToken) ++row;
    p.accepted[request] = static_cast<int32_t>(row - begin);
    p.next_token[request] = next;
  }
}

}  // namespace pearl::PEARL_ISA
