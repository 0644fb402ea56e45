// What a CUDA entry gets besides its arguments: nothing is allocated behind it.
#pragma once

#include <cstdint>

namespace fastrlhf {

struct Launch {
  void* stream = nullptr;         // cudaStream_t
  double* workspace = nullptr;    // partial sums of blocks
  int64_t workspace_size = 0;     // doubles
  int* counter = nullptr;         // 0 before and after a launch: finds the last block
};

constexpr int no_workspace = -1;  // an entry's result when the work space is too small; else CUDA's error code

}  // namespace fastrlhf
