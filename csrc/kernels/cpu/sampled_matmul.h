// The sampled matrix product in parallel: the trainable entries of x^T dy, by a plan (visits.h).
//
// A block of tokens of x and dy is transposed to float32; then each trainable entry is the product of two contiguous
// rows. Sums lie in the order of visits, and go to that of ranks in the end. An entry's terms are always added in the
// same order, so that the bits do not depend on the number of threads.
//
// Not for files that are compiled for different instruction sets: it uses the standard library.

#ifndef FREEZEOPS_KERNELS_CPU_SAMPLED_MATMUL_H_
#define FREEZEOPS_KERNELS_CPU_SAMPLED_MATMUL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/common/dtypes.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel_compact.h"
#include "kernels/cpu/visits.h"

namespace freezeops {
namespace cpu {

// Sets `visits` to the parts of a plan. Returns whether they are in the vector, and the plan is for matrices of that
// shape and no more entries than the capacity.
inline bool ReadVisits(const int32_t* plan, int64_t size, int64_t rows, int64_t columns, int64_t capacity,
                       Visits* visits) {
  if (size < kVisitsHead) return false;
  Visits& found = *visits;
  found = {plan[0], plan[1], plan[2], plan[3], plan[4], plan[5], plan[6], plan[7],
           0,       0,       nullptr, nullptr, nullptr, nullptr, nullptr};
  const bool known_tokens = found.tokens == 16 || found.tokens == 32 || found.tokens == 64 || found.tokens == 128 ||
                            found.tokens == kMostTokens;
  if (!known_tokens || found.panel < 1 || found.panel > 65536 || found.chunk < 1) return false;
  if (found.rows != rows || found.columns != columns) return false;
  if (found.entries < 0 || found.entries > capacity) return false;
  if (found.visits < 0 || found.visits > found.entries || found.groups < 0 || found.groups > found.visits) return false;
  found.panels = (columns + found.panel - 1) / found.panel;
  found.chunks = (rows + found.chunk - 1) / found.chunk;
  if (found.chunks > 0 && found.panels > size / found.chunks) return false;  // so that no product overflows
  const int64_t starts = 3 * (found.blocks() + 1);
  const int64_t used = kVisitsHead + starts + 2 * found.groups + 2 * found.visits + (found.entries + 1) / 2;
  if (used > size) return false;
  const int32_t* part = plan + kVisitsHead;
  found.starts = reinterpret_cast<const BlockStart*>(part);
  part += starts;
  found.group = reinterpret_cast<const VisitGroup*>(part);
  part += 2 * found.groups;
  found.row = part;
  part += found.visits;
  found.rank = part;
  part += found.visits;
  found.in_panel = reinterpret_cast<const uint16_t*>(part);
  const BlockStart first = found.starts[0], end = found.starts[found.blocks()];
  return first.group == 0 && first.visit == 0 && first.entry == 0 && end.group == found.groups &&
         end.visit == found.visits && end.entry == found.entries;
}

// Returns whether a chunk of a plan is possible, but for its columns: each entry of its rows has a rank of its own, and
// by what it says no other is written. All that is known of the plan is that its parts are in the vector.
inline bool ChunkIsPossible(const Visits& visits, int64_t chunk) {
  const int64_t first_row = chunk * visits.chunk, rows = visits.rows_of(chunk);
  struct Ranks {
    int64_t begin = -1, end = -1;
  };
  std::vector<Ranks> of_row(rows);
  for (int64_t block = chunk * visits.panels; block < (chunk + 1) * visits.panels; ++block) {
    const BlockStart start = visits.starts[block], end = visits.starts[block + 1];
    if (start.group < 0 || start.group > end.group || end.group > visits.groups) return false;
    if (start.visit < 0 || start.visit > end.visit || end.visit > visits.visits) return false;
    if (start.entry < 0 || start.entry > end.entry || end.entry > visits.entries) return false;
    const int64_t columns = visits.columns_of(block % visits.panels);
    int64_t visit = start.visit, entry = start.entry;
    for (int32_t i = start.group; i < end.group; ++i) {
      const VisitGroup group = visits.group[i];
      if (group.count < 1 || group.count > columns) return false;
      if (group.visits < 1 || group.visits > end.visit - visit) return false;
      for (const int64_t last = visit + group.visits; visit < last; ++visit) {
        const int64_t row = visits.row[visit] - first_row, rank = visits.rank[visit];
        if (row < 0 || row >= rows || (of_row[row].end >= 0 && rank != of_row[row].end)) return false;
        if (of_row[row].end < 0) of_row[row].begin = rank;
        of_row[row].end = rank + group.count;
      }
      entry += int64_t{group.visits} * group.count;
    }
    if (visit != end.visit || entry != end.entry) return false;
  }
  // Ranks go on from row to row, and from chunk to chunk.
  int64_t rank = visits.starts[chunk * visits.panels].entry;
  for (const Ranks& ranks : of_row) {
    if (ranks.end < 0) continue;
    if (ranks.begin != rank) return false;
    rank = ranks.end;
  }
  return rank == visits.starts[(chunk + 1) * visits.panels].entry;
}

inline constexpr char kVisitsMessage[] =
    "visits must be those of a mask of as many rows and columns as x and dy have, and of no more trainable entries "
    "than there are indices.";

enum class SampledResult { kDone, kNotThePlan, kNoMemory };

// Units of work in phases, shared out among threads: a unit begins when all of the phases before are done.
//
// Threads stay for all phases and wait for each other by looking at a counter. Phases are many and short; to end each
// and to begin the next by way of the pool took a fifth of the time. Whoever waits does so for units that others work
// on already, so that any number of threads gets to the end.
class Phases {
 public:
  // Runs each unit of the phase until none is left. All threads run the same phases.
  template <typename Work>
  void Run(int64_t units, const Work& work) {
    const int64_t begin = end_of_phases_;
    end_of_phases_ += units;
    while (next_ < end_of_phases_) {
      if (shared_->done.load(std::memory_order_acquire) < begin) Wait(begin);
      work(next_ - begin);
      shared_->done.fetch_add(1, std::memory_order_acq_rel);
      next_ = shared_->next.fetch_add(1, std::memory_order_relaxed);
    }
  }

  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };

