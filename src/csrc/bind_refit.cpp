#include <stdexcept>
#include <string>

#include "bind.h"
#include "refit/arena.h"
#include "refit/copy.h"
#include "refit/xxh3.h"

namespace fastrlhf {

static_assert(sizeof(Copy) == 6 * sizeof(int64_t), "a table of copies is an array of six words each");

void bind_refit(py::module_& m) {
  py::class_<Arena>(m, "Arena", py::buffer_protocol(), "Memory shared with other processes by its file descriptor.")
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def(py::init<int, int64_t>(), py::arg("fd"), py::arg("bytes"))
      .def_property_readonly("fd", &Arena::fd)
      .def_property_readonly("nbytes", &Arena::size)
      .def_property_readonly("address", [](const Arena& a) { return reinterpret_cast<uintptr_t>(a.data()); })
      .def_buffer([](Arena& a) { return py::buffer_info(static_cast<unsigned char*>(a.data()), static_cast<py::ssize_t>(a.size())); });
  m.def("run_copies", [](uintptr_t table, int64_t count, uintptr_t hashes, int threads) {
    const auto* copies = pointer<const Copy>(table);
    for (int64_t i = 0; i < count; ++i) {
      const Copy& c = copies[i];
      if (c.rows < 0 || c.width < 0) throw std::invalid_argument("copies: copy " + std::to_string(i) + " has a negative size");
      if (!c.src || (!c.dst && !hashes)) throw std::invalid_argument("copies: copy " + std::to_string(i) + " has no address");
    }
    py::gil_scoped_release release;
    run_copies(copies, count, pointer<uint64_t>(hashes), threads);
  }, "(count, 6) words: source, destination, rows, bytes of a row, source and destination pitch.");
  m.def("xxh3", [](uintptr_t data, int64_t bytes) { return xxh3(pointer<const void>(data), bytes); }, "XXH3-64 of bytes at an address.");
}

}  // namespace fastrlhf
