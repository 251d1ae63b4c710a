// freezeops._host: packing, counting and listing mask bits for NumPy, and plans made from them. No TensorFlow.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

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

// Makes the plan that freezeops/masks/visits.py describes, a chunk of rows at a time.
class Plan {
 public:
  Plan(const uint8_t* bits, int64_t rows, int64_t columns, int64_t panel, int64_t chunk)
      : panel_(panel), of_panel_((columns + panel - 1) / panel) {
    for (int64_t first = 0; first < rows; first += chunk) {
      columns_of_chunk_.clear();
      for (int64_t row = first; row < std::min(first + chunk, rows); ++row) FindVisits(bits, row, columns);
      for (size_t i = 0; i < of_panel_.size(); ++i) AddBlock(&of_panel_[i], static_cast<int64_t>(i) * panel);
    }
    AddStart();
  }

  // Numbers of the plan, without the head.
  int64_t size() const {
    const size_t numbers = starts_.size() + groups_.size() + rows_.size() + ranks_.size() + (in_panel_.size() + 1) / 2;
    return static_cast<int64_t>(numbers);
  }
  int64_t entries() const { return static_cast<int64_t>(in_panel_.size()); }
  int64_t visits() const { return static_cast<int64_t>(rows_.size()); }
  int64_t groups() const { return static_cast<int64_t>(groups_.size()) / 2; }

  void Write(int32_t* to) const {
    for (const std::vector<int32_t>* part : {&starts_, &groups_, &rows_, &ranks_}) {
      to = std::copy(part->begin(), part->end(), to);
    }
    if (!in_panel_.empty()) std::memcpy(to, in_panel_.data(), in_panel_.size() * sizeof(uint16_t));
  }

 private:
  struct Visit {
    int32_t row, rank, count;
  };

  // Finds the visits of a row, and the columns of its entries.
  void FindVisits(const uint8_t* bits, int64_t row, int64_t columns) {
    const int64_t begin = row * columns, end = begin + columns;
    const int64_t byte_count = mask_bytes(end);
    int64_t end_of_panel = 0;
    size_t panel = 0;
    for (int64_t bit = begin; bit < end; bit += 64) {
      uint64_t word = load_bits(bits, byte_count, bit) & low_bits(end - bit);
      for (; word != 0; word &= word - 1) {
        const int64_t column = bit - begin + __builtin_ctzll(word);
        if (column >= end_of_panel) {
          panel = static_cast<size_t>(column / panel_);
          end_of_panel = static_cast<int64_t>(panel + 1) * panel_;
          of_panel_[panel].push_back({static_cast<int32_t>(row), static_cast<int32_t>(rank_), 0});
        }
        ++of_panel_[panel].back().count;
        columns_of_chunk_.push_back(static_cast<int32_t>(column));
        ++rank_;
      }
    }
  }

  void AddStart() {
    for (const int64_t start : {groups(), visits(), entries()}) starts_.push_back(static_cast<int32_t>(start));
  }

  // Adds the visits of a block by their counts, and empties it.
  void AddBlock(std::vector<Visit>* block, int64_t first_column) {
    AddStart();
    std::stable_sort(block->begin(), block->end(), [](const Visit& a, const Visit& b) { return a.count < b.count; });
    const int64_t first_rank = rank_ - static_cast<int64_t>(columns_of_chunk_.size());
    int32_t count = 0;
    for (const Visit& visit : *block) {
      if (visit.count != count) {
        count = visit.count;
        groups_.push_back(count);
        groups_.push_back(0);
      }
      ++groups_.back();
      rows_.push_back(visit.row);
      ranks_.push_back(visit.rank);
      const int32_t* const column = columns_of_chunk_.data() + (visit.rank - first_rank);
      for (int32_t k = 0; k < count; ++k) in_panel_.push_back(static_cast<uint16_t>(column[k] - first_column));
    }
    block->clear();
  }

  int64_t panel_;
  int64_t rank_ = 0;                          // of the next entry
  std::vector<std::vector<Visit>> of_panel_;  // of the chunk
  std::vector<int32_t> columns_of_chunk_;
  std::vector<int32_t> starts_, groups_, rows_, ranks_;
  std::vector<uint16_t> in_panel_;
};

py::array_t<int32_t> visits(const py::array& bits, int64_t rows, int64_t columns, int64_t tokens, int64_t panel,
                            int64_t chunk, int64_t size) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  if (rows < 0 || rows > kMost || columns < 0 || columns > kMost || tokens < 1 || tokens > kMost || panel < 1 ||
      panel > 65536 || chunk < 1 || chunk > kMost) {
    throw py::value_error("rows, columns, tokens, panel and chunk must be numbers of a plan");
  }
  check_bits(bits, rows * columns);
  const uint8_t* const from = static_cast<const uint8_t*>(bits.data());
  if (count(bits, rows * columns) > kMost) throw py::value_error("bits must have fewer than 2^31 ones");
  py::gil_scoped_release released;
  const Plan plan(from, rows, columns, panel, chunk);
  py::gil_scoped_acquire acquired;
  constexpr int64_t kHead = 8;
  if (kHead + plan.size() > size) {
    throw py::value_error("size must be that of the plan at least. Received: size=" + std::to_string(size) +
                          ", a plan of " + std::to_string(kHead + plan.size()));
  }
  py::array_t<int32_t> vector(size);
  int32_t* const to = vector.mutable_data();
  std::fill(to, to + size, 0);
  int32_t* next = to;
  for (const int64_t number : {tokens, panel, chunk, rows, columns, plan.entries(), plan.visits(), plan.groups()}) {
    *next++ = static_cast<int32_t>(number);
  }
  plan.Write(next);
  return vector;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Packed mask bits for NumPy: bit i is bit i % 8 of byte i // 8.";
  m.def("pack", &pack, py::arg("values"), "The packed bits (uint8 vector) of a C-contiguous bool or uint8 array.");
  m.def("unpack", &unpack, py::arg("bits"), py::arg("n"), "The first n bits as a bool vector.");
  m.def("count", &count, py::arg("bits"), py::arg("n"), "How many of the first n bits are set.");
  m.def("visits", &visits, py::arg("bits"), py::arg("rows"), py::arg("columns"), py::arg("tokens"), py::arg("panel"),
        py::arg("chunk"), py::arg("size"), "The plan of freezeops/masks/visits.py, in a vector of int32.");
  m.def("indices", &indices, py::arg("bits"), py::arg("n"), "The positions (int64) of the set bits among the first n.");
}