  // For one thread.
  explicit Phases(Shared* shared) : shared_(shared), next_(shared->next.fetch_add(1, std::memory_order_relaxed)) {}

 private:
  void Wait(int64_t units) const {
    // Soon, if no other process has taken the core of who works on them.
    constexpr int kPatience = 2000;
    for (int i = 0; shared_->done.load(std::memory_order_acquire) < units; ++i) {
      if (i > kPatience) std::this_thread::yield();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  Shared* shared_;
  int64_t next_;               // the unit that is this thread's next
  int64_t end_of_phases_ = 0;  // of those that were run
};

// Returns room for so many floats until the product is made, best at a multiple of 64 bytes; null where there is none.
using ScratchFunction = std::function<float*(int64_t)>;

// Returns the most floats for which a call asks.
inline int64_t MostScratch(int64_t tokens, int64_t rows, int64_t columns, int64_t capacity) {
  return std::min(std::max<int64_t>(2 * tokens, 16), kMostTokens) * (rows + columns) + capacity;
}

// x^T dy where a mask is trainable. All pointers are to whole tensors: x [tokens, rows] and dy [tokens, columns] of
// `type`, which is not float64; the plan; entries [capacity] of `type` for the result.
class SampledMatmul {
 public:
  SampledMatmul(Float type, const void* x, const void* dy, int64_t tokens, int64_t rows, int64_t columns,
                int64_t threads, ParallelForFunction parallel_for, ScratchFunction scratch)
      : type_(type),
        x_{x, rows},
        dy_{dy, columns},
        tokens_(tokens),
        threads_(threads),
        parallel_for_(std::move(parallel_for)),
        scratch_(std::move(scratch)) {}

  SampledResult Run(const int32_t* plan, int64_t size, void* result, int64_t capacity) {
    if (!ReadVisits(plan, size, x_.columns, dy_.columns, capacity, &visits_) || !EachChunkIsPossible()) {
      return SampledResult::kNotThePlan;
    }
    const int64_t written = tokens_ == 0 ? 0 : visits_.entries;
    const int64_t width = width_of(type_);
    if (written < capacity) std::memset(static_cast<char*>(result) + written * width, 0, (capacity - written) * width);
    if (written == 0) return SampledResult::kDone;

    const int64_t cycles = Cycles();
    const int64_t threads = std::min(threads_, cycles / kLeastCycles + 1);
    const int64_t most = Padded(std::min(tokens_, visits_.tokens));
    x_.transposed = scratch_(most * (x_.columns + dy_.columns) + visits_.entries);
    if (x_.transposed == nullptr) return SampledResult::kNoMemory;
    dy_.transposed = x_.transposed + most * x_.columns;
    sums_ = dy_.transposed + most * dy_.columns;
    result_ = result;

    Phases::Shared shared;
    parallel_for_(threads, cycles / threads, [&](int64_t first, int64_t last) {
      for (; first < last; ++first) RunThread(&shared);
    });
    return possible_ ? SampledResult::kDone : SampledResult::kNotThePlan;
  }

 private:
  struct Operand {
    const void* data;
    int64_t columns;
    float* transposed = nullptr;
  };
  static constexpr int64_t kPiece = 256;  // columns that are transposed together
  static constexpr int64_t kRunsOfThread = 16;
  static constexpr int64_t kLeastCycles = 100000;  // for a thread

  // The number of tokens that a block is filled up to with zeros.
  static int64_t Padded(int64_t tokens) {
    int64_t padded = 16;
    while (padded < tokens) padded *= 2;
    return padded;
  }

  // About as many as all takes.
  int64_t Cycles() const {
    const double of_token = static_cast<double>(x_.columns + dy_.columns) + static_cast<double>(visits_.entries) / 16;
    return static_cast<int64_t>(std::min(of_token * static_cast<double>(tokens_), 1e15));
  }

  bool EachChunkIsPossible() {
    const int64_t chunks = visits_.chunks;
    const int64_t cycles = 100 + 4 * (visits_.rows + visits_.visits) / std::max<int64_t>(chunks, 1);
    parallel_for_(chunks, cycles, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        if (!ChunkIsPossible(visits_, chunk)) possible_ = false;
      }
    });
    return possible_;
  }

