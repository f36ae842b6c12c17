// rope_and_cache: per-head norm and rotation of q and k, and the cache write, in one pass over a token.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kMaxHeadDim = 256;

/// out = x rotated: lane i pairs with lane i + half. out may be x.
template <class T>
inline void rotate_head(const T* x, const float* cos, const float* sin, int64_t half, T* out) {
  for_each_vector(half, [&](int64_t i, int64_t count) {
    const Vec a = load_some(x + i, count), b = load_some(x + half + i, count);
    const Vec c = load_some(cos + i, count), s = load_some(sin + i, count);
    store_some(out + i, a * c - b * s, count);
    store_some(out + half + i, b * c + a * s, count);
  });
}

/// The norm, where there is one, rounds its result to T before the rotation, as the unfused operators would.
template <class T>
inline void norm_and_rotate_head(const T* x, const T* norm, float eps, const float* cos_sin, int64_t width, T* out) {
  const int64_t half = width / 2;
  if (norm == nullptr) {
    rotate_head(x, cos_sin, cos_sin + half, half, out);
  } else {
    T normed[kMaxHeadDim];
    scale_row(x, norm, rms_scale(x, width, eps), width, normed);
    rotate_head(normed, cos_sin, cos_sin + half, half, out);
  }
}

template <class T>
void rope_and_cache_tokens(const RopeAndCacheParams& p) {
  const auto* q_norm = static_cast<const T*>(p.q_norm);
  const auto* k_norm = static_cast<const T*>(p.k_norm);
  const int64_t width = p.head_dim, slot_size = p.kv_heads * width;
  for (int64_t token = 0; token < p.tokens; ++token) {
    const float* cos_sin = p.cos_sin + p.positions[token] * width;
    T* q = static_cast<T*>(p.q) + token * p.q_stride;
    for (int64_t h = 0; h < p.query_heads; ++h) {
      norm_and_rotate_head(q + h * width, q_norm, p.eps, cos_sin, width, q + h * width);
    }
    const int64_t slot = p.slot_mapping[token];
    if (slot < 0) continue;
    const T* k = static_cast<const T*>(p.k) + token * p.k_stride;
    const T* v = static_cast<const T*>(p.v) + token * p.v_stride;
    T* k_slot = static_cast<T*>(p.k_cache) + slot * slot_size;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      norm_and_rotate_head(k + h * width, k_norm, p.eps, cos_sin, width, k_slot + h * width);
    }
    __builtin_memcpy(static_cast<T*>(p.v_cache) + slot * slot_size, v, slot_size * sizeof(T));
  }
}

void rope_and_cache(const RopeAndCacheParams& p) {
  p.dtype == DType::kFloat32 ? rope_and_cache_tokens<float>(p) : rope_and_cache_tokens<BFloat16>(p);
}

}  // namespace pearl::PEARL_ISA
