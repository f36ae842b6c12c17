// What verify is made of: a drafted token against the target's row, and what takes its place.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kNoToken = -1;

/// Draw from norm(max(weight * p - q, 0)), q given by log_q(i); from p where that is zero everywhere.
template <class LogQ>
inline int64_t draw_residual(const Distribution& target, float weight, const NoiseKey& key, const LogQ& log_q) {
  const auto log_residual = [&](int64_t i) {
    const Vec residual = broadcast(weight) * exp(target.log_probability(i)) - exp(log_q(i));
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

inline Distribution distribution_at(const VerifyParams& p, int64_t request, int64_t row) {
  const SamplingView& s = p.sampling;
  return make_distribution(row_of(p.logits, row, p.vocab_size), s.temperature[request], s.top_k[request],
                           s.top_p[request], s.min_p[request]);
}

/// The token that the draft was certain of at `row`, where its distribution is a point mass; else kNoToken.
inline int64_t certain_token(const VerifyParams& p, int64_t request, int64_t row) {
  if (p.draft_rows[row] < 0) return p.draft_tokens[row];
  if (p.draft_temperature[request] > 0) return kNoToken;
  return argmax(row_of(p.draft_logits, p.draft_rows[row], p.vocab_size));
}

/// The draft's distribution at `row`, where it is no point mass.
inline Distribution draft_at(const VerifyParams& p, int64_t request, int64_t row) {
  const SamplingView& s = p.sampling;
  return make_distribution(row_of(p.draft_logits, p.draft_rows[row], p.vocab_size), p.draft_temperature[request],
                           s.top_k[request], s.top_p[request], s.min_p[request]);
}

/// What takes the place of the token drafted at `row`. weight: of the tokens before it, 1 but in a block.
inline int64_t replace(const VerifyParams& p, const Distribution& target, int64_t request, int64_t row, float weight) {
  const NoiseKey key = noise_key(p.sampling.seed, request, p.positions[row], kResidualStream);
  const int64_t certain = certain_token(p, request, row);
  if (certain >= 0) return draw_other(target, key, certain);
  const Distribution draft = draft_at(p, request, row);
  if (!__builtin_isfinite(draft.peak)) return draw(target, key).token;  // it is no distribution: q is 0
  return draw_residual(target, weight, key, [&](int64_t i) { return draft.log_probability(i); });
}

inline float acceptance_noise(const VerifyParams& p, int64_t request, int64_t row) {
  return uniform_one(noise_key(p.sampling.seed, request, p.positions[row], kAcceptStream));
}

/// p / q of the token drafted at `row`.
inline float ratio_at(const VerifyParams& p, const Distribution& target, int64_t row) {
  return __builtin_expf(target.log_probability_of(p.draft_tokens[row]) - p.draft_logprobs[row]);
}

/// The target's own draw at `row`, keyed by its position.
inline int64_t draw_at(const VerifyParams& p, int64_t request, int64_t row) {
  const NoiseKey key = noise_key(p.sampling.seed, request, p.positions[row], kSampleStream);
  return sample_row(row_of(p.logits, row, p.vocab_size), p.sampling, request, key).token;
}

/// kNoToken if the token drafted at `row` holds, else the token that takes its place.
inline int64_t test_row(const VerifyParams& p, int64_t request, int64_t row) {
  const int64_t drafted = p.draft_tokens[row];
  if (drafted < 0 || p.rule == Rule::kCoupled || p.sampling.temperature[request] <= 0) {
    const int64_t drawn = draw_at(p, request, row);
    return drawn == drafted ? kNoToken : drawn;
  }
  const Distribution target = distribution_at(p, request, row);
  const bool holds = acceptance_noise(p, request, row) < ratio_at(p, target, row);
  return holds ? kNoToken : replace(p, target, request, row, 1.0f);
}

}  // namespace pearl::PEARL_ISA
