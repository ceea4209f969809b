#include "projection/projection.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/parallel.h"
#include "projection/element_selection.h"
#include "projection/kernels.h"

namespace acf::projection {
namespace {

std::size_t index(std::int64_t i) { return static_cast<std::size_t>(i); }

// The sum of non-negative values, in an order that lets several additions go on at once. It is finite exactly when all
// values are, but for an overflow.
double total(const std::vector<double>& values) {
  double lanes[kBlock] = {};
  std::size_t i = 0;
  for (; i + kBlock <= values.size(); i += kBlock) {
    for (std::size_t lane = 0; lane < kBlock; ++lane) lanes[lane] += values[i + lane];
  }
  for (std::size_t lane = 0; i < values.size(); ++i, ++lane) lanes[lane] += values[i];
  return std::accumulate(lanes, lanes + kBlock, 0.0);
}

// Waking a thread, and fetching what lies in another core's cache, pays from about this many elements for each.
constexpr std::int64_t kElementsPerThread = 131072;

Options with_useful_threads(Options options, std::int64_t elements) {
  const std::int64_t useful = std::max<std::int64_t>(1, elements / kElementsPerThread);
  options.threads = static_cast<int>(std::min<std::int64_t>(options.threads, useful));
  return options;
}

// Marks the `keep` largest values; among equals the lowest index wins.
void mark_largest(const std::vector<double>& values, std::int64_t keep, const Kernels<double>& kernels,
                  std::vector<std::uint8_t>& kept) {
  kept.assign(values.size(), 0);
  if (keep == 0) return;
  // Non-negative doubles have the order of their bits.
  std::vector<std::int64_t> keys(values.size() + kBlock);
  std::memcpy(keys.data(), values.data(), values.size() * sizeof(double));
  const Selected<double> threshold = kernels.select(keys.data(), static_cast<std::int64_t>(values.size()), keep);
  double limit = 0;
  std::memcpy(&limit, &threshold.key, sizeof(limit));
  for (std::size_t i = 0; i < values.size(); ++i) kept[i] = values[i] > limit ? 1 : 0;
  std::int64_t left = threshold.rank;
  for (std::size_t i = 0; left > 0; ++i) {
    if (values[i] == limit) {
      kept[i] = 1;
      --left;
    }
  }
}

// One layer on its way through measure (reads W and U), choose, and write. The tasks of measure() and of write() are
// independent of each other and cut by the shape alone, so sums do not depend on the number of threads.
template <class T>
class Job {
 public:
  // u, z null: a projection of w into out. Otherwise an update.
  Job(const T* w, T* out, T* u, const Shape& shape, Structure structure, std::int64_t keep, std::int64_t keep_columns,
      const Options& options)
      : w_(w),
        out_(out),
        u_(u),
        shape_(shape),
        structure_(structure),
        keep_(keep),
        keep_columns_(keep_columns),
        options_(options),
        kernels_(kernels<T>(options.isa)),
        group_kernels_(kernels<double>(options.isa)) {
    const bool joint = structure == Structure::filter_and_column;
    if (structure == Structure::element) {
      elements_ = std::make_unique<ElementSelection<T>>(w, u, shape.size(), keep, kernels_, options.threads);
      return;
    }
    if (structure == Structure::filter || joint) {
      row_tasks_ = row_units();
      row_squares_.resize(index(shape.rows));
      u_nonzero_.resize(index(shape.rows), 1);
    }
    if (structure != Structure::filter) {
      // Narrow stripes only where there are too few of full width for the threads.
      const std::int64_t share = (shape.columns + options.threads - 1) / options.threads;
      const std::int64_t at_most = shape.groups > 1 ? kStripe : std::min(kStripe, share);
      stripe_ = std::max<std::int64_t>(2 * kBlock, (at_most + kBlock - 1) / kBlock * kBlock);
      stripes_ = (shape.columns + stripe_ - 1) / stripe_;
      const std::int64_t block_size = shape.size() / shape.groups;
      blocks_per_task_ = std::max<std::int64_t>(1, kUnit / block_size);
      column_tasks_ = (shape.groups + blocks_per_task_ - 1) / blocks_per_task_ * stripes_;
      column_squares_.resize(index(shape.groups * shape.columns));
    }
  }

  std::int64_t size() const { return shape_.size(); }

  std::int64_t measure_tasks() const { return elements_ ? elements_->tasks() : row_tasks_ + column_tasks_; }

  void measure(std::int64_t task) {
    if (elements_) {
      elements_->measure(task);
    } else if (task < row_tasks_) {
      measure_rows(task);
    } else {
      measure_columns(task - row_tasks_);
    }
  }

