// Walking over a row of any length in vectors.

namespace pearl::PEARL_ISA {

inline constexpr float kMinusInfinity = -__builtin_inff();

/// A number as a type, for loops that a template unrolls.
template <int kNumber>
struct Count {
  static constexpr int kCount = kNumber;
};

/// Calls visit(offset, count) for the vectors of a row; only the last may have fewer than sixteen elements.
template <class Visit>
inline void for_each_vector(int64_t width, Visit visit) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) visit(i, kLanes);
  if (i < width) visit(i, width - i);
}

/// Calls visit(i, Count<n>) for groups of n rows from i on: of kMost, as long as there are so many, then of fewer.
template <int kMost, class Visit>
inline void for_each_rows(int64_t i, int64_t rows, Visit visit) {
  for (; i + kMost <= rows; i += kMost) visit(i, Count<kMost>{});
  if constexpr (kMost > 1) for_each_rows<kMost - 1>(i, rows, visit);
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
