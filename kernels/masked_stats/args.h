#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

struct MomentsArgs {
  Rows rows;
  bool f64 = false;
  Array x, mask;
  double* moments = nullptr;   // n, mean, m2
  int threads = 1;
};

struct RowSumsArgs {
  Rows rows;
  bool f64 = false;
  Array x, mask;
  bool average = false;
  void* sums = nullptr;        // (B): masked sum, or mean
  void* counts = nullptr;      // (B) or null
  int threads = 1;
};

// (x - shift) * scale + back where the mask is not 0, 0 elsewhere; out may be x.
struct StandardizeArgs {
  Rows rows;
  bool f64 = false;
  Array x, mask;
  double shift = 0, scale = 1, back = 0;
  void* out = nullptr;
  int threads = 1;
};

}  // namespace fastrlhf
