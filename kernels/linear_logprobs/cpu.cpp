#include "cpu.h"

#include "csrc/scratch.h"
#include "csrc/threads.h"
#include "sparse.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

constexpr int64_t segment = 960;  // columns of a task: whole panels at every level

// `count` rows of a matrix as a panel of the product over its columns, E: T, or pairs of bf16. Not inlined: two places pack.
template <class T>
[[gnu::noinline]] void pack_rows(const Matrix& m, const int64_t* offsets, int64_t count, int64_t width, int64_t K, T* out) {
  with_type_of<T>(m.dtype, [&](auto s) {
    const decltype(s)* source[32];
    for (int64_t i = 0; i < count; ++i) source[i] = static_cast<const decltype(s)*>(m.data) + offsets[i];
    pack_panel(source, count, width, K, 1, out);
  });
}
#if FASTRLHF_ISA_LEVEL == 3
void pack_rows(const Matrix& m, const int64_t* offsets, int64_t count, int64_t width, int64_t K, Pair* out) {
  const bf16* source[32];
  for (int64_t i = 0; i < count; ++i) source[i] = static_cast<const bf16*>(m.data) + offsets[i];
  pack_pairs(source, count, width, K, out);
}
#endif
template <class Row, class E>
void pack(const Matrix& m, Row&& row, int64_t count, int64_t width, int64_t K, E* out) {
  int64_t offsets[32];
  for (int64_t i = 0; i < count; ++i) offsets[i] = m.offset(row(i));
  pack_rows(m, offsets, count, width, K, out);
}

// `count` columns from `first` on of K rows of a matrix, as a panel of a product over those rows.
template <class T, class Row>
void pack_across(const Matrix& m, Row&& row, int64_t first, int64_t count, int64_t width, int64_t K, T* out) {
  auto with = [&](auto s) {
    using S = decltype(s);
    pack_panel_across([&](int64_t k) { return static_cast<const S*>(m.data) + m.offset(row(k)) + first; }, count, width, K, out);
  };
  if constexpr (sizeof(T) == 8) with(double{});
  else with_type_of<T>(m.dtype, with);
}
#if FASTRLHF_ISA_LEVEL == 3
template <class Row>
void pack_across(const Matrix& m, Row&& row, int64_t first, int64_t count, int64_t width, int64_t K, Pair* out) {
  pack_panel_across([&](int64_t k) { return static_cast<const bf16*>(m.data) + m.offset(row(k)) + first; }, count, width, K, out);
}
#endif

// The sum of column i of a panel of A, K of them.
template <class T>
double column_sum(const T* panel, int64_t i, int64_t K) {
  double sum = 0;
  for (int64_t k = 0; k < K; ++k) sum += panel[k * TileOf<T>::MR + i];
  return sum;
}
#if FASTRLHF_ISA_LEVEL == 3
double column_sum(const Pair* panel, int64_t i, int64_t K) {
  double sum = 0;
  for (int64_t k = 0; k < units_of<Pair>(K); ++k) {
    const Pair p = panel[k * TileOf<float>::MR + i];
    sum += bf16_to_float(static_cast<uint16_t>(p)) + bf16_to_float(static_cast<uint16_t>(p >> 16));
  }
  return sum;
}
#endif

// The rows of a call that count, in panels, their hidden states packed.
template <class T, class E>
struct Block {
  static constexpr int64_t NR = TileOf<T>::NR;
  const LinearArgs& a;
  const int64_t* rows;
  int64_t count, panels, units;
  Scratch<E> packed;            // [panel][unit of k][NR]
  Scratch<RowPanel<T>> panel;

  Block(const LinearArgs& a_, const int64_t* rows_, int64_t count_, int workers)
      : a(a_), rows(rows_), count(count_), panels(panels_of(count_, NR)), units(units_of<E>(a_.width)),
        packed(panels * NR * units, Uninitialized{}), panel(panels, Uninitialized{}) {
    parallel_for(panels, workers, [&](int64_t p, int) {
      for (int64_t j = 0; j < NR; ++j) {
        const int64_t i = p * NR + j;
        panel[p].row[j] = i < count ? rows[i] : -1;
        panel[p].scale[j] = i < count ? static_cast<T>(scale_of(a.row, rows[i]) * log2e) : T(0);
      }
      pack(a.hidden, [&](int64_t i) { return panel[p].row[i]; }, lanes(p), NR, a.width, packed.get() + p * NR * units);
    });
  }

