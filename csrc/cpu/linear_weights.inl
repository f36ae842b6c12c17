// How linear reads a packed weight: what one step of a panel, kInputs inputs of each column, gives the kWords words of
// a row of x that it meets. place(step, part) is where the step's columns [part * kPartLanes, ...) begin.

namespace pearl::PEARL_ISA {

/// Words of x that are fp32 numbers.
struct TimesNumber {
  static constexpr bool kTiled = false, kDecoded = false;
  using Number = float;
  using Operand = Part;
  static Part multiply(Part w, PartBits x, Part sum) { return mul_add(w, float_of(x), sum); }
};

struct Float32Weight : TimesNumber {
  static constexpr int kInputs = 1, kWords = 1, kStepBytes = 4 * kPanelColumns;
  static const char* place(const char* step, int part) { return step + part * 4 * kPartLanes; }
  static Part operand(const char* step, int part, int) {
    return load_part(reinterpret_cast<const float*>(place(step, part)));
  }
};

/// The columns' first inputs, then their second ones.
struct Int8Weight : TimesNumber {
  static constexpr int kInputs = 2, kWords = 2, kStepBytes = 2 * kPanelColumns;
  static const char* place(const char* step, int part) { return step + part * kPartLanes; }
  static Part operand(const char* step, int part, int input) {
    return load_part(reinterpret_cast<const int8_t*>(place(step, part) + input * kPanelColumns));
  }
};

/// Where input `input` of a word of eight lies.
constexpr int nibble_shift(int input) { return input / 2 * 4 + input % 2 * 16; }

struct Int4Words {
  static constexpr int kInputs = 8, kStepBytes = 4 * kPanelColumns;
  static PartBits words(const char* step, int part) {
    return load_part(reinterpret_cast<const uint32_t*>(step + part * 4 * kPartLanes));
  }
};

struct Int4Weight : Int4Words, TimesNumber {
  static constexpr int kWords = 8;
  static Part operand(const char* step, int part, int input) {
    return nibble_part(words(step, part), nibble_shift(input));
  }
};

struct BFloat16Pairs {
  static constexpr int kInputs = 2, kStepBytes = 4 * kPanelColumns;
  static const char* place(const char* step, int part) { return step + part * 4 * kPartLanes; }
  static PartBits pairs(const char* step, int part) {
    return load_part(reinterpret_cast<const uint32_t*>(place(step, part)));
  }
};

#ifdef PEARL_PAIR_DOTS
/// Words of x that are pairs of bf16. kTiled: by AMX's tiles. kDecoded: of fewer bits, which become pairs before.
struct TimesPair {
#ifdef PEARL_TILES
  static constexpr bool kTiled = true;
#else
  static constexpr bool kTiled = false;
#endif
  using Number = BFloat16;
  using Operand = PartBits;
  static Part multiply(PartBits w, PartBits x, Part sum) { return dot_pairs(w, x, sum); }
};

struct BFloat16Weight : BFloat16Pairs, TimesPair {
  static constexpr bool kDecoded = false;
  static constexpr int kWords = 1;
  static PartBits operand(const char* step, int part, int) { return pairs(step, part); }
};

/// An integer from -128 to 127 is a bf16 number: the lower half of its fp32 is zero.
struct Int8BFloat16Weight : TimesPair {
  static constexpr bool kDecoded = true;
  static constexpr int kInputs = 2, kWords = 1, kStepBytes = Int8Weight::kStepBytes;
  static const char* place(const char* step, int part) { return Int8Weight::place(step, part); }
  static PartBits operand(const char* step, int part, int) {
    const PartBits first = bits_of(Int8Weight::operand(step, part, 0));
    return shift_right(first, 16) | bits_of(Int8Weight::operand(step, part, 1));
  }
};

struct Int4BFloat16Weight : Int4Words, TimesPair {
  static constexpr bool kDecoded = true;
  static constexpr int kWords = 4;
  static PartBits operand(const char* step, int part, int pair) {
    return nibble_pairs(words(step, part), nibble_shift(2 * pair));
  }
};
#else
struct BFloat16Weight : BFloat16Pairs, TimesNumber {
  static constexpr int kWords = 2;
  static Part operand(const char* step, int part, int input) {
    const PartBits both = pairs(step, part);
    return float_of(shift_left(input == 0 ? both : shift_right(both, 16), 16));  // a mask would take a register
  }
};

using Int8BFloat16Weight = Int8Weight;
using Int4BFloat16Weight = Int4Weight;
#endif

}  // namespace pearl::PEARL_ISA