  // Decides what is kept. Throws NotFinite.
  void choose() {
    if (elements_) {
      elements_->choose();
      return;
    }
    check_and_scale();
    switch (structure_) {
      case Structure::filter: mark_largest(row_squares_, keep_, group_kernels_, rows_kept_); break;
      case Structure::column: mark_largest(column_squares_, keep_, group_kernels_, columns_kept_); break;
      case Structure::channel: {
        std::vector<std::uint8_t> channels;
        mark_largest(channel_squares(), keep_, group_kernels_, channels);
        columns_kept_.resize(column_squares_.size());
        for (std::size_t k = 0; k < columns_kept_.size(); ++k) columns_kept_[k] = channels[k / index(shape_.taps)];
        break;
      }
      default: choose_both(); break;
    }
    if (structure_ != Structure::filter) expand(columns_kept_, column_mask_);
  }

  // Backwards, so that it begins with what measure() read last and is still in the cache.
  std::int64_t write_tasks() {
    const std::int64_t tasks = elements_ ? elements_->tasks() : row_units();
    primal_.assign(index(tasks), 0);
    dual_.assign(index(tasks), 0);
    return tasks;
  }

  void write(std::int64_t task) {
    const std::int64_t unit = static_cast<std::int64_t>(primal_.size()) - 1 - task;
    Residuals<T> residuals;
    if (elements_) {
      elements_->write(unit, out_, u_, &residuals);
    } else {
      const std::int64_t first = unit * rows_per_unit(), end = std::min(shape_.rows, first + rows_per_unit());
      for (std::int64_t row = first, stop = first; row < end; row = stop) {
        do {
          ++stop;
        } while (stop < end && alike(row, stop));
        write_rows(row, stop, &residuals);
      }
    }
    primal_[index(unit)] = sum_lanes(residuals.primal, residuals.primal_run);
    dual_[index(unit)] = sum_lanes(residuals.dual, residuals.dual_run);
  }

  double primal() const { return std::accumulate(primal_.begin(), primal_.end(), 0.0); }
  double dual() const { return std::accumulate(dual_.begin(), dual_.end(), 0.0); }

  void norms(double* result) {
    check_and_scale();
    const std::vector<double> squares = structure_ == Structure::filter    ? row_squares_
                                        : structure_ == Structure::channel ? channel_squares()
                                                                           : column_squares_;
    for (std::size_t i = 0; i < squares.size(); ++i) result[i] = std::sqrt(squares[i]) / scale_;
  }

 private:
  static constexpr std::int64_t kStripe = 1024;  // columns whose sums stay in the first-level cache

  std::int64_t rows_per_unit() const { return std::max<std::int64_t>(1, kUnit / shape_.columns); }
  std::int64_t row_units() const { return (shape_.rows + rows_per_unit() - 1) / rows_per_unit(); }
  std::int64_t rows_per_block() const { return shape_.rows / shape_.groups; }
  const T* u_at(std::int64_t offset) const { return u_ == nullptr ? nullptr : u_ + offset; }

  // A kept filter has U = 0 after an update, most often still at the next one: then there is less to read and to write.
  void measure_rows(std::int64_t unit) {
    const std::int64_t first = unit * rows_per_unit(), end = std::min(shape_.rows, first + rows_per_unit());
    if (u_ != nullptr && structure_ == Structure::filter) {
      for (std::int64_t row = first; row < end; ++row) {
        u_nonzero_[index(row)] = kernels_.any_nonzero(u_ + row * shape_.columns, shape_.columns) ? 1 : 0;
      }
    }
    for (std::int64_t row = first, stop = first; row < end; row = stop) {
      const bool with_u = u_ != nullptr && u_nonzero_[index(row)] != 0;
      while (stop < end && u_nonzero_[index(stop)] == u_nonzero_[index(row)]) ++stop;
      const std::int64_t offset = row * shape_.columns;
      kernels_.row_squares(w_ + offset, with_u ? u_ + offset : nullptr, stop - row, shape_.columns, nullptr, scale_,
                           row_squares_.data() + row);
    }
  }

  // Over the columns of column_mask_ only; rows of one block share a mask.
  void measure_rows_masked(std::int64_t unit, double* squares) const {
    const std::int64_t first = unit * rows_per_unit(), end = std::min(shape_.rows, first + rows_per_unit());
    for (std::int64_t row = first, stop = first; row < end; row = stop) {
      const std::int64_t block = row / rows_per_block(), offset = row * shape_.columns;
      stop = std::min(end, (block + 1) * rows_per_block());
      kernels_.row_squares(w_ + offset, u_at(offset), stop - row, shape_.columns,
                           column_mask_.data() + block * shape_.columns, scale_, squares + row);
    }
  }

