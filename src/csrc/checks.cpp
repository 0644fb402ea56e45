#include "checks.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace fastrlhf {
namespace {

template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream s;
  s.precision(17);
  (s << ... << parts);
  throw Error(s.str());
}

template <class Label>
void check_labels_as(const LogprobsArgs& a, int64_t vocab_total) {
  const auto* labels = static_cast<const Label*>(a.labels);
  for (int64_t i = 0, n = a.rows * a.labels_per_row; i < n; ++i)
    if ((labels[i] < 0 || labels[i] >= vocab_total) && labels[i] != a.ignore_index)
      fail<std::out_of_range>("labels: ", static_cast<int64_t>(labels[i]), " at flat position ", i, " is outside [0, ",
                              vocab_total, ") and is not ignore_index (", a.ignore_index, ")");
}

}  // namespace

void check_labels(const LogprobsArgs& a, int64_t vocab_total) {
  if (a.label_dtype == DType::i32) check_labels_as<int32_t>(a, vocab_total);
  else check_labels_as<int64_t>(a, vocab_total);
}

void check_temperatures(const LogprobsArgs& a) {
  if (!a.temperatures) return;
  for (int64_t i = 0; i < a.rows; ++i)
    if (!(a.temperatures[i] >= 1e-20 && a.temperatures[i] <= 1e20))
      fail<std::invalid_argument>("temperature: every value must lie in [1e-20, 1e20], got ", a.temperatures[i],
                                  " at flat position ", i);
}

void check_kept(const LogprobsArgs& a, int64_t indices, int64_t vocab_total) {
  if (!a.kept_indptr) return;
  if (a.kept_indptr[0] != 0) fail<std::invalid_argument>("kept: indptr must begin with 0, got ", a.kept_indptr[0]);
  for (int64_t r = 0; r < a.rows; ++r)
    if (a.kept_indptr[r + 1] < a.kept_indptr[r])
      fail<std::invalid_argument>("kept: indptr must not fall, got ", a.kept_indptr[r], " then ", a.kept_indptr[r + 1],
                                  " at position ", r + 1);
  if (a.kept_indptr[a.rows] != indices)
    fail<std::invalid_argument>("kept: indptr ends with ", a.kept_indptr[a.rows], " but there are ", indices, " indices");
  for (int64_t i = 0; i < indices; ++i)
    if (a.kept_indices[i] < 0 || a.kept_indices[i] >= vocab_total)
      fail<std::out_of_range>("kept: index ", a.kept_indices[i], " at position ", i, " is outside [0, ", vocab_total, ")");
}

void check_cu_seqlens(const Rows& rows, int64_t total) {
  const int64_t* cu = rows.cu_seqlens;
  if (!cu) return;
  if (cu[0] != 0) fail<std::invalid_argument>("cu_seqlens: must begin with 0, got ", cu[0]);
  for (int64_t b = 0; b < rows.count; ++b)
    if (cu[b + 1] < cu[b])
      fail<std::invalid_argument>("cu_seqlens: must not fall, got ", cu[b], " then ", cu[b + 1], " at position ", b + 1);
  if (cu[rows.count] != total)
    fail<std::invalid_argument>("cu_seqlens: ends with ", cu[rows.count], " but there are ", total, " tokens");
}

void check_unit_interval(const double* x, int64_t n, const char* name) {
  if (!x) return;
  for (int64_t i = 0; i < n; ++i)
    if (!(x[i] >= 0 && x[i] <= 1)) fail<std::invalid_argument>(name, ": must lie in [0, 1], got ", x[i], " at position ", i);
}

}  // namespace fastrlhf
