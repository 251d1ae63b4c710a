// Updates the variables of a step in parallel (fused updates).
//
// Not for files that are compiled for different instruction sets: it uses the standard library.

#ifndef FREEZEOPS_KERNELS_CPU_PARALLEL_FUSED_H_
#define FREEZEOPS_KERNELS_CPU_PARALLEL_FUSED_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/common/dtypes.h"
#include "kernels/common/update_rules.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel_compact.h"

namespace freezeops {
namespace cpu {

// A gradient for some rows of a variable, as in tf.IndexedSlices.
struct Slices {
  const void* values;   // [count, width]
  const int64_t* rows;  // rows out of range are skipped
  int64_t count;
  int64_t width;
};

// One variable of a step.
struct FusedVariable {
  FusedTensor tensor;
  const int64_t* offsets;    // compact state: see ParallelCompact; null in full state
  TrainableIndices indices;  // likewise
  int64_t capacity;
  const Slices* slices;  // instead of tensor.gradient; null: the gradient is dense
};

// Updates variables in pieces that threads take one after the other: small variables share a batch, large ones are
// split, and a thread whose piece is mostly frozen takes the next one sooner.
class ParallelFused {
 public:
  // `scalars`: the rule's scalars, of the variables' type.
  ParallelFused(const NamedRule& rule, Float type, const void* scalars, const Seeds& seeds, int64_t threads,
                ParallelForFunction parallel_for)
      : rule_(rule.rule), type_(type), threads_(threads), parallel_for_(std::move(parallel_for)) {
    std::memcpy(scalars_, scalars, rule.scalars * width());
    std::memcpy(scalars_of_scaled_, scalars_, sizeof(scalars_));
    std::memcpy(scalars_of_scaled_ + kRate * width(), One(), width());
    step_ = {rule.flags, scalars_, seeds};
    step_of_scaled_ = {rule.flags, scalars_of_scaled_, seeds};
  }
  ParallelFused(const ParallelFused&) = delete;
  ParallelFused& operator=(const ParallelFused&) = delete;

