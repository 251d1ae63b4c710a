// Fused updates in full state: slots are as large as the variable.

#ifndef FREEZEOPS_KERNELS_CPU_FUSED_FULL_H_
#define FREEZEOPS_KERNELS_CPU_FUSED_FULL_H_

#include <stdint.h>

#include "kernels/cpu/fused_kernels.h"

namespace freezeops {
namespace cpu {
namespace {

template <typename Isa, UpdateRule kRule, Float kType>
struct FullVisitor final : AnyVisitor {
  using Of = Updates<Isa, kRule, kType>;
  const Of& updates;
  int64_t begin;
  FewEntries waiting;

  FullVisitor(const Of& updates, int64_t begin) : updates(updates), begin(begin) {}

  void run(int64_t position, int64_t length) override {
    const int64_t at = begin + position;
    const auto g = Of::from(updates.gradient(), at);
    const auto square = Of::from(updates.square(), at);
    if (updates.seeds()) updates.seed_run(at, length, g, square);
    updates.update_run(updates.variable() + at, g, square, at, length);
  }
  void word(int64_t position, uint64_t selected) override {
    const int64_t at = begin + position;
    if (updates.seeds()) updates.seed(at, selected, Of::from(updates.gradient(), at), Of::from(updates.square(), at));
    updates.update_word(at, selected);
  }
  void tail(int64_t position, uint64_t selected, int64_t) override {
    FewEntries last;
    add_bits(&last, 0, selected);
    last.position = position;
    finish(last);
  }
  void few(int64_t position, const uint64_t* block, int count) override {
    FewEntries next;
    collect_block<true>(&next, updates, begin, position, block, count);
    finish(waiting);
    waiting = next;
  }
  void finish(const FewEntries& few) {
    const int64_t base = begin + few.position;
    for (int i = 0; i < few.count && updates.seeds(); ++i) {
      const int64_t at = base + few.entries[i];
      updates.seed(at, 1, Of::from(updates.gradient(), at), Of::from(updates.square(), at));
    }
    updates.update_scattered(base, few.entries, few.count);
  }
};

template <typename Isa, UpdateRule kRule, Float kType>
__attribute__((noinline)) void update_full_of(const FusedStep& step, const FusedTensor& tensor, int64_t begin,
                                              int64_t end) {
  const Updates<Isa, kRule, kType> updates(step, tensor);
  FullVisitor<Isa, kRule, kType> visitor(updates, begin);
  walk_trainable(tensor.mask, begin, end, visitor);
  visitor.finish(visitor.waiting);
}

template <typename Isa>
void update_full(UpdateRule rule, Float type, const FusedStep& step, const FusedTensor& tensor, int64_t begin,
                 int64_t end) {
  with_rule(rule, [&](auto kind) {
    with_float(type, [&](auto dtype) {
      update_full_of<Isa, decltype(kind)::value, decltype(dtype)::value>(step, tensor, begin, end);
    });
  });
}

}  // namespace
}  // namespace cpu
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CPU_FUSED_FULL_H_