  int64_t EntriesOf(int64_t block) const { return visits_.starts[block + 1].entry - visits_.starts[block].entry; }

  // The work of one thread: in turn with the others, for each block of tokens, transposing and multiplying.
  void RunThread(Phases::Shared* shared) {
    Phases phases(shared);
    const int64_t blocks = visits_.blocks();
    // Runs of blocks, many enough for threads to end together.
    const int64_t runs = std::min(blocks, kRunsOfThread * threads_);
    for (int64_t first = 0; first < tokens_; first += visits_.tokens) {
      phases.Run(Pieces(x_) + Pieces(dy_), [&](int64_t piece) { Transpose(piece, first); });
      phases.Run(runs, [&](int64_t run) {
        for (int64_t block = run * blocks / runs; block < (run + 1) * blocks / runs; ++block) {
          if (EntriesOf(block) > 0) AddProducts(block, first);
        }
      });
    }
  }

  // Tokens of the block that begins with token `first`.
  int64_t TokensFrom(int64_t first) const { return std::min(visits_.tokens, tokens_ - first); }

  static int64_t Pieces(const Operand& operand) { return (operand.columns + kPiece - 1) / kPiece; }

  // Transposes a piece of a block of tokens, if it has visits.
  void Transpose(int64_t piece, int64_t first) const {
    const bool of_x = piece >= Pieces(dy_);
    const Operand& operand = of_x ? x_ : dy_;
    const int64_t column = (of_x ? piece - Pieces(dy_) : piece) * kPiece;
    const int64_t columns = std::min(kPiece, operand.columns - column);
    if (of_x ? !RowsAreVisited(column, columns) : !ColumnsAreVisited(column, columns)) return;
    const int64_t count = TokensFrom(first), padded = Padded(count);
    const char* const rows = static_cast<const char*>(operand.data) + first * operand.columns * width_of(type_);
    kernels().transpose(type_, operand.transposed + column * padded, padded, rows, column, operand.columns, count,
                        columns);
  }

  bool RowsAreVisited(int64_t row, int64_t count) const {
    for (int64_t chunk = row / visits_.chunk; chunk <= (row + count - 1) / visits_.chunk; ++chunk) {
      const int64_t block = chunk * visits_.panels;
      if (visits_.starts[block].entry != visits_.starts[block + visits_.panels].entry) return true;
    }
    return false;
  }

  bool ColumnsAreVisited(int64_t column, int64_t count) const {
    for (int64_t panel = column / visits_.panel; panel <= (column + count - 1) / visits_.panel; ++panel) {
      for (int64_t chunk = 0; chunk < visits_.chunks; ++chunk) {
        if (EntriesOf(chunk * visits_.panels + panel) > 0) return true;
      }
    }
    return false;
  }

  // Adds the products of a block of tokens to the sums of a block of the plan; after the last ones puts these into the
  // result. Columns are checked where they are read anyway.
  void AddProducts(int64_t block, int64_t first) {
    if (first == 0 && !kernels().columns_are_possible(visits_, block)) possible_ = false;
    if (!possible_) return;
    float* const sums = sums_ + visits_.starts[block].entry;
    if (first == 0) std::memset(sums, 0, EntriesOf(block) * sizeof(float));
    const int64_t count = TokensFrom(first);
    kernels().add_products(visits_, block, x_.transposed, dy_.transposed, Padded(count), sums);
    if (first + count < tokens_) return;
    with_float(type_, [&](auto constant) {
      using Entry = typename EntryOf<decltype(constant)::value>::Type;
      PutInOrder(block, sums, static_cast<Entry*>(result_));
    });
  }

  // Writes the sums of a block to where their ranks are.
  template <typename Entry>
  void PutInOrder(int64_t block, const float* sum, Entry* result) const {
    const BlockStart start = visits_.starts[block], end = visits_.starts[block + 1];
    const int32_t* rank = visits_.rank + start.visit;
    for (int32_t i = start.group; i < end.group; ++i) {
      const VisitGroup group = visits_.group[i];
      for (int32_t visit = 0; visit < group.visits; ++visit) {
        Entry* const to = result + *rank++;
        for (int32_t k = 0; k < group.count; ++k) to[k] = static_cast<Entry>(*sum++);
      }
    }
  }

  Float type_;
  Operand x_, dy_;
  int64_t tokens_;
  int64_t threads_;
  ParallelForFunction parallel_for_;
  ScratchFunction scratch_;
  Visits visits_ = {};
  std::atomic<bool> possible_{true};
  float* sums_ = nullptr;
  void* result_ = nullptr;
};

}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_SAMPLED_MATMUL_H_
