#include "cpu/stream_read.h"

#include <stdexcept>
#include <string>

namespace pearl {
namespace {

constexpr int64_t kLine = 64, kAhead = 20 << 10;

template <int kStreams>
uint64_t read_streams(const void* data, int64_t bytes) {
  const auto* begin = static_cast<const char*>(data);
  const int64_t lines = bytes / kLine, part = lines / kStreams;
  const auto word = [begin](int64_t line) {
    if (kStreams == 1) __builtin_prefetch(begin + line * kLine + kAhead, 0, 2);  // cannot fault
    return *reinterpret_cast<const uint64_t*>(begin + line * kLine);
  };
  uint64_t seen[kStreams] = {};
  for (int64_t line = 0; line < part; ++line) {
    for (int s = 0; s < kStreams; ++s) seen[s] |= word(s * part + line);
  }
  for (int64_t line = kStreams * part; line < lines; ++line) seen[0] |= word(line);
  uint64_t all = 0;
  for (const uint64_t part_seen : seen) all |= part_seen;
  return all;
}

}  // namespace

uint64_t stream_read(const void* data, int64_t bytes, int64_t streams) {
  switch (streams) {
    case 1:
      return read_streams<1>(data, bytes);
    case 8:
      return read_streams<8>(data, bytes);
    default:
      throw std::invalid_argument("stream_read: 1 or 8 streams, not " + std::to_string(streams));
  }
}

}  // namespace pearl