  int64_t lanes(int64_t p) const { return std::min(NR, count - p * NR); }
};

// The weights of columns [column, column + count) in panels of MR.
template <class T, class E>
void pack_weights(const LinearArgs& a, int64_t column, int64_t count, E* out) {
  constexpr int64_t MR = TileOf<T>::MR;
  for (int64_t i = 0; i < count; i += MR)
    pack(a.weight, [&](int64_t r) { return column + i + r; }, std::min(MR, count - i), MR, a.width, out + i * units_of<E>(a.width));
}

// Ranges of panels, no more than `most` each, so that with `groups` of something else there is work for everybody.
struct Chunks {
  int64_t count, size, panels;
  Chunks(int64_t panels_, int64_t groups, int workers, int64_t most = INT64_MAX) : panels(panels_) {
    const int64_t wanted = std::max<int64_t>(1, 4 * workers / std::max<int64_t>(groups, 1));
    size = std::min(most, std::max<int64_t>(1, panels_of(panels, std::min(wanted, std::max<int64_t>(panels, 1)))));
    count = panels_of(panels, size);
  }
  int64_t first(int64_t i) const { return i * size; }
  int64_t last(int64_t i) const { return std::min(panels, (i + 1) * size); }
};

// A call's rows whose labels count and for which `wanted` holds.
template <class Wanted>
int64_t counted_rows(const LogprobsArgs& r, int64_t* rows, Wanted&& wanted) {
  int64_t n = 0;
  for (int64_t i = 0; i < r.rows; ++i)
    if (!ignored(r, i) && wanted(i)) rows[n++] = i;
  return n;
}

// Rows that are packed together: all of them, where they fit the workspace beside `per_row` more bytes each.
template <class T>
int64_t rows_at_once(const LinearArgs& a, int64_t count, int64_t per_row) {
  constexpr int64_t NR = TileOf<T>::NR;
  const int64_t fits = a.workspace_bytes / std::max<int64_t>(1, per_row) / NR * NR;
  return a.logits ? std::max<int64_t>(count, 1) : std::max(NR, std::min(fits, panels_of(count, NR) * NR));
}

template <class T>
void write_absent_row(const LogprobsArgs& r, int64_t row) {
  if (!r.partial) return write_ignored_row<T>(r, row);
  for (int64_t i = 0; i < 3 + r.labels_per_row; ++i) static_cast<T*>(r.partials)[row * (3 + r.labels_per_row) + i] = 0;
}

