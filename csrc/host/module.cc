// freezeops._host: packing, counting and listing mask bits for NumPy. No TensorFlow.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "mask_layout.h"

namespace py = pybind11;

namespace {

using freezeops::load_bits;
using freezeops::low_bits;
using freezeops::mask_bytes;

using Bytes = py::array_t<uint8_t, py::array::c_style>;

// One byte from eight values, bit i from value i (any non-zero value is a 1).
uint8_t pack_eight(const uint8_t* values) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  uint64_t word;
  std::memcpy(&word, values, 8);
  constexpr uint64_t kLow7 = 0x7f7f7f7f7f7f7f7f;
  word = (((word & kLow7) + kLow7) | word) >> 7 & 0x0101010101010101;
  return static_cast<uint8_t>((word * 0x0102040810204080) >> 56);
#else
  uint8_t byte = 0;
  for (int i = 0; i < 8; ++i) byte |= static_cast<uint8_t>((values[i] != 0) << i);
  return byte;
#endif
}

Bytes pack(const py::array& values) {
  if (values.itemsize() != 1 || (values.dtype().kind() != 'b' && values.dtype().kind() != 'u') ||
      !(values.flags() & py::array::c_style)) {
    throw py::type_error("values must be a C-contiguous array of bool or uint8. Received: dtype=" +
                         std::string(py::str(values.dtype())));
  }
  const int64_t count = values.size();
  Bytes packed(mask_bytes(count));
  const uint8_t* from = static_cast<const uint8_t*>(values.data());
  uint8_t* to = packed.mutable_data();
  {
    py::gil_scoped_release released;
    const int64_t whole = count / 8;
    for (int64_t i = 0; i < whole; ++i) to[i] = pack_eight(from + 8 * i);
    if (count % 8 != 0) {
      uint8_t byte = 0;
      for (int64_t i = whole * 8; i < count; ++i) byte |= static_cast<uint8_t>((from[i] != 0) << (i % 8));
      to[whole] = byte;
    }
  }
  return packed;
}

// Checks that `bits` holds at least `count` bits.
void check_bits(const py::array& bits, int64_t count) {
  if (bits.itemsize() != 1 || bits.dtype().kind() != 'u' || bits.ndim() != 1 || !(bits.flags() & py::array::c_style)) {
    throw py::type_error("bits must be a C-contiguous vector of uint8. Received: dtype=" +
                         std::string(py::str(bits.dtype())) + ", ndim=" + std::to_string(bits.ndim()));
  }
  if (count < 0 || mask_bytes(count) > bits.size()) {
    throw py::value_error("n must not be negative nor more than the bits there are. Received: n=" +
                          std::to_string(count) + ", bits of " + std::to_string(bits.size()) + " bytes");
  }
}

py::array_t<bool> unpack(const py::array& bits, int64_t count) {
  check_bits(bits, count);
  py::array_t<bool> values(count);
  const uint8_t* from = static_cast<const uint8_t*>(bits.data());
  uint8_t* to = reinterpret_cast<uint8_t*>(values.mutable_data());
  py::gil_scoped_release released;
  for (int64_t i = 0; i < count; ++i) to[i] = (from[i >> 3] >> (i & 7)) & 1;
  return values;
}

int64_t count_set(const uint8_t* bits, int64_t count) {
  const int64_t byte_count = mask_bytes(count);
  int64_t total = 0;
  int64_t bit = 0;
  for (; bit + 64 <= count; bit += 64) total += __builtin_popcountll(load_bits(bits, byte_count, bit));
  return total + __builtin_popcountll(load_bits(bits, byte_count, bit) & low_bits(count - bit));
}

int64_t count(const py::array& bits, int64_t n) {
  check_bits(bits, n);
  const uint8_t* from = static_cast<const uint8_t*>(bits.data());
  py::gil_scoped_release released;
  return count_set(from, n);
}

py::array_t<int64_t> indices(const py::array& bits, int64_t n) {
  check_bits(bits, n);
  const uint8_t* from = static_cast<const uint8_t*>(bits.data());
  int64_t total;
  {
    py::gil_scoped_release released;
    total = count_set(from, n);
  }
  py::array_t<int64_t> found(total);
  int64_t* to = found.mutable_data();
  const int64_t* const end = to + total;
  py::gil_scoped_release released;
  const int64_t byte_count = mask_bytes(n);
  for (int64_t bit = 0; bit < n; bit += 64) {
    uint64_t word = load_bits(from, byte_count, bit) & low_bits(n - bit);
    // The end is looked at as well, in case another thread writes the bits meanwhile.
    for (; word != 0 && to != end; word &= word - 1) *to++ = bit + __builtin_ctzll(word);
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packed mask bits for NumPy: bit i is bit i % 8 of byte i // 8.";
  m.def("pack", &pack, py::arg("values"), "The packed bits (uint8 vector) of a C-contiguous bool or uint8 array.");
  m.def("unpack", &unpack, py::arg("bits"), py::arg("n"), "The first n bits as a bool vector.");
  m.def("count", &count, py::arg("bits"), py::arg("n"), "How many of the first n bits are set.");
  m.def("indices", &indices, py::arg("bits"), py::arg("n"), "The positions (int64) of the set bits among the first n.");
}
