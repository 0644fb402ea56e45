// From Python's hands to kernel arguments. A tensor arrives as a tuple of its address, dtype code and strides.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"
#include "tensor.h"

namespace fastrlhf {

namespace py = pybind11;

// (address, dtype, strides, per_row) or None. The one stride of (total) or (B) serves as whichever is asked for.
inline Array array(const py::object& o) {
  Array a;
  if (o.is_none()) return a;
  const auto t = py::reinterpret_borrow<py::tuple>(o);
  a.data = reinterpret_cast<const void*>(t[0].cast<uintptr_t>());
  a.dtype = static_cast<DType>(t[1].cast<int>());
  const auto strides = py::reinterpret_borrow<py::tuple>(t[2]);
  a.row_stride = strides[0].cast<int64_t>();
  a.col_stride = strides.size() > 1 ? strides[1].cast<int64_t>() : a.row_stride;
  a.per_row = t[3].cast<bool>();
  return a;
}

// (address, dtype, inner, outer_stride, inner_stride)
inline Matrix matrix(const py::tuple& t) {
  Matrix m;
  m.data = reinterpret_cast<void*>(t[0].cast<uintptr_t>());
  m.dtype = static_cast<DType>(t[1].cast<int>());
  m.inner = t[2].cast<int64_t>();
  m.outer_stride = t[3].cast<int64_t>();
  m.inner_stride = t[4].cast<int64_t>();
  return m;
}

// (rows, length, address of cu_seqlens or 0, tokens), the boundaries unread: they may lie on a GPU
inline Rows device_rows(const py::tuple& t) {
  Rows r;
  r.count = t[0].cast<int64_t>();
  r.length = t[1].cast<int64_t>();
  r.cu_seqlens = reinterpret_cast<const int64_t*>(t[2].cast<uintptr_t>());
  r.tokens = t[3].cast<int64_t>();
  return r;
}

// The same, where the segments of a pack can be checked, their longest becomes the length
inline Rows rows(const py::tuple& t) {
  Rows r = device_rows(t);
  if (!r.cu_seqlens) return r;
  check_cu_seqlens(r, r.tokens);
  r.length = 0;
  for (int64_t b = 0; b < r.count; ++b) if (r.size(b) > r.length) r.length = r.size(b);
  return r;
}

template <class T = void>
inline T* pointer(uintptr_t p) { return reinterpret_cast<T*>(p); }

void bind_logprobs(py::module_& m);
void bind_linear(py::module_& m);
void bind_rollout(py::module_& m);
void bind_losses(py::module_& m);
void bind_sampling(py::module_& m);
void bind_generation(py::module_& m);
void bind_refit(py::module_& m);

}  // namespace fastrlhf