template <class T, class E>
void forward_block(const LinearArgs& a, const Block<T, E>& block) {
  constexpr int64_t MR = TileOf<T>::MR, NR = TileOf<T>::NR;
  const LogprobsArgs& r = a.row;
  const int64_t K = r.labels_per_row, segments = panels_of(r.vocab, segment), padded = block.panels * NR;
  const int64_t group = panels_in_cache<T, E>(a.width) * MR;
  Scratch<T> highest(segments * (1 + K) * padded, Uninitialized{});  // [segment][max, label logits][row]
  Scratch<double> sums(segments * 2 * padded, Uninitialized{});      // [segment][sum, weighted][row]
  Scratch<E> weights(r.threads * group * block.units, Uninitialized{});
  const Chunks chunks(block.panels, segments, r.threads);

  parallel_for(segments * chunks.count, r.threads, [&](int64_t task, int worker) {
    const int64_t s = task / chunks.count, first = chunks.first(task % chunks.count), last = chunks.last(task % chunks.count);
    const int64_t end = std::min(r.vocab, (s + 1) * segment);
    T* high = highest.get() + s * (1 + K) * padded;
    double* sum = sums.get() + s * 2 * padded;
    for (int64_t i = 0; i < 1 + K; ++i) std::fill(high + i * padded + first * NR, high + i * padded + last * NR, static_cast<T>(-INFINITY));
    for (int64_t i = 0; i < 2; ++i) std::fill(sum + i * padded + first * NR, sum + i * padded + last * NR, 0.0);
    E* packed = weights.get() + worker * group * block.units;
    for (int64_t column = s * segment; column < end; column += group) {
      const int64_t columns = std::min(group, end - column);
      pack_weights<T>(a, column, columns, packed);
      multiply_group<T>(packed, panels_of(columns, MR), block.packed.get(), first, last, a.width, [&](int64_t p, T* tile) {
        T* lane = high + p * NR;
        finish_logits(a, block.panel[p], column, columns, tile, [&](int64_t j, int64_t k, T z) { lane[(1 + k) * padded + j] = z; });
        fold(block.panel[p], columns, tile, Lanes<T>{lane, sum + p * NR, sum + padded + p * NR});
        if (a.logits) std::copy(tile, tile + columns * NR, static_cast<T*>(a.logits) + (p * r.vocab + column) * NR);
      });
    }
  });

  Scratch<T> label_logits(r.threads * K);
  parallel_for(block.panels, worthwhile(r.threads, segments * padded), [&](int64_t p, int worker) {
    T* z = label_logits.get() + worker * K;
    for (int64_t i = p * NR; i < p * NR + block.lanes(p); ++i) {
      auto at = [&](int64_t s, int64_t j) -> double {
        if (j == 1 || j == 2) return sums[(s * 2 + j - 1) * padded + i] * (j == 2 ? 1 / log2e : 1.0);
        return highest[(s * (1 + K) + (j == 0 ? 0 : j - 2)) * padded + i];
      };
      const int64_t row = block.rows[i];
      const double scale = scale_of(r, row);
      const RowStats<T> all = merged<T>(at, segments, K, scale, z);
      if (r.partial) write_partials<T>(r, row, all, z);
      else write_row_results<T>(r, row, scale, all.max, all.sum, all.weighted, z);
    }
  });
}

template <class T, class E>
void forward(const LinearArgs& a) {
  const LogprobsArgs& r = a.row;
  for (int64_t i = 0; i < r.rows; ++i)
    if (ignored(r, i)) write_absent_row<T>(r, i);
  Scratch<int64_t> rows(r.rows, Uninitialized{});
  const int64_t count = counted_rows(r, rows.get(), [](int64_t) { return true; });
#if FASTRLHF_ISA_LEVEL < 3
  if (r.kept_indptr) return sparse_forward<T>(a, rows.get(), count);
#endif
  const int64_t values = static_cast<int64_t>(sizeof(T)) * (1 + r.labels_per_row) + 2 * static_cast<int64_t>(sizeof(double));
  const int64_t parts = panels_of(r.vocab, segment) * values;
  const int64_t size = rows_at_once<T>(a, count, units_of<E>(a.width) * static_cast<int64_t>(sizeof(E)) + parts);
  for (int64_t begin = 0; begin < count; begin += size) {
    const Block<T, E> block(a, rows.get() + begin, std::min(size, count - begin), r.threads);
    forward_block(a, block);
  }
}

// A strip of `segment` columns at a time: its d logits for all the rows of the block, then what they add to the gradients.
// G: how the products of d logits keep their operands.
template <class T, class E, class G>
class BackwardBlock {
  static constexpr int64_t MR = TileOf<T>::MR, NR = TileOf<T>::NR;

  const LinearBackwardArgs& b_;
  const LinearArgs& a_;
  const LogprobsArgs& r_;
  const Block<T, E>& block_;
  const RowGradients<T> gradients_;
  const int64_t H_, width_panels_, hidden_panels_, group_;
  bool add_;
  Scratch<PanelGradient<T>> panel_gradients_;
  Scratch<G> by_rows_;      // d logits as B, [panel of NR rows][unit of column][NR]: summed over columns into grad_hidden
  Scratch<G> by_columns_;   // d logits as A, [panel of MR columns][unit of row][MR]: summed over rows into grad_weight
  Scratch<G> hidden_;       // as B, [panel of NR of the width][unit of row][NR]
  Scratch<T> grad_hidden_;  // [panel of NR rows][width][NR]
  Scratch<E> weights_;      // a worker's group of panels of A
  Scratch<G> across_;       // a worker's group of panels of the strip's weights, transposed
  Scratch<T> tiles_;        // a worker's part of the weight's gradient
  static constexpr int64_t weight_panels = 1024 / NR;  // of the width, in such a part

