// The update rules of optimizers: Keras's arithmetic on one entry, operation by operation, in the order of its
// roundings.
//
// Written once for every kind of value: vectors of a processor, single values on a GPU, XLA's expressions. V has
// + - * / and the functions square_root, maximum and sign_of, which all return NaN for NaN. Read in Keras 3.15.1,
// keras/src/optimizers/*.py.
//
// Files that include this are compiled without contraction (a * b + c in one rounding).

#ifndef FREEZEOPS_KERNELS_COMMON_UPDATE_RULES_H_
#define FREEZEOPS_KERNELS_COMMON_UPDATE_RULES_H_

#include <stdint.h>

#include <type_traits>

#include "kernels/common/dtypes.h"
#include "mask_layout.h"

namespace freezeops {

enum class UpdateRule { kSgd, kAdam, kNadam, kRmsprop, kAdagrad, kLion };
constexpr int kUpdateRules = 6;

// Calls work(std::integral_constant<UpdateRule, ...>), see with_float.
template <typename Work>
static inline auto with_rule(UpdateRule rule, const Work& work) {
  static_assert(kUpdateRules == 6 && static_cast<int>(UpdateRule::kLion) == kUpdateRules - 1,
                "add a case for each rule");
  switch (rule) {
    case UpdateRule::kSgd:
      return work(std::integral_constant<UpdateRule, UpdateRule::kSgd>());
    case UpdateRule::kAdam:
      return work(std::integral_constant<UpdateRule, UpdateRule::kAdam>());
    case UpdateRule::kNadam:
      return work(std::integral_constant<UpdateRule, UpdateRule::kNadam>());
    case UpdateRule::kRmsprop:
      return work(std::integral_constant<UpdateRule, UpdateRule::kRmsprop>());
    case UpdateRule::kAdagrad:
      return work(std::integral_constant<UpdateRule, UpdateRule::kAdagrad>());
    default:
      return work(std::integral_constant<UpdateRule, UpdateRule::kLion>());
  }
}

// Options of an optimizer that change its rule.
struct RuleFlags {
  bool momentum;  // SGD, RMSprop
  bool nesterov;  // SGD
  bool amsgrad;   // Adam
  bool centered;  // RMSprop
};

constexpr int kMostSlots = 3;

// Positions in a step's vector of scalars. All rules have the first three.
enum Scalar {
  kRate,        // factor of the update: the learning rate; for Adam with its bias corrections
  kDecay,       // the weight decay
  kDecayRate,   // the learning rate, factor of the weight decay
  kFirstOther,  // the first of the rule's own scalars, see its function
};
constexpr int kMostScalars = kFirstOther + 8;

// A rule with its options.
struct NamedRule {
  const char* name;  // the op's attribute `rule`
  UpdateRule rule;
  RuleFlags flags;
  int scalars;  // the first three among them
  int slots;
  int slot_positions[kMostSlots];  // of each slot among those that the rule's function takes
};

inline constexpr NamedRule kNamedRules[] = {
    {"sgd", UpdateRule::kSgd, {false, false, false, false}, kFirstOther, 0, {}},
    {"sgd_momentum", UpdateRule::kSgd, {true, false, false, false}, kFirstOther + 1, 1, {0}},
    {"sgd_nesterov", UpdateRule::kSgd, {true, true, false, false}, kFirstOther + 1, 1, {0}},
    {"adam", UpdateRule::kAdam, {false, false, false, false}, kFirstOther + 3, 2, {0, 1}},
    {"adam_amsgrad", UpdateRule::kAdam, {false, false, true, false}, kFirstOther + 3, 3, {0, 1, 2}},
    {"nadam", UpdateRule::kNadam, {false, false, false, false}, kFirstOther + 8, 2, {0, 1}},
    {"rmsprop", UpdateRule::kRmsprop, {false, false, false, false}, kFirstOther + 3, 1, {0}},
    {"rmsprop_momentum", UpdateRule::kRmsprop, {true, false, false, false}, kFirstOther + 4, 2, {0, 1}},
    {"rmsprop_centered", UpdateRule::kRmsprop, {false, false, false, true}, kFirstOther + 3, 2, {0, 2}},
    {"rmsprop_momentum_centered", UpdateRule::kRmsprop, {true, false, false, true}, kFirstOther + 4, 3, {0, 1, 2}},
    {"adagrad", UpdateRule::kAdagrad, {false, false, false, false}, kFirstOther + 1, 1, {0}},
    {"lion", UpdateRule::kLion, {false, false, false, false}, kFirstOther + 4, 1, {0}},
};

// w: the variable. g: the gradient. square: the square of the gradient (for repeated rows the sum of their squares).
// s: the slots. c: the scalars.

template <typename V>
FREEZEOPS_INLINE void decay_weight(const V* c, V& w) {
  w = w - w * c[kDecay] * c[kDecayRate];
}

// Slots: velocity. Scalars: momentum.
template <typename V>
FREEZEOPS_INLINE void update_sgd(RuleFlags flags, const V* c, V& w, V g, V* s) {
  const V step = g * c[kRate];
  if (!flags.momentum) {
    w = w - step;
    return;
  }
  const V momentum = c[kFirstOther];
  s[0] = s[0] * momentum - step;
  w = w + (flags.nesterov ? s[0] * momentum - step : s[0]);
}

// Slots: first and second moment; with AMSGrad the largest second moment. Scalars: 1 - beta_1, 1 - beta_2, epsilon.
template <typename V>
FREEZEOPS_INLINE void update_adam(RuleFlags flags, const V* c, V& w, V g, V square, V* s) {
  s[0] = s[0] + (g - s[0]) * c[kFirstOther];
  s[1] = s[1] + (square - s[1]) * c[kFirstOther + 1];
  V second = s[1];
  if (flags.amsgrad) second = s[2] = maximum(s[2], s[1]);
  w = w - s[0] * c[kRate] / (square_root(second) + c[kFirstOther + 2]);
}

// Slots: first and second moment. Scalars: 1 - beta_1, 1 - beta_2, epsilon; u_{t+1}, 1 - u_1 ... u_{t+1}, 1 - u_t,
// 1 - u_1 ... u_t, 1 - beta_2^t.
template <typename V>
FREEZEOPS_INLINE void update_nadam(const V* c, V& w, V g, V square, V* s) {
  s[0] = s[0] + (g - s[0]) * c[kFirstOther];
  s[1] = s[1] + (square - s[1]) * c[kFirstOther + 1];
  const V* const t = c + kFirstOther + 3;
  const V mean = t[0] * s[0] / t[1] + t[2] * g / t[3];
  w = w - mean * c[kRate] / (square_root(s[1] / t[4]) + c[kFirstOther + 2]);
}

// Slots: mean square; momentum, where there is any; mean, where it is centered. Scalars: rho, 1 - rho, epsilon,
// momentum.
template <typename V>
FREEZEOPS_INLINE void update_rmsprop(RuleFlags flags, const V* c, V& w, V g, V square, V* s) {
  const V rho = c[kFirstOther], rest = c[kFirstOther + 1], epsilon = c[kFirstOther + 2];
  s[0] = rho * s[0] + rest * square;
  V denominator = s[0];
  if (flags.centered) {
    s[2] = rho * s[2] + rest * g;
    denominator = denominator - s[2] * s[2];
  }
  const V increment = c[kRate] * g / square_root(denominator + epsilon);
  if (flags.momentum) {
    s[1] = c[kFirstOther + 3] * s[1] + increment;
    w = w - s[1];
  } else {
    w = w - increment;
  }
}

// Slots: sum of squares. Scalars: epsilon.
template <typename V>
FREEZEOPS_INLINE void update_adagrad(const V* c, V& w, V g, V square, V* s) {
  s[0] = s[0] + square;
  w = w - c[kRate] * g / square_root(s[0] + c[kFirstOther]);
}

// Slots: momentum. Scalars: beta_1, 1 - beta_1, beta_2, 1 - beta_2.
template <typename V>
FREEZEOPS_INLINE void update_lion(const V* c, V& w, V g, V* s) {
  const V* const b = c + kFirstOther;
  w = w - c[kRate] * sign_of(s[0] * b[0] + g * b[1]);
  s[0] = s[0] * b[2] + g * b[3];
}

// Updates one entry. `decays`: whether weight decay is applied first.
template <UpdateRule kRule, typename V>
FREEZEOPS_INLINE void update_entry(RuleFlags flags, bool decays, const V* c, V& w, V g, V square, V* s) {
  if (decays) decay_weight(c, w);
  if constexpr (kRule == UpdateRule::kSgd) update_sgd(flags, c, w, g, s);
  if constexpr (kRule == UpdateRule::kAdam) update_adam(flags, c, w, g, square, s);
  if constexpr (kRule == UpdateRule::kNadam) update_nadam(c, w, g, square, s);
  if constexpr (kRule == UpdateRule::kRmsprop) update_rmsprop(flags, c, w, g, square, s);
  if constexpr (kRule == UpdateRule::kAdagrad) update_adagrad(c, w, g, square, s);
  if constexpr (kRule == UpdateRule::kLion) update_lion(c, w, g, s);
}

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_UPDATE_RULES_H_
