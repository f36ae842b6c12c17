#include "cpu/copy_blocks.h"

#include <cstring>

namespace pearl {

void copy_blocks(const CopyBlocksParams& p) {
  auto* pages = static_cast<char*>(p.cache);
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t source = p.pairs[2 * i], destination = p.pairs[2 * i + 1];
    if (source == destination) continue;
    std::memcpy(pages + destination * p.page_bytes, pages + source * p.page_bytes, p.page_bytes);
  }
}

}  // namespace pearl