  int64_t padded() const { return block_.panels * NR; }
  int64_t row_units() const { return units_of<G>(block_.count); }
  int64_t padded_units() const { return units_of<G>(padded()); }
  bool wants_hidden() const { return b_.grad_hidden != nullptr; }
  bool wants_weight() const { return b_.grad_weight != nullptr || b_.grad_bias != nullptr; }

 public:
  BackwardBlock(const LinearBackwardArgs& b, const Block<T, E>& block, bool add)
      : b_(b), a_(b.forward), r_(b.forward.row), block_(block), gradients_(b), H_(a_.width), width_panels_(panels_of(H_, MR)),
        hidden_panels_(panels_of(H_, NR)), group_(panels_in_cache<T, E>(H_) * MR), add_(add),
        panel_gradients_(block.panels, Uninitialized{}), by_rows_(wants_hidden() ? units_of<G>(segment) * padded() : 0, Uninitialized{}),
        by_columns_(wants_weight() ? segment * padded_units() : 0, Uninitialized{}),
        hidden_(b.grad_weight ? hidden_panels_ * NR * row_units() : 0, Uninitialized{}), grad_hidden_(wants_hidden() ? width_panels_ * MR * padded() : 0),
        weights_(r_.threads * group_ * block.units, Uninitialized{}), across_(wants_hidden() ? r_.threads * most_panels * MR * units_of<G>(segment) : 0, Uninitialized{}),
        tiles_(b.grad_weight ? r_.threads * weight_panels * most_panels * MR * NR : 0, Uninitialized{}) {
    parallel_for(block.panels, r_.threads, [&](int64_t p, int) { panel_gradients_[p] = gradients_.of_panel(block.panel[p], block.lanes(p)); });
    if (b.grad_weight)
      parallel_for(hidden_panels_, r_.threads, [&](int64_t j, int) {
        pack_across(a_.hidden, [&](int64_t k) { return block.rows[k]; }, j * NR, std::min(NR, H_ - j * NR), NR, block.count, hidden_.get() + j * NR * row_units());
      });
  }

  void run() {
    for (int64_t column = 0; column < r_.vocab; column += segment) {
      const int64_t columns = std::min(segment, r_.vocab - column);
      logit_gradients(column, columns);
      if (wants_weight()) weight_gradients(column, columns);
      if (wants_hidden()) hidden_gradients(column, columns);
    }
    if (wants_hidden()) write_hidden();
  }

 private:
  void logit_gradients(int64_t strip, int64_t strip_columns) {
    const int64_t groups = panels_of(strip_columns, group_);
    const Chunks chunks(block_.panels, groups, r_.threads);
    parallel_for(groups * chunks.count, r_.threads, [&](int64_t task, int worker) {
      const int64_t first = chunks.first(task % chunks.count), last = chunks.last(task % chunks.count);
      const int64_t begin = task / chunks.count * group_, n = std::min(group_, strip_columns - begin);
      if (a_.logits) {
        alignas(64) T tile[most_panels * MR * NR];
        for (int64_t p = first; p < last; ++p) {
          const T* stored = static_cast<const T*>(a_.logits) + (p * r_.vocab + strip + begin) * NR;
          std::copy(stored, stored + n * NR, tile);
          logit_gradient(strip, begin, n, p, tile);
        }
        return;
      }
      E* packed = weights_.get() + worker * group_ * block_.units;
      pack_weights<T>(a_, strip + begin, n, packed);
      // as the forward did, to the bit: a confident row's gradient is the difference between its logits and their maximum
      multiply_group<T>(packed, panels_of(n, MR), block_.packed.get(), first, last, H_, [&](int64_t p, T* tile) {
        finish_logits(a_, block_.panel[p], strip + begin, n, tile, [](int64_t, int64_t, T) {});
        logit_gradient(strip, begin, n, p, tile);
      });
    });
  }

