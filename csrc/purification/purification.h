// What purification looks at: for every channel how much is left in it and how much of it is empty.
#pragma once

#include <cstdint>

#include "projection/projection.h"

namespace acf::purification {

// For a weight of the given shape (see projection.h), with the columns k = 0 .. taps - 1 of channel j:
//   importance[j] = 1 / taps * sum_k ||column_jk||^2        groups * columns / taps values
//   emptiness[j]  = 1 / taps * #{k : column_jk != 0}        the share of columns that survive
//   column_norms  = ||column||                              groups * columns values
//   filter_norms  = ||filter||                              rows values
// Throws projection::NotFinite.
template <class T>
void scores(const T* w, const projection::Shape& shape, const projection::Options& options, double* importance,
            double* emptiness, double* column_norms, double* filter_norms);

}  // namespace acf::purification
