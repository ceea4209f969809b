// Which piece of one memory every value has, and where the zeros around images have to be made again.
#pragma once

#include <cstdint>
#include <vector>

namespace acf::engine {

// What is needed from one step to another, both included.
struct Block {
  std::int64_t size;
  std::int64_t first, last;
  std::int64_t offset = 0;
};

// Places every block, the largest first, as low as it can lie beside those that are needed at the same time; returns
// the size of all.
std::int64_t place(std::vector<Block>& blocks);

// One of the writes of a run, in order. Writes of the same halo, a number from 0, leave zeros in the same places around
// what they write; a write without a halo (-1) leaves anything anywhere.
struct Write {
  std::int64_t begin, end;
  int halo;
};

// For every write whether the zeros of its halo are gone when it comes. The memory begins as zeros and sees the same
// writes again and again.
std::vector<bool> dirty_halos(const std::vector<Write>& writes);

}  // namespace acf::engine
