// Memory that streams: in large pages where the system has them, because walking over more than some megabytes in small
// ones is slowed down by the search for each of them, by a quarter to a half for weights that are read once.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace acf {

inline constexpr std::size_t kCacheLine = 64;

struct FreeMemory {
  std::size_t alignment = kCacheLine;
  void operator()(void* memory) const;
};
using Memory = std::unique_ptr<void, FreeMemory>;

// Not initialised, at a multiple of kCacheLine. Throws std::bad_alloc.
Memory allocate(std::size_t bytes);

// Pieces of memory that live and die together, side by side.
class Pool {
 public:
  void* take(std::size_t bytes);  // as allocate()

 private:
  std::vector<Memory> chunks_;
  unsigned char* next_ = nullptr;
  std::size_t left_ = 0;
};

}  // namespace acf
