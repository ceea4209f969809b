#include "purification/purification.h"

#include "projection/projection.h"

namespace acf::purification {

// A column whose norm underflows to 0 is as good as empty: group_norms measures doubles in a range where only elements
// 150 orders of magnitude below the largest do.
template <class T>
void scores(const T* w, const projection::Shape& shape, const projection::Options& options, double* importance,
            double* emptiness, double* column_norms, double* filter_norms) {
  projection::group_norms(w, shape, projection::Structure::filter, options, filter_norms);
  projection::group_norms(w, shape, projection::Structure::column, options, column_norms);
  const std::int64_t channels = projection::group_count(shape, projection::Structure::channel);
  for (std::int64_t channel = 0; channel < channels; ++channel) {
    double energy = 0, alive = 0;
    for (std::int64_t tap = 0; tap < shape.taps; ++tap) {
      const double norm = column_norms[channel * shape.taps + tap];
      energy += norm * norm;
      alive += norm != 0 ? 1 : 0;
    }
    importance[channel] = energy / static_cast<double>(shape.taps);
    emptiness[channel] = alive / static_cast<double>(shape.taps);
  }
}

template void scores<float>(const float*, const projection::Shape&, const projection::Options&, double*, double*,
                            double*, double*);
template void scores<double>(const double*, const projection::Shape&, const projection::Options&, double*, double*,
                             double*, double*);

}  // namespace acf::purification
