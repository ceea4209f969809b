#include "engine/arena.h"

#include <algorithm>
#include <utility>

namespace acf::engine {

std::int64_t place(std::vector<Block>& blocks) {
  std::vector<Block*> order;
  for (Block& block : blocks) order.push_back(&block);
  std::stable_sort(order.begin(), order.end(), [](const Block* a, const Block* b) { return a->size > b->size; });
  std::vector<const Block*> placed;  // by offset
  std::int64_t total = 0;
  for (Block* block : order) {
    std::int64_t at = 0;
    for (const Block* other : placed) {
      if (other->last < block->first || block->last < other->first) continue;
      if (other->offset >= at + block->size) break;
      at = std::max(at, other->offset + other->size);
    }
    block->offset = at;
    const auto lower = [](const Block* a, const Block* b) { return a->offset < b->offset; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), block, lower), block);
    total = std::max(total, at + block->size);
  }
  return total;
}

std::vector<bool> dirty_halos(const std::vector<Write>& writes) {
  std::vector<bool> dirty(writes.size(), false);
  std::vector<Write> last;             // who has written where; pieces that nobody has written yet are zeros
  for (int run = 0; run < 2; ++run) {  // the second finds what the first has left
    for (std::size_t i = 0; i < writes.size(); ++i) {
      const Write& write = writes[i];
      std::vector<Write> left;
      bool met = false, same = false;
      for (const Write& before : last) {
        if (before.end <= write.begin || write.end <= before.begin) {
          left.push_back(before);
          continue;
        }
        met = true;
        same = same || (before.begin == write.begin && before.end == write.end && before.halo == write.halo);
        if (before.begin < write.begin) left.push_back({before.begin, write.begin, -1});
        if (write.end < before.end) left.push_back({write.end, before.end, -1});
      }
      if (write.halo >= 0 && met && !same) dirty[i] = true;
      last = std::move(left);
      last.push_back(write);
    }
  }
  return dirty;
}

}  // namespace acf::engine
