// FASTRLHF_HOST_DEVICE: mathematics that the CPU kernels, the CUDA kernels and the tests on the host share.
#pragma once

#if defined(__CUDACC__)
#define FASTRLHF_HOST_DEVICE __host__ __device__
#else
#define FASTRLHF_HOST_DEVICE
#endif
