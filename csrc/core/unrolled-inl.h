// Loops over registers. Included, as text, by the kernels-inl.h of each family of kernels, inside the anonymous
// namespace of one ISA.

template <int i>
struct Constant {
  constexpr operator int() const { return i; }  // NOLINT(google-explicit-constructor): it stands for the number
};

template <int... i>
struct Indices {};
template <int count, int... i>
struct IndicesOf : IndicesOf<count - 1, count - 1, i...> {};
template <int... i>
struct IndicesOf<0, i...> {
  using type = Indices<i...>;
};

// body(0), ..., body(count - 1) with constant arguments: a loop would be unrolled too late for the compiler to keep
// what it works on in registers, and a recursion would be copied level by level, which takes long to compile.
template <class Body, int... i>
ACF_INLINE void unrolled_over(Indices<i...> /*count*/, [[maybe_unused]] const Body& body) {
  (body(Constant<i>{}), ...);
}
template <int count, class Body>
ACF_INLINE void unrolled(const Body& body) {
  unrolled_over(typename IndicesOf<count>::type{}, body);
}
