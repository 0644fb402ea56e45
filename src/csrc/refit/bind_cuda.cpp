// What a refit between two processes on one GPU needs of CUDA: the batched copy, and memory and events by handle.
#if defined(FASTRLHF_CUDA_HOST)
#include "shim.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "../bind.h"
#include "bind_cuda.h"
#include "cuda_copy.h"

namespace fastrlhf {

#if !defined(FASTRLHF_CUDA_HOST)
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

template <class Handle>
Handle handle_of(const py::bytes& given) {
  const std::string raw = given;
  if (raw.size() != sizeof(Handle)) throw std::invalid_argument("handle: expected " + std::to_string(sizeof(Handle)) + " bytes, got " + std::to_string(raw.size()));
  Handle handle;
  std::memcpy(&handle, raw.data(), sizeof handle);
  return handle;
}

// cuMemGetAddressRange without linking the driver: the object must load where there is none.
std::pair<uintptr_t, size_t> allocation_of(uintptr_t address) {
  using Function = int (*)(unsigned long long*, size_t*, unsigned long long);
  void* function = nullptr;
#if CUDART_VERSION >= 13000
  check(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &function, 12000, cudaEnableDefault, nullptr), "cuMemGetAddressRange");
#else
  check(cudaGetDriverEntryPoint("cuMemGetAddressRange", &function, cudaEnableDefault, nullptr), "cuMemGetAddressRange");
#endif
  unsigned long long base = 0;
  size_t size = 0;
  if (!function || reinterpret_cast<Function>(function)(&base, &size, address) != 0) throw std::invalid_argument("address: not of an allocation on the device");
  return {static_cast<uintptr_t>(base), size};
}

}  // namespace
#endif

void bind_refit_cuda(py::module_& m) {
  m.def("run_copies", [](uintptr_t copies, uintptr_t tiles, int64_t count, uintptr_t stream) {
    const int status = cuda::run_copies(pointer<const int64_t>(copies), pointer<const int64_t>(tiles), count, pointer(stream));
    if (status != 0) throw std::runtime_error("CUDA: the copies were not launched, error " + std::to_string(status));
  });
#if !defined(FASTRLHF_CUDA_HOST)
  m.def("ipc_export", [](uintptr_t address) {
    const auto [base, size] = allocation_of(address);
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base)),
          "the allocation cannot be shared; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True makes such");
    return py::make_tuple(py::bytes(reinterpret_cast<const char*>(&handle), sizeof handle), address - base, size);
  }, "(handle of the allocation, offset in it, its bytes) of an address.");
  m.def("ipc_open", [](const py::bytes& handle) {
    void* base = nullptr;
    check(cudaIpcOpenMemHandle(&base, handle_of<cudaIpcMemHandle_t>(handle), cudaIpcMemLazyEnablePeerAccess), "open memory of another process");
    return reinterpret_cast<uintptr_t>(base);
  });
  m.def("ipc_close", [](uintptr_t base) { check(cudaIpcCloseMemHandle(pointer(base)), "close memory of another process"); });
  m.def("ipc_event", [] {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess), "make an event");
    cudaIpcEventHandle_t handle;
    check(cudaIpcGetEventHandle(&handle, event), "share an event");
    return py::make_tuple(reinterpret_cast<uintptr_t>(event), py::bytes(reinterpret_cast<const char*>(&handle), sizeof handle));
  }, "(event, handle).");
  m.def("ipc_open_event", [](const py::bytes& handle) {
    cudaEvent_t event;
    check(cudaIpcOpenEventHandle(&event, handle_of<cudaIpcEventHandle_t>(handle)), "open an event of another process");
    return reinterpret_cast<uintptr_t>(event);
  });
  m.def("record_event", [](uintptr_t event, uintptr_t stream) { check(cudaEventRecord(static_cast<cudaEvent_t>(pointer(event)), static_cast<cudaStream_t>(pointer(stream))), "record an event"); });
  m.def("wait_event", [](uintptr_t event, uintptr_t stream) { check(cudaStreamWaitEvent(static_cast<cudaStream_t>(pointer(stream)), static_cast<cudaEvent_t>(pointer(event)), 0), "wait for an event"); });
  m.def("close_event", [](uintptr_t event) { check(cudaEventDestroy(static_cast<cudaEvent_t>(pointer(event))), "close an event"); });
#endif
}

}  // namespace fastrlhf
