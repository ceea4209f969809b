// Loops over registers. Included, as text, by the kernels-inl.h of each family of kernels, inside the anonymous
// namespace of one ISA.

// body(0), ..., body(count - 1) with constant arguments: a loop would be unrolled too late for the compiler to keep
// what it works on in registers.
template <int i>
struct Constant {
  constexpr operator int() const { return i; }  // NOLINT(google-explicit-constructor): it stands for the number
};
template <int count, int i = 0, class Body>
ACF_INLINE void unrolled(const Body& body) {
  if constexpr (i < count) {
    body(Constant<i>{});
    unrolled<count, i + 1>(body);
  }
}
