// The smallest value that top-k or top-p keeps, found without sorting: a radix search over the values' bit patterns.
//
// The values z are <= 0, so that their bits without the sign are a key that grows as z falls. Each pass spreads the
// keys of one range over bins, adds their weights up, and continues in the bin where the wanted weight is reached:
// 11, 11 and 9 bits of the key. Only the first pass touches every value. The result is a value of the row, exactly.

namespace pearl::PEARL_ISA {

inline constexpr uint32_t kLastKey = 0x7F800000;  // of -inf; NaNs have larger ones and never count
inline constexpr int kBinBits = 11;

inline float value_of_key(uint32_t key) {
  const uint32_t bits = key | 0x80000000u;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

enum class Weight { kCount, kMass };  // top-k counts tokens, top-p adds exp(z)

/// Adds the weights of the keys in [low, high] to bins[(key - low) >> shift].
template <Weight kWeight, class Scaled>
inline void fill_bins(int64_t size, const Scaled& scaled, uint32_t low, uint32_t high, int shift, double* bins) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec z = scaled(i);
    const Bits distance = (bits_of(z) & broadcast_bits(0x7FFFFFFF)) - broadcast_bits(low);
    uint32_t inside = bitmask(distance <= broadcast_bits(high - low));
    if (inside == 0) continue;
    uint32_t bin[kLanes];
    float weight[kLanes];
    store_bits(bin, shift_right(distance, shift));
    store(weight, kWeight == Weight::kMass ? exp(z) : broadcast(1.0f));
    for (; inside != 0; inside &= inside - 1) {
      const int lane = __builtin_ctz(inside);
      bins[bin[lane]] += static_cast<double>(weight[lane]);
    }
  }
}

/// The smallest key such that the keys up to it weigh at least `wanted`: tokens under kCount, under kMass a fraction
/// of the weight of all keys up to `high`. scaled(i) gives values i to i + 15, -inf past the end.
template <Weight kWeight, class Scaled>
inline uint32_t find_key(int64_t size, const Scaled& scaled, uint32_t high, double wanted) {
  uint32_t low = 0;
  double before = 0;  // weight of the keys below low
  for (int shift = 31 - kBinBits;; shift = shift > kBinBits ? shift - kBinBits : 0) {
    double bins[1 << kBinBits] = {};
    fill_bins<kWeight>(size, scaled, low, high, shift, bins);
    const uint32_t last_bin = (high - low) >> shift;
    if (kWeight == Weight::kMass && low == 0 && shift == 31 - kBinBits) {
      double total = 0;
      for (uint32_t b = 0; b <= last_bin; ++b) total += bins[b];
      wanted *= total;
    }
    uint32_t found = 0;  // rounding may leave the sum just short of `wanted`: then the last bin that holds anything
    double reached = before;
    for (uint32_t b = 0; b <= last_bin && reached < wanted; ++b) {
      if (bins[b] == 0) continue;
      found = b;
      before = reached;
      reached += bins[b];
    }
    low += found << shift;
    if (shift == 0) return low;
    const uint32_t bin_end = low + (1u << shift) - 1;
    high = bin_end < high ? bin_end : high;
  }
}

}  // namespace pearl::PEARL_ISA
