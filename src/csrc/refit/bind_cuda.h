#pragma once

#include <pybind11/pybind11.h>

namespace fastrlhf {

void bind_refit_cuda(pybind11::module_& m);

}  // namespace fastrlhf
