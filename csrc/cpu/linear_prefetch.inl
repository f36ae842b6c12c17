// Which weights linear asks for while it multiplies others: the hardware's prefetcher stops at each page, and does not
// run ahead where several rows make a step long. What is asked for is never read past its end: a prefetch cannot fault.

namespace pearl::PEARL_ISA {

inline constexpr int kPanelParts = kPanelColumns / kPartLanes, kLineBytes = 64;

/// One line after the other. Where passes share a step's bytes they ask for some lines twice: cheaper than to count
/// them.
template <int kLines>
struct Stream {
  const char* line;
  int64_t share;  // bytes a step

  void ask() {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + i * kLineBytes, 0, 2);
    line += share;
  }
};

/// Lines of a step lie a stripe apart: some memories answer requests for several pages at once faster.
template <int kLines>
struct Stripes {
  const char* line;
  int64_t share, stripe;  // share: bytes a step and stripe

  void ask() {
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(line + i * stripe, 0, 2);
    line += share;
  }
};

/// How far ahead the weights of a group are asked for, which is less than a chunk of weights without groups.
inline constexpr int64_t kGroupAheadBytes = kAheadBytes > 0 ? kAheadBytes : 8 << 10;

/// For pass `pass` of `passes` over the chunk of `steps` steps at weight, each of kParts parts of its columns or of
/// some rows: all of them together ask for as many bytes as the chunk has.
template <class W, int kParts, bool kGroups>
inline auto weights_ahead(const char* weight, int64_t steps, int64_t pass, int64_t passes) {
  const int64_t share = W::kStepBytes / passes, begin = pass * steps * share;
  constexpr int kLines = (W::kStepBytes * kParts / kPanelParts + kLineBytes - 1) / kLineBytes;
  if constexpr (kGroups) {
    return Stream<kLines>{weight + kGroupAheadBytes + begin, share};
  } else if constexpr (kAheadBytes > 0) {
    return Stream<kLines>{weight + kAheadBytes + begin, share};
  } else {
    const int64_t line_share = share / kLines;
    return Stripes<kLines>{weight + steps * W::kStepBytes + begin, line_share, steps * line_share};
  }
}

}  // namespace pearl::PEARL_ISA