  // Of the tiles at column `at` of the strip and panel p of the rows; written twice, as the two products want it.
  void logit_gradient(int64_t strip, int64_t at, int64_t columns, int64_t p, T* tile) {
    gradient(a_, block_.panel[p], panel_gradients_[p], strip + at, columns, tile,
             [&](int64_t row, int64_t k) { return static_cast<T>(gradients_.at_label(row, k) * scale_of(r_, row)); });
    if (wants_hidden()) keep_as_rows(tile, columns, by_rows_.get() + units_of<G>(p * segment + at) * NR);
    if (!wants_weight()) return;
    for (int64_t begin = 0; begin < columns; begin += MR)  // a panel of MR columns is MR * padded_units
      keep_as_columns(tile + begin * NR, std::min(MR, columns - begin), by_columns_.get() + (at + begin) * padded_units() + units_of<G>(p * NR) * MR);
  }

  // As many rows at a time as leave the group's panels of d logits in the second-level cache while those of the hidden states pass.
  void weight_gradients(int64_t strip, int64_t columns) {
    const int64_t panels = panels_of(columns, MR), groups = panels_of(panels, most_panels);
    const Chunks chunks(b_.grad_weight ? hidden_panels_ : 1, groups, r_.threads, weight_panels);
    parallel_for(groups * chunks.count, r_.threads, [&](int64_t task, int worker) {
      const int64_t group = task / chunks.count * most_panels, n = std::min(most_panels, panels - group);
      const int64_t first = chunks.first(task % chunks.count), last = chunks.last(task % chunks.count);
      const G* dx = by_columns_.get() + group * MR * padded_units();
      const int64_t from = strip + group * MR, count = std::min(n * MR, columns - group * MR);
      if (b_.grad_weight) {
        T* tiles = tiles_.get() + worker * weight_panels * most_panels * MR * NR;
        for (int64_t k = 0; k < row_units(); k += near_units)
          for (int64_t j = first; j < last; ++j) {
            const G* panel = hidden_.get() + (j * row_units() + k) * NR;
            multiply_panels_by_one<T>(dx + k * MR, n, MR * padded_units(), panel, std::min(near_units, row_units() - k),
                                      tiles + (j - first) * n * MR * NR, k > 0, j + 1 < last ? panel + row_units() * NR : nullptr);
          }
        for (int64_t i = 0; i < count; ++i)
          for (int64_t j = first; j < last; ++j)
            write_values(b_.grad_weight, b_.grad_weight_dtype, (from + i) * H_ + j * NR, tiles + ((j - first) * n * MR + i) * NR,
                         std::min(NR, H_ - j * NR), add_);
      }
      if (!b_.grad_bias || first > 0) return;
      for (int64_t i = 0; i < count; ++i) {
        const double sum = column_sum(dx + i / MR * MR * padded_units(), i % MR, block_.count);
        T& out = static_cast<T*>(b_.grad_bias)[from + i];
        out = static_cast<T>(add_ ? out + sum : sum);
      }
    });
  }

  void hidden_gradients(int64_t strip, int64_t columns) {
    const int64_t groups = panels_of(width_panels_, most_panels), units = units_of<G>(columns);
    const Chunks chunks(block_.panels, groups, r_.threads);
    parallel_for(groups * chunks.count, r_.threads, [&](int64_t task, int worker) {
      G* packed = across_.get() + worker * most_panels * MR * units_of<G>(segment);
      const int64_t first = task / chunks.count * most_panels, n = std::min(most_panels, width_panels_ - first);
      for (int64_t i = 0; i < n; ++i)
        pack_across(a_.weight, [&](int64_t k) { return strip + k; }, (first + i) * MR, std::min(MR, H_ - (first + i) * MR), MR, columns,
                    packed + i * MR * units);
      alignas(64) T tiles[most_panels * MR * NR];
      const int64_t last = chunks.last(task % chunks.count);
      for (int64_t p = chunks.first(task % chunks.count); p < last; ++p) {
        const G* dx = by_rows_.get() + units_of<G>(p * segment) * NR;
        multiply_panels_by_one<T>(packed, n, MR * units, dx, units, tiles, false, p + 1 < last ? dx + units_of<G>(segment) * NR : nullptr);
        T* out = grad_hidden_.get() + (p * width_panels_ + first) * MR * NR;
        for (int64_t i = 0; i < n * MR * NR; ++i) out[i] += tiles[i];
      }
    });
  }

