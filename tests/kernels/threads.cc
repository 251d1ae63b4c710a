// What threads share in the CPU kernels, for ThreadSanitizer (`make sanitize-cpu`): gathers, scatters and fused updates
// of variables that are divided among threads; waiting bits, of which two threads may have some of one byte; and the
// sums of a sampled matrix product, of which those of two blocks lie side by side.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/cpu/parallel_compact.h"
#include "kernels/cpu/parallel_fused.h"
#include "kernels/cpu/sampled_matmul.h"

namespace {

using namespace freezeops;

constexpr int64_t kThreads = 4;

// Each part on a thread of its own, all at once.
void InThreads(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& work) {
  const int64_t parts = std::min(count, kThreads);
  std::atomic<int64_t> ready(0);
  std::vector<std::thread> threads;
  threads.reserve(parts);
  for (int64_t i = 0; i < parts; ++i) {
    threads.emplace_back([&, i] {
      for (++ready; ready < parts;) std::this_thread::yield();
      work(i * count / parts, (i + 1) * count / parts);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A mask with its ranks and indices. Bit k is 1 where `trainable(k)` says so.
struct Mask {
  Mask(MaskLayout layout, const std::function<bool(int64_t)>& trainable)
      : layout(layout), bits(mask_bytes(layout.kept)), offsets{0} {
    for (int64_t k = 0; k < layout.kept; ++k) {
      if (trainable(k)) {
        bits[k / 8] |= static_cast<uint8_t>(1u << k % 8);
        indices.push_back(static_cast<int32_t>(k));
      }
      if ((k + 1) % kRankBlockBits == 0 || k + 1 == layout.kept) offsets.push_back(capacity());
    }
  }

  int64_t capacity() const { return static_cast<int64_t>(indices.size()); }
  MaskView view() const { return {bits.data(), layout}; }

  MaskLayout layout;
  std::vector<uint8_t> bits;
  std::vector<int64_t> offsets;
  std::vector<int32_t> indices;
};

int64_t MoveInThreads(const Mask& mask) {
  const int64_t size = entries(mask.layout), compact_size = mask.capacity() * mask.layout.inner;
  std::vector<float> first(size), second(size), compact(compact_size), other(compact_size);
  for (int64_t i = 0; i < size; ++i) second[i] = -(first[i] = static_cast<float>(i));
  const std::vector<float> before = first;
  const cpu::ParallelCompact shards(mask.view(), mask.offsets.data(), {mask.indices.data(), false}, mask.capacity(),
                                    kThreads, InThreads);
  int64_t wrong = !shards.Gather({compact.data()}, {first.data()}, 4);
  wrong += !shards.Gather({compact.data(), other.data()}, {first.data(), second.data()}, 4);
  for (float& value : first) value = 0.5f;
  wrong += !shards.Scatter(first.data(), compact.data(), 4);
  for (int64_t i = 0; i < size; ++i) {
    wrong += first[i] != (bit_is_set(mask.bits.data(), bit_of_entry(mask.layout, i)) ? before[i] : 0.5f);
  }
  return wrong;
}

// One of the variables is compact or they all are in full state; with slices, some rows are named.
int64_t UpdateInThreads(const Mask& mask, bool compact, bool sparse) {
  const NamedRule* rule = kNamedRules;
  while (rule->rule != UpdateRule::kAdagrad) ++rule;
  const int64_t size = entries(mask.layout), width = mask.layout.inner == 1 ? 64 : mask.layout.inner;
  const int64_t slot_size = compact ? mask.capacity() * mask.layout.inner : size;
  const float scalars[] = {0.1f, 0.0f, 0.0f, 1e-7f};
  std::vector<float> variable(size, 1.0f), gradient(size, 0.5f), slot(slot_size);
  std::vector<uint8_t> unseeded(mask_bytes(slot_size), 0xff);
  const std::vector<int64_t> rows = {0, 3, 3, size / width - 1};
  const cpu::Slices slices{gradient.data(), rows.data(), static_cast<int64_t>(rows.size()), width};
  cpu::FusedVariable each = {};
  each.tensor.variable = variable.data();
  each.tensor.gradient = sparse ? nullptr : gradient.data();
  each.slices = sparse ? &slices : nullptr;
  each.tensor.slots[0] = slot.data();
  each.tensor.mask = mask.view();
  each.tensor.unseeded = unseeded.data();
  each.tensor.unseeded_bytes = mask_bytes(slot_size);
  if (compact) {
    each.offsets = mask.offsets.data();
    each.indices = {mask.indices.data(), false};
    each.capacity = mask.capacity();
  }
  cpu::ParallelFused parallel(*rule, Float::kFloat32, scalars, cpu::Seeds{1, {0}, {2}, {1.0}}, kThreads, InThreads);
  int64_t wrong = !parallel.Update({each});
  for (int64_t i = 0; i < size; ++i) {
    const bool trainable = bit_is_set(mask.bits.data(), bit_of_entry(mask.layout, i));
    const int64_t row = i / width;
    const bool has_gradient = !sparse || row == 0 || row == 3 || row == size / width - 1;
    wrong += (variable[i] != 1.0f) != (trainable && has_gradient);
  }
  for (int64_t i = 0; i < slot_size && !sparse; ++i) {
    const bool waits = bit_is_set(unseeded.data(), i);
    wrong += waits != (!compact && !bit_is_set(mask.bits.data(), bit_of_entry(mask.layout, i)));
  }
  return wrong;
}

constexpr int32_t kRows = 200, kColumns = 150;

// The plan of a mask in which an entry is trainable unless its row and its column are odd: of two counts in each block.
std::vector<int32_t> MakePlan() {
  constexpr int32_t kPanel = 15, kChunk = 32;
  constexpr int32_t kPanels = kColumns / kPanel, kChunks = (kRows + kChunk - 1) / kChunk;
  std::vector<int32_t> starts, groups, rows, ranks;
  std::vector<uint16_t> in_panel;
  const auto start = [&] {
    for (const size_t size : {groups.size() / 2, rows.size(), in_panel.size()}) {
      starts.push_back(static_cast<int32_t>(size));
    }
  };
  for (int32_t block = 0; block < kChunks * kPanels; ++block) {
    start();
    const int32_t first_row = block / kPanels * kChunk, first_column = block % kPanels * kPanel;
    for (const int32_t odd : {1, 0}) {
      const int32_t first = first_column + odd * (first_column % 2), step = 1 + odd;
      const int32_t end_row = std::min(first_row + kChunk, kRows);
      groups.push_back((first_column + kPanel - first + step - 1) / step);
      groups.push_back((end_row - first_row) / 2);
      for (int32_t row = first_row + odd; row < end_row; row += 2) {
        rows.push_back(row);
        const int32_t before = (row + 1) / 2 * kColumns + row / 2 * (kColumns / 2);
        ranks.push_back(before + (odd == 0 ? first : first / 2));
        for (int32_t column = first; column < first_column + kPanel; column += step) {
          in_panel.push_back(static_cast<uint16_t>(column - first_column));
        }
      }
    }
  }
  start();
  std::vector<int32_t> plan = {128, kPanel, kChunk, kRows, kColumns};
  for (const size_t size : {in_panel.size(), rows.size(), groups.size() / 2}) {
    plan.push_back(static_cast<int32_t>(size));
  }
  for (const auto* part : {&starts, &groups, &rows, &ranks}) plan.insert(plan.end(), part->begin(), part->end());
  const size_t before_columns = plan.size();
  plan.resize(before_columns + (in_panel.size() + 1) / 2);
  std::memcpy(plan.data() + before_columns, in_panel.data(), 2 * in_panel.size());
  return plan;
}

// By a plan of MakePlan; of whole numbers, whose products and sums are exact.
int64_t MultiplyInThreads(const std::vector<int32_t>& plan) {
  constexpr int32_t kTokens = 300;
  std::vector<float> x(kTokens * kRows), dy(kTokens * kColumns), result(plan[5]), scratch;
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7 % 11) - 5;
  for (size_t i = 0; i < dy.size(); ++i) dy[i] = static_cast<float>(i * 5 % 13) - 6;
  cpu::SampledMatmul product(Float::kFloat32, x.data(), dy.data(), kTokens, kRows, kColumns, kThreads, InThreads,
                             [&](int64_t floats) {
                               scratch.resize(floats);
                               return scratch.data();
                             });
  int64_t wrong =
      product.Run(plan.data(), static_cast<int64_t>(plan.size()), result.data(), plan[5]) != cpu::SampledResult::kDone;
  size_t rank = 0;
  for (int32_t row = 0; row < kRows; ++row) {
    for (int32_t column = 0; column < kColumns; ++column) {
      if (row % 2 == 1 && column % 2 == 1) continue;
      float sum = 0;
      for (int32_t t = 0; t < kTokens; ++t) sum += x[t * kRows + row] * dy[t * kColumns + column];
      wrong += result[rank++] != sum;
    }
  }
  return wrong;
}

}  // namespace

int main() {
  constexpr int64_t kPiece = 32768;  // entries that a thread takes at once in a fused update
  int64_t wrong = 0;
  // Nearly all trainable, half, few enough to go by index; pieces whose ranks are no multiples of 8. Rows.
  const Mask masks[] = {
      Mask({1, 4 * kPiece, 1}, [](int64_t k) { return k % 8 != 1 || k % kPiece < 3; }),
      Mask({1, 4 * kPiece, 1}, [](int64_t k) { return (k * 2654435761u >> 7) % 2 == 0; }),
      Mask({1, 8 * kPiece, 1}, [](int64_t k) { return k % 61 == 5; }),
      Mask({1, 1500, 100}, [](int64_t k) { return k % 3 != 1; }),
  };
  for (const Mask& mask : masks) {
    for (int step = 0; step < 3; ++step) {
      wrong += MoveInThreads(mask);
      for (const bool compact : {false, true}) {
        wrong += UpdateInThreads(mask, compact, false);
        wrong += UpdateInThreads(mask, compact, true);
      }
    }
  }
  for (int step = 0; step < 30; ++step) wrong += UpdateInThreads(masks[0], true, false);
  const std::vector<int32_t> plan = MakePlan();
  for (int step = 0; step < 10; ++step) wrong += MultiplyInThreads(plan);
  std::printf("%s: %lld wrong\n", cpu::kernels().isa, static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
