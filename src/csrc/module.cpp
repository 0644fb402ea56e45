#include <string>

#include "bind.h"
#include "isa.h"
#include "scratch.h"

PYBIND11_MODULE(_cpu, m) {
  using namespace fastrlhf;
  m.doc() = "CPU kernels of fastrlhf: addresses, sizes, strides and dtype codes in; nothing of torch.";
  m.def("isa", [] { return std::string(isa_name(current_isa())); }, "The instruction set the kernels use.");
  m.def("isas", [] {
    py::list names;
    for (int i = 0; i < isa_count; ++i)
      if (isa_available(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
    return names;
  }, "The instruction sets this build and this processor have.");
  m.def("set_isa", [](const std::string& name) {
    for (int i = 0; i < isa_count; ++i) {
      const auto isa = static_cast<Isa>(i);
      if (name != isa_name(isa)) continue;
      if (!isa_available(isa)) throw std::invalid_argument("isa: '" + name + "' is not available on this machine");
      return set_isa(isa);
    }
    throw std::invalid_argument("isa: '" + name + "' is not one of scalar, avx2, avx512, avx512_bf16");
  }, py::arg("name"));
  m.def("prefer_huge_pages", [](uintptr_t p, int64_t bytes) { prefer_huge_pages(pointer(p), bytes); },
        "Asks for huge pages under a large new tensor.");
  bind_logprobs(m);
  bind_linear(m);
  bind_rollout(m);
  bind_losses(m);
  bind_sampling(m);
  bind_generation(m);
  bind_refit(m);
}
