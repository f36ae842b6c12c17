#include "cpu/routing.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace pearl {
namespace {

float widen(float x) { return x; }

float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float sum_of_exponentials(const float* scores, const int32_t* which, int64_t count, float peak) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += std::exp(scores[which[i]] - peak);
  return sum;
}

template <class T>
void route_rows(const RouteParams& p) {
  std::vector<float> scores(static_cast<size_t>(p.experts));
  std::vector<int32_t> order(scores.size());
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
    bool nan = false;
    for (int64_t e = 0; e < p.experts; ++e) {
      const float score = widen(logits[e]);
      nan = nan || std::isnan(score);
      scores[e] = std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;  // the order needs numbers
    }
    std::iota(order.begin(), order.end(), 0);
    const auto before = [&](int32_t a, int32_t b) {
      return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
    };
    std::partial_sort(order.begin(), order.begin() + p.top_k, order.end(), before);
    const float peak = scores[order[0]];
    const float sum = sum_of_exponentials(scores.data(), order.data(), p.renormalise ? p.top_k : p.experts, peak);
    for (int64_t i = 0; i < p.top_k; ++i) {
      p.chosen[row * p.top_k + i] = order[i];
      p.weights[row * p.top_k + i] =
          nan ? std::numeric_limits<float>::quiet_NaN() : std::exp(scores[order[i]] - peak) / sum;
    }
  }
}

}  // namespace

void route(const RouteParams& p) { p.dtype == DType::kFloat32 ? route_rows<float>(p) : route_rows<BFloat16>(p); }

}  // namespace pearl
