// The CUDA object: what it was built for. Kernels join it room by room.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#define FASTRLHF_TEXT_(x) #x
#define FASTRLHF_TEXT(x) FASTRLHF_TEXT_(x)

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastrlhf: addresses, sizes, strides, dtype codes and a stream in; nothing of torch.";
  m.def("runtime_version", [] {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
  }, "The CUDA runtime linked in, as 1000 * major + 10 * minor.");
  m.attr("architectures") = FASTRLHF_TEXT(FASTRLHF_CUDA_ARCH_LIST);
}