  void measure_columns(std::int64_t task) {
    const std::int64_t first_block = task / stripes_ * blocks_per_task_, column = task % stripes_ * stripe_;
    const std::int64_t end_block = std::min(shape_.groups, first_block + blocks_per_task_);
    const std::int64_t width = std::min(stripe_, shape_.columns - column);
    for (std::int64_t block = first_block; block < end_block; ++block) {
      const std::int64_t offset = block * rows_per_block() * shape_.columns + column;
      double* squares = column_squares_.data() + block * shape_.columns + column;
      std::fill_n(squares, width, 0.0);
      if (selected_rows_.empty()) {
        kernels_.column_squares(w_ + offset, u_at(offset), rows_per_block(), shape_.columns, width, nullptr, scale_,
                                squares);
      } else {
        const std::vector<std::int64_t>& rows = selected_rows_[index(block)];
        kernels_.column_squares(w_ + offset, u_at(offset), static_cast<std::int64_t>(rows.size()), shape_.columns,
                                width, rows.data(), scale_, squares);
      }
    }
  }

  std::vector<double> channel_squares() const {
    std::vector<double> squares(column_squares_.size() / index(shape_.taps));
    for (std::size_t k = 0; k < column_squares_.size(); ++k) squares[k / index(shape_.taps)] += column_squares_[k];
    return squares;
  }

  // A sum of squares is finite exactly when all its elements are, but for doubles whose squares leave the range: then
  // everything is measured again, scaled by a power of two, which changes no order and no bit of a result.
  void check_and_scale() {
    const std::vector<double>& squares = row_squares_.empty() ? column_squares_ : row_squares_;
    constexpr double kSmall = 1e-200;
    const double energy = total(squares);
    const bool finite = std::isfinite(energy);
    if (!finite) check_finite(w_, u_, shape_.size());
    if (sizeof(T) == sizeof(float)) {
      in_range_ = squares_in_range(std::sqrt(energy / static_cast<double>(shape_.size())));
      return;
    }
    if (finite && energy >= kSmall) return;
    double largest = 0;
    for (std::int64_t i = 0; i < shape_.size(); ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(u_ == nullptr ? w_[i] : w_[i] + u_[i])));
    }
    if (largest == 0) return;
    scale_ = std::ldexp(1.0, -std::max(-1000, std::ilogb(largest)));
    parallel_for(measure_tasks(), options_.threads, [this](std::int64_t task) { measure(task); });
  }

  void expand(const std::vector<std::uint8_t>& kept, std::vector<Key<T>>& mask) const {
    mask.resize(kept.size());
    for (std::size_t k = 0; k < kept.size(); ++k) mask[k] = static_cast<Key<T>>(-static_cast<int>(kept[k]));
  }

  // Best rows for given columns, best columns for given rows, in turn: the kept energy cannot fall, and there are
  // finitely many choices. Begun with the rows and with the columns; the better end counts, the first among equals.
  void choose_both() {
    std::vector<std::uint8_t> rows, columns;
    mark_largest(column_squares_, keep_columns_, group_kernels_, columns);
    mark_largest(row_squares_, keep_, group_kernels_, rows);
    const double rows_first = alternate(rows);
    std::vector<std::uint8_t> best_rows = rows_kept_, best_columns = columns_kept_;
    best_rows_for(columns, rows);
    if (alternate(rows) <= rows_first) {
      rows_kept_ = std::move(best_rows);
      columns_kept_ = std::move(best_columns);
    }
  }

  double alternate(std::vector<std::uint8_t> rows) {
    double energy = -1;
    for (;;) {
      std::vector<std::uint8_t> columns;
      const double now = best_columns_for(rows, columns);
      if (!(now > energy)) return energy;
      energy = now;
      rows_kept_ = rows;
      columns_kept_ = columns;
      best_rows_for(columns, rows);
      if (rows == rows_kept_) return energy;
    }
  }

  double best_columns_for(const std::vector<std::uint8_t>& rows, std::vector<std::uint8_t>& columns) {
    selected_rows_.assign(index(shape_.groups), {});
    for (std::int64_t row = 0; row < shape_.rows; ++row) {
      if (rows[index(row)] != 0) selected_rows_[index(row / rows_per_block())].push_back(row % rows_per_block());
    }
    parallel_for(column_tasks_, options_.threads, [this](std::int64_t task) { measure_columns(task); });
    mark_largest(column_squares_, keep_columns_, group_kernels_, columns);
    double energy = 0;
    for (std::size_t k = 0; k < columns.size(); ++k) energy += columns[k] != 0 ? column_squares_[k] : 0;
    return energy;
  }