  void write_hidden() {
    parallel_for(block_.panels, r_.threads, [&](int64_t p, int) {
      constexpr int64_t some = 256;
      T values[some];
      for (int64_t h = 0; h < H_; h += some)
        for (int64_t j = 0; j < block_.lanes(p); ++j) {
          const int64_t n = std::min(some, H_ - h);
          for (int64_t i = 0; i < n; ++i) values[i] = grad_hidden_[(p * width_panels_ * MR + h + i) * NR + j];
          write_values(b_.grad_hidden, a_.hidden.dtype, block_.rows[p * NR + j] * H_ + h, values, n, false);
        }
    });
  }
};

template <class T>
void clear(const LinearBackwardArgs& b) {
  const LinearArgs& a = b.forward;
  if (b.grad_hidden) std::memset(b.grad_hidden, 0, a.row.rows * a.width * element_size(a.hidden.dtype));
  if (b.accumulate) return;
  if (b.grad_weight) std::memset(b.grad_weight, 0, a.row.vocab * a.width * element_size(b.grad_weight_dtype));
  if (b.grad_bias) std::memset(b.grad_bias, 0, a.row.vocab * sizeof(T));
}

template <class T, class E, class G>
void backward(const LinearBackwardArgs& b) {
  const LinearArgs& a = b.forward;
  const RowGradients<T> gradients(b);
  Scratch<int64_t> rows(a.row.rows, Uninitialized{});
  const int64_t count = counted_rows(a.row, rows.get(), [&](int64_t i) { return a.logits || gradients.any(i); });
  if (count < a.row.rows || count == 0 || a.row.kept_indptr) clear<T>(b);
#if FASTRLHF_ISA_LEVEL < 3
  if (a.row.kept_indptr) return sparse_backward<T>(b, rows.get(), count, gradients);
#endif
  const int64_t size = rows_at_once<T>(a, count, (3 * a.width + 2 * segment) * static_cast<int64_t>(sizeof(T)));
  // several blocks add up in the output where it is wide enough, else in `sums`
  const bool narrow = b.grad_weight && b.grad_weight_dtype != a.row.logits.dtype && !b.accumulate && !b.narrow_sums && count > size;
  const int64_t values = a.row.vocab * a.width;
  Scratch<T> sums(narrow ? values : 0, Uninitialized{});
  LinearBackwardArgs to = b;
  if (narrow) to.grad_weight = sums.get(), to.grad_weight_dtype = a.row.logits.dtype;
  for (int64_t begin = 0; begin < count; begin += size) {
    const Block<T, E> block(a, rows.get() + begin, std::min(size, count - begin), a.row.threads);
    BackwardBlock<T, E, G>(to, block, b.accumulate || begin > 0).run();
  }
  if (narrow)
    parallel_for(a.row.vocab, a.row.threads, [&](int64_t i, int) {
      write_values(b.grad_weight, b.grad_weight_dtype, i * a.width, sums.get() + i * a.width, a.width, false);
    });
}

// f(compute type, operand type) for the dtypes of a call.
template <class F>
void with_types([[maybe_unused]] const LinearArgs& a, F&& f) {
#if FASTRLHF_ISA_LEVEL == 3
  f(float{}, Pair{});
#else
  with_compute_type(is_f64(a), [&](auto t) { f(t, t); });
#endif
}

}  // namespace

void linear_logprobs_forward(const LinearArgs& a) {
  with_types(a, [&](auto t, auto e) { forward<decltype(t), decltype(e)>(a); });
}

#if FASTRLHF_ISA_LEVEL < 3
void linear_logprobs_stored_lanes(const StoredLanes& s) { with_compute_type(s.f64, [&](auto t) { *s.lanes = TileOf<decltype(t)>::NR; }); }
#endif

void linear_logprobs_backward(const LinearBackwardArgs& b) {
  with_types(b.forward, [&](auto t, auto e) {
    using T = decltype(t);
    using E = decltype(e);
    b.rounded ? backward<T, E, E>(b) : backward<T, E, T>(b);
  });
}

}}  // namespace
