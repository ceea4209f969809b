// What purification looks at, for a whole network at once: how much is left in every channel, column and filter, and
// what of that is under its limits.
#pragma once

#include <cstdint>

#include "projection/projection.h"

namespace acf::purification {

// One layer and where its scores go. With the columns k = 0 .. taps - 1 of channel j (shapes: see projection.h):
//   importance[j] = 1 / taps * sum_k ||column_jk||^2        groups * columns / taps values
//   emptiness[j]  = 1 / taps * #{k : column_jk != 0}        the share of columns that survive
//   column_norms  = ||column||                              groups * columns values
//   filter_norms  = ||filter||                              rows values
template <class T>
struct Layer {
  const T* w = nullptr;
  projection::Shape shape;
  double* importance = nullptr;
  double* emptiness = nullptr;
  double* column_norms = nullptr;
  double* filter_norms = nullptr;
};

// The scores of all layers, spread over the threads; every weight is fetched from memory once. The same bits for every
// ISA and number of threads. Throws projection::NotFinite, with the number of the layer in it.
template <class T>
void scores(const Layer<T>* layers, std::int64_t count, const projection::Options& options);

// Norms and scores below which something goes.
struct Limits {
  double column = 0, importance = 0, emptiness = 0, filter = 0;
};

// One layer as it is judged, and what stays of it.
struct Judged {
  projection::Shape shape;
  const double* importance = nullptr;
  const double* column_norms = nullptr;
  const double* filter_norms = nullptr;
  const std::int64_t* tied = nullptr;  // (rows) number of the group that a filter is in, over all layers; -1: it stays
  Limits limits;
  std::uint8_t* columns = nullptr;  // (groups * columns) out
  std::uint8_t* filters = nullptr;  // (rows) out
};

// A column goes when it is empty or its norm is below the limit. Then a channel goes whole when its importance and the
// share of its columns that are left are both below their limits. A group of tied filters goes when it is empty or its
// joint norm, over all layers, is below the limit of every layer that it lies in. `groups`: how many there are.
void keep(const Judged* layers, std::int64_t count, std::int64_t groups);

}  // namespace acf::purification
