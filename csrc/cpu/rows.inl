// Walking over a row of any length in vectors.

namespace pearl::PEARL_ISA {

inline constexpr float kMinusInfinity = -__builtin_inff();

/// Calls visit(offset, count) for the vectors of a row; only the last may have fewer than sixteen elements.
template <class Visit>
inline void for_each_vector(int64_t width, Visit visit) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) visit(i, kLanes);
  if (i < width) visit(i, width - i);
}

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_first(p, count);
}

template <class T>
inline void store_some(T* p, Vec x, int64_t count) {
  count == kLanes ? store(p, x) : store_first(p, x, count);
}

}  // namespace pearl::PEARL_ISA