  // Updates all variables. Returns false where offsets or indices are not those of the mask: then nothing was written,
  // or, where single indices are wrong, no entry that is not trainable.
  bool Update(const std::vector<FusedVariable>& variables) {
    for (const FusedVariable& variable : variables) {
      if (variable.offsets != nullptr && !CheckRanks(variable)) return false;
    }
    std::vector<Piece> pieces;
    std::vector<Rows> rows(variables.size());
    for (size_t i = 0; i < variables.size(); ++i) {
      const FusedVariable& variable = variables[i];
      if (entries(variable.tensor.mask.layout) == 0) continue;
      if (variable.slices != nullptr) {
        rows[i] = SumRows(*variable.slices, entries(variable.tensor.mask.layout));
        AddRows(variable, rows[i], &pieces);
      } else {
        AddPieces(variable, &pieces);
      }
    }
    std::vector<size_t> batches = {0};
    int64_t in_batch = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
      in_batch += (pieces[i].end - pieces[i].begin) * (pieces[i].by_index ? kPieceEntries / kPieceIndices : 1);
      if (in_batch >= kPieceEntries || i + 1 == pieces.size()) {
        batches.push_back(i + 1);
        in_batch = 0;
      }
    }
    const int64_t count = static_cast<int64_t>(batches.size()) - 1;
    std::atomic<int64_t> next(0);
    std::atomic<bool> all_fit(true);
    const auto work = [&] {
      for (int64_t batch = next++; batch < count; batch = next++) {
        for (size_t i = batches[batch]; i < batches[batch + 1]; ++i) {
          if (!Run(pieces[i])) all_fit = false;
        }
      }
    };
    const int64_t workers = std::min(threads_, count);
    if (workers <= 1) {
      work();
    } else {
      constexpr int64_t kMuch = int64_t{1} << 30;
      parallel_for_(workers, kMuch, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) work();
      });
    }
    return all_fit;
  }

 private:
  // Entries of a piece: many against the cost of taking one, few enough for the cache of one core.
  static constexpr int64_t kPieceEntries = 32768;
  // Of a piece by index, where each entry is in a line of its own. With 8192 of them 10,000 took longer on two threads.
  static constexpr int64_t kPieceIndices = 16384;

  struct Piece {
    const FusedVariable* variable;
    int64_t begin, end;  // entries; by index: trainable entries
    const char* gradient;
    const char* square;
    bool by_index;
  };

  // The sums of slices, row by row.
  struct Rows {
    std::vector<int64_t> names;  // of the rows that have slices, ascending
    std::vector<char> sums, squares;
  };

  int64_t width() const { return width_of(type_); }

  // Returns whether entries are found by their indices and not by the bits, which is faster below a density of 1/4;
  // with a compact gradient, of which the bits' way has less to collect, below 1/8.
  static bool ByIndex(const FusedVariable& variable) {
    if (variable.offsets == nullptr || variable.slices != nullptr) return false;
    const MaskLayout& layout = variable.tensor.mask.layout;
    const int64_t least = (variable.indices.wide ? 8 : 4) * (variable.tensor.gathered == nullptr ? 1 : 2);
    return layout.inner == 1 && Total(variable) < layout.kept / least;
  }

  static int64_t Total(const FusedVariable& variable) {
    return variable.offsets[rank_blocks(variable.tensor.mask.layout.kept)];
  }

  // Returns whether the offsets are the ranks of the mask's blocks and, where entries are found by their indices,
  // whether the first index of each block is that of a one in it.
  bool CheckRanks(const FusedVariable& variable) const {
    const MaskView& mask = variable.tensor.mask;
    const int64_t kept = mask.layout.kept;
    const int64_t* const offsets = variable.offsets;
    if (offsets[0] != 0 || Total(variable) > variable.capacity) return false;
    const bool by_index = ByIndex(variable);
    const TrainableIndices& indices = variable.indices;
    std::atomic<bool> fits(true);
    parallel_for_(rank_blocks(kept), kRankBlockBits / 16, [&](int64_t first, int64_t last) {
      bool fit = true;
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * kRankBlockBits;
        const int64_t end = std::min(begin + kRankBlockBits, kept);
        const int64_t ones = kernels().count_ones(mask.bits, begin, end);
        const int64_t rank = offsets[block];
        fit = fit && rank >= 0 && rank <= variable.capacity - ones && offsets[block + 1] == rank + ones;
        if (!fit || !by_index || ones == 0) continue;
        const int64_t index = indices.wide ? static_cast<const int64_t*>(indices.data)[rank]
                                           : static_cast<int64_t>(static_cast<const uint32_t*>(indices.data)[rank]);
        fit = index >= begin && index < end && bit_is_set(mask.bits, index);
      }
      if (!fit) fits = false;
    });
    return fits;
  }

  void AddPieces(const FusedVariable& variable, std::vector<Piece>* pieces) const {
    const MaskLayout& layout = variable.tensor.mask.layout;
    const bool by_index = ByIndex(variable);
    const int64_t count = by_index ? Total(variable) : entries(layout);
    const char* const gradient = static_cast<const char*>(variable.tensor.gradient);
    Split(variable, 0, count, gradient, nullptr, by_index, pieces);
  }

  // Splits [begin, end) into pieces. They end at multiples of 64 entries where they can, so that threads share no line
  // of an aligned tensor.
  void Split(const FusedVariable& variable, int64_t begin, int64_t end, const char* gradient, const char* square,
             bool by_index, std::vector<Piece>* pieces) const {
    const int64_t most = by_index ? kPieceIndices : kPieceEntries;
    for (int64_t first = begin; first < end;) {
      const int64_t last = std::min(first / most * most + most, end);
      pieces->push_back({&variable, first, last, gradient, square, by_index});
      first = last;
    }
  }

  // Sums slices. `size`: the variable's entries.
  Rows SumRows(const Slices& slices, int64_t size) const {
    std::vector<std::pair<int64_t, int64_t>> order;
    order.reserve(slices.count);
    for (int64_t i = 0; i < slices.count && slices.width > 0; ++i) {
      if (slices.rows[i] >= 0 && slices.rows[i] < size / slices.width) order.push_back({slices.rows[i], i});
    }
    std::sort(order.begin(), order.end());
    const int64_t count = static_cast<int64_t>(order.size());
    Rows rows;
    std::vector<int64_t> first;  // in `order`, of each row
    for (int64_t i = 0; i < count; ++i) {
      if (i > 0 && order[i].first == order[i - 1].first) continue;
      rows.names.push_back(order[i].first);
      first.push_back(i);
    }
    const int64_t bytes = slices.width * width();
    const int64_t named = static_cast<int64_t>(first.size());
    first.push_back(count);
    rows.sums.resize(named * bytes);
    rows.squares.resize(named * bytes);
    const auto add = kernels().add_row;
    const char* const values = static_cast<const char*>(slices.values);
    parallel_for_(named, slices.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t i = first[row]; i < first[row + 1]; ++i) {
          add(type_, rows.sums.data() + row * bytes, rows.squares.data() + row * bytes,
              values + order[i].second * bytes, Scale(), slices.width);
        }
      }
    });
    return rows;
  }

  // Keras's SGD multiplies slices by the learning rate before it sums them.
  const void* Scale() const { return rule_ == UpdateRule::kSgd ? scalars_ + kRate * width() : One(); }
  const FusedStep& StepOf(const FusedVariable& variable) const {
    return rule_ == UpdateRule::kSgd && variable.slices != nullptr ? step_of_scaled_ : step_;
  }

  const void* One() const {
    static const uint16_t half = 0x3c00, bfloat16 = 0x3f80;
    static const float single = 1.0f;
    static const double wide = 1.0;
    const void* const ones[] = {&half, &bfloat16, &single, &wide};
    return ones[static_cast<int>(type_)];
  }

  void AddRows(const FusedVariable& variable, const Rows& rows, std::vector<Piece>* pieces) const {
    const int64_t row_width = variable.slices->width;
    int64_t done = 0;
    for (size_t i = 0; i < rows.names.size(); ++i) {
      const int64_t begin = rows.names[i] * row_width;
      Split(variable, done, begin, nullptr, nullptr, false, pieces);
      done = begin + row_width;
      // Pointers as if the whole gradient were there.
      const int64_t shift = (static_cast<int64_t>(i) * row_width - begin) * width();
      Split(variable, begin, done, rows.sums.data() + shift, rows.squares.data() + shift, false, pieces);
    }
    Split(variable, done, entries(variable.tensor.mask.layout), nullptr, nullptr, false, pieces);
  }

  bool Run(const Piece& piece) const {
    FusedTensor tensor = piece.variable->tensor;
    tensor.gradient = piece.gradient;
    tensor.square = piece.square;
    const KernelTable& table = kernels();
    const FusedStep& step = StepOf(*piece.variable);
    if (piece.variable->offsets == nullptr) {
      table.update_full(rule_, type_, step, tensor, piece.begin, piece.end);
      return true;
    }
    if (piece.by_index) {
      const TrainableIndices& indices = piece.variable->indices;
      return table.update_by_index(rule_, type_, step, tensor, indices.data, indices.wide, piece.begin, piece.end);
    }
    table.update_compact(rule_, type_, step, tensor, piece.begin, piece.end, RankOfEntry(*piece.variable, piece.begin));
    return true;
  }

  static int64_t RankOfEntry(const FusedVariable& variable, int64_t entry) {
    const MaskView& mask = variable.tensor.mask;
    const int64_t inner = mask.layout.inner;
    const int64_t bit = entry / inner;
    const int64_t before = RankOf(mask.bits, variable.offsets, bit) * inner;
    const int64_t within = entry - bit * inner;
    return within > 0 && bit_is_set(mask.bits, bit) ? before + within : before;
  }

  UpdateRule rule_;
  Float type_;
  int64_t threads_;
  ParallelForFunction parallel_for_;
  alignas(8) char scalars_[kMostScalars * 8] = {};
  alignas(8) char scalars_of_scaled_[kMostScalars * 8] = {};
  FusedStep step_;
  FusedStep step_of_scaled_;
};

}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_PARALLEL_FUSED_H_
