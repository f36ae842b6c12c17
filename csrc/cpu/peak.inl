// The limit of arithmetic: linear's products, of registers and nothing else.

namespace pearl::PEARL_ISA {

inline constexpr int kPeakSums = 12;  // independent of each other: latency times the units that multiply

template <class W>
int64_t multiply_registers_as(int64_t steps) {
  alignas(64) char zeros[W::kStepBytes] = {};
  asm volatile("" : : "r"(zeros) : "memory");  // as far as the compiler knows, anything
  const auto weight = W::operand(zeros, 0, 0);
  const PartBits x = broadcast_word(zeros);
  Part sum[kPeakSums];
  for (Part& s : sum) s = zero_part();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kPeakSums; ++i) sum[i] = W::multiply(weight, x, sum[i]);
  }
  alignas(64) float result[kPartLanes];
  for (const Part& s : sum) {
    store(result, s);
    asm volatile("" : : "r"(result) : "memory");
  }
  return steps * kPeakSums * kPartLanes * 2 * W::kInputs / W::kWords;
}

#ifdef PEARL_TILES
/// Four sums are enough there: a product takes 52 cycles, and keeps the unit busy for 16.
template <>
int64_t multiply_registers_as<BFloat16Weight>(int64_t steps) {
  TileRegisters<true> registers;
  registers.configure(kMostTileRows);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_dpbf16ps(0, 3, 4);
    _tile_dpbf16ps(1, 3, 4);
    _tile_dpbf16ps(2, 3, 4);
    _tile_dpbf16ps(5, 3, 4);
  }
  return steps * 4 * kMostTileRows * kPartLanes * kTileSteps * 2 * 2;
}
#endif

int64_t multiply_registers(DType dtype, int64_t steps) {
  return dtype == DType::kFloat32 ? multiply_registers_as<Float32Weight>(steps)
                                  : multiply_registers_as<BFloat16Weight>(steps);
}

}  // namespace pearl::PEARL_ISA
