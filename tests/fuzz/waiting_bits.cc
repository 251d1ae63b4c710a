// Two threads update neighbouring slots of compact state whose waiting bits share bytes: for ThreadSanitizer, see
// tests/test_build.py.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/cpu/parallel_fused.h"

namespace {

// Each part on a thread of its own, all at once.
void InThreads(int64_t count, int64_t, const std::function<void(int64_t, int64_t)>& work) {
  std::atomic<int64_t> ready(0);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      for (++ready; ready < count;) std::this_thread::yield();
      work(i, i + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  using namespace freezeops;
  constexpr int64_t kSize = 4 * 32768;  // pieces of a step, each with a rank that is no multiple of 8
  std::vector<uint8_t> mask(mask_bytes(kSize), 0xfd);
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> indices;
  for (int64_t i = 0; i < kSize; ++i) {
    if (i % 32768 < 3) mask[i / 8] = 0xff;
    if (bit_is_set(mask.data(), i)) indices.push_back(static_cast<int32_t>(i));
    if ((i + 1) % kRankBlockBits == 0) offsets.push_back(static_cast<int64_t>(indices.size()));
  }
  const int64_t capacity = static_cast<int64_t>(indices.size());
  std::vector<float> variable(kSize, 1.0f), gradient(kSize, 0.5f), slot(capacity);
  std::vector<uint8_t> unseeded(mask_bytes(capacity));
  const NamedRule* rule = kNamedRules;
  while (rule->rule != Rule::kAdagrad) ++rule;
  const float scalars[] = {0.1f, 0.0f, 0.0f, 1e-7f};
  FusedVariable each = {};
  each.tensor.variable = variable.data();
  each.tensor.gradient = gradient.data();
  each.tensor.slots[0] = slot.data();
  each.tensor.mask = {mask.data(), {1, kSize, 1}};
  each.tensor.unseeded = unseeded.data();
  each.tensor.unseeded_bytes = mask_bytes(capacity);
  each.offsets = offsets.data();
  each.indices = {indices.data(), false};
  each.capacity = capacity;
  int64_t wrong = 0;
  for (int step = 0; step < 50; ++step) {
    slot.assign(capacity, 0.0f);
    unseeded.assign(mask_bytes(capacity), 0xff);
    FusedParts parts(*rule, kFloat32, scalars, Seeds{1, {0}, {2}, {1.0}}, 4, InThreads);
    wrong += !parts.Update({each});
    for (int64_t i = 0; i < capacity; ++i) wrong += bit_is_set(unseeded.data(), i);
  }
  std::printf("%lld wrong\n", static_cast<long long>(wrong));
  return wrong == 0 ? 0 : 1;
}