  void best_rows_for(const std::vector<std::uint8_t>& columns, std::vector<std::uint8_t>& rows) {
    expand(columns, column_mask_);
    std::vector<double> squares(index(shape_.rows));
    parallel_for(row_tasks_, options_.threads, [&](std::int64_t unit) { measure_rows_masked(unit, squares.data()); });
    mark_largest(squares, keep_, group_kernels_, rows);
  }

  // Whether two rows are written alike, so that neighbours can be written as one.
  bool alike(std::int64_t row, std::int64_t other) const {
    return column_mask_.empty() && rows_kept_[index(row)] == rows_kept_[index(other)] &&
           u_nonzero_[index(row)] == u_nonzero_[index(other)];
  }

  void write_rows(std::int64_t row, std::int64_t end, Residuals<T>* residuals) const {
    const std::int64_t n = (end - row) * shape_.columns, offset = row * shape_.columns;
    const bool kept = rows_kept_.empty() || rows_kept_[index(row)] != 0;
    const Key<T>* mask = column_mask_.empty() ? nullptr : column_mask_.data() + row / rows_per_block() * shape_.columns;
    const T* w = w_ + offset;
    T* out = out_ + offset;
    if (u_ == nullptr) {
      if (!kept) {
        std::memset(out, 0, index(n) * sizeof(T));
      } else if (mask != nullptr) {
        kernels_.project_masked(w, out, n, mask);
      } else if (out != w) {
        std::memcpy(out, w, index(n) * sizeof(T));
      }
      return;
    }
    T* u = u_ + offset;
    if (!in_range_) {
      update_plain(w, u, out, n, residuals,
                   [=](std::int64_t k, T) { return kept && (mask == nullptr || mask[k] != 0); });
    } else if (!kept) {
      kernels_.update_dropped(w, u, out, n, residuals);
    } else if (mask != nullptr) {
      kernels_.update_masked(w, u, out, n, mask, residuals);
    } else if (u_nonzero_[index(row)] != 0) {
      kernels_.update_kept(w, u, out, n, residuals);
    } else {
      kernels_.update_kept_u_zero(w, out, n, residuals);
    }
  }

  const T* w_;
  T* out_;
  T* u_;
  Shape shape_;
  Structure structure_;
  std::int64_t keep_, keep_columns_;
  Options options_;
  const Kernels<T>& kernels_;
  const Kernels<double>& group_kernels_;

  std::unique_ptr<ElementSelection<T>> elements_;
  std::int64_t row_tasks_ = 0, column_tasks_ = 0, stripe_ = 0, stripes_ = 0, blocks_per_task_ = 1;
  double scale_ = 1;      // of doubles, for squares that would leave their range
  bool in_range_ = true;  // of float: whether the squares of typical elements stay well inside
  std::vector<double> row_squares_, column_squares_;
  std::vector<std::uint8_t> u_nonzero_, rows_kept_, columns_kept_;
  std::vector<std::vector<std::int64_t>> selected_rows_;  // by block; empty: all rows
  std::vector<Key<T>> column_mask_;
  std::vector<double> primal_, dual_;  // by unit, added in this order
};

// The tasks of all jobs, those of the largest job first.
template <class Job, class Count, class Body>
void for_all(std::vector<Job>& jobs, int threads, const Count& count, const Body& body) {
  if (jobs.size() == 1) {
    parallel_for(count(jobs[0]), threads, [&](std::int64_t task) { body(jobs[0], task); });
    return;
  }
  std::vector<Job*> order;
  for (Job& job : jobs) order.push_back(&job);
  std::stable_sort(order.begin(), order.end(), [](const Job* a, const Job* b) { return a->size() > b->size(); });
  std::vector<std::pair<Job*, std::int64_t>> tasks;
  for (Job* job : order) {
    const std::int64_t n = count(*job);
    for (std::int64_t task = 0; task < n; ++task) tasks.emplace_back(job, task);
  }
  parallel_for(static_cast<std::int64_t>(tasks.size()), threads,
               [&](std::int64_t i) { body(*tasks[index(i)].first, tasks[index(i)].second); });
}

