#include <cstring>

#include "core/inline.h"
#include "training/kernels.h"

namespace acf::training {
namespace {

struct N {
  using Reg = float __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static Reg load(const float* p) {
    Reg r;
    std::memcpy(&r, p, sizeof(r));
    return r;
  }
  static void store(float* p, Reg r) { std::memcpy(p, &r, sizeof(r)); }
  static Reg load_some(const float* p, int n) {
    Reg r = {};
    for (int i = 0; i < n; ++i) r[i] = p[i];
    return r;
  }
  static void store_some(float* p, Reg r, int n) {
    for (int i = 0; i < n; ++i) p[i] = r[i];
  }
  static Reg set(float x) { return Reg{x, x, x, x}; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static float total(Reg r) { return (r[0] + r[1]) + (r[2] + r[3]); }
  // Rows become columns.
  static void transpose(Reg (&r)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const float kept = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = kept;
      }
    }
  }
};

constexpr int kSums = 8;

#include "training/kernels-inl.h"

}  // namespace

const Kernels generic_kernels = table_of(IndicesOf<kMaxRows>::type{}, IndicesOf<kMaxOuterRows>::type{});

}  // namespace acf::training