template <class T>
void run(std::vector<Job<T>>& jobs, int threads) {
  for_all(
      jobs, threads, [](Job<T>& job) { return job.measure_tasks(); },
      [](Job<T>& job, std::int64_t task) { job.measure(task); });
  // One job spreads its own choice over the threads; of several, each makes its choice on one. All complain before any
  // is heard, so that it is the first layer that is reported.
  if (jobs.size() == 1) {
    jobs[0].choose();
  } else {
    std::vector<std::unique_ptr<NotFinite>> complaints(jobs.size());
    parallel_for(static_cast<std::int64_t>(jobs.size()), threads, [&](std::int64_t layer) {
      try {
        jobs[index(layer)].choose();
      } catch (const NotFinite& complaint) {
        complaints[index(layer)] = std::make_unique<NotFinite>(complaint);
        complaints[index(layer)]->layer = layer;
      }
    });
    for (const auto& complaint : complaints) {
      if (complaint) throw NotFinite(*complaint);
    }
  }
  for_all(
      jobs, threads, [](Job<T>& job) { return job.write_tasks(); },
      [](Job<T>& job, std::int64_t task) { job.write(task); });
}

const char* describe(NotFinite::Array array) {
  switch (array) {
    case NotFinite::Array::weight: return "weight";
    case NotFinite::Array::dual: return "u";
    case NotFinite::Array::sum: return "weight + u";
  }
  return "";
}

}  // namespace

NotFinite::NotFinite(Array array_, std::int64_t count_, std::int64_t first_)
    : std::invalid_argument(std::string(describe(array_)) + " has " + std::to_string(count_) +
                            " NaN or infinite values, the first at flat index " + std::to_string(first_)),
      array(array_),
      count(count_),
      first(first_) {}

template <class T>
void check_finite(const T* w, const T* u, std::int64_t n) {
  const auto look = [n](NotFinite::Array array, const auto& at) {
    std::int64_t count = 0, first = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (!std::isfinite(at(i)) && count++ == 0) first = i;
    }
    if (count > 0) throw NotFinite(array, count, first);
  };
  look(NotFinite::Array::weight, [w](std::int64_t i) { return w[i]; });
  if (u == nullptr) return;
  look(NotFinite::Array::dual, [u](std::int64_t i) { return u[i]; });
  look(NotFinite::Array::sum, [w, u](std::int64_t i) { return static_cast<T>(w[i] + u[i]); });
}

std::int64_t group_count(const Shape& shape, Structure structure) {
  switch (structure) {
    case Structure::filter: return shape.rows;
    case Structure::channel: return shape.groups * shape.columns / shape.taps;
    case Structure::column: return shape.groups * shape.columns;
    default: return shape.size();
  }
}

template <class T>
void group_norms(const T* w, const Shape& shape, Structure structure, const Options& options, double* norms) {
  if (structure == Structure::element) {
    check_finite<T>(w, nullptr, shape.size());
    for (std::int64_t i = 0; i < shape.size(); ++i) norms[i] = std::abs(static_cast<double>(w[i]));
    return;
  }
  const Options here = with_useful_threads(options, shape.size());
  Job<T> job(w, nullptr, nullptr, shape, structure, 0, 0, here);
  parallel_for(job.measure_tasks(), here.threads, [&job](std::int64_t task) { job.measure(task); });
  job.norms(norms);
}

template <class T>
void project(const T* w, T* out, const Shape& shape, Structure structure, std::int64_t keep, std::int64_t keep_columns,
             const Options& options) {
  const Options here = with_useful_threads(options, shape.size());
  std::vector<Job<T>> jobs;
  jobs.emplace_back(w, out, nullptr, shape, structure, keep, keep_columns, here);
  run(jobs, here.threads);
}

template <class T>
void admm_update(Layer<T>* layers, std::int64_t count, const Options& options) {
  std::int64_t elements = 0;
  for (std::int64_t i = 0; i < count; ++i) elements += layers[i].shape.size();
  const Options here = with_useful_threads(options, elements);
  std::vector<Job<T>> jobs;
  jobs.reserve(index(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const Layer<T>& layer = layers[i];
    jobs.emplace_back(layer.w, layer.z, layer.u, layer.shape, layer.structure, layer.keep, layer.keep_columns, here);
  }
  run(jobs, here.threads);
  for (std::int64_t i = 0; i < count; ++i) {
    layers[i].primal = jobs[index(i)].primal();
    layers[i].dual = jobs[index(i)].dual();
  }
}

#define ACF_INSTANTIATE(T)                                                                                     \
  template void check_finite<T>(const T*, const T*, std::int64_t);                                             \
  template void group_norms<T>(const T*, const Shape&, Structure, const Options&, double*);                    \
  template void project<T>(const T*, T*, const Shape&, Structure, std::int64_t, std::int64_t, const Options&); \
  template void admm_update<T>(Layer<T>*, std::int64_t, const Options&);
ACF_INSTANTIATE(float)
ACF_INSTANTIATE(double)

}  // namespace acf::projection
