// What an optimizer does to an entry: Keras's arithmetic, operation by operation, in the order of its roundings.
//
// Written once for every kind of value: vectors of a processor, single values on a GPU, XLA's expressions. V has
// + - * / and the functions square_root, maximum and sign_of, which all give NaN for NaN. Read in Keras 3.15.1,
// keras/src/optimizers/*.py.
//
// Nothing here may be contracted (a * b + c in one rounding): files that include this are compiled without.

#ifndef FREEZEOPS_KERNELS_COMMON_UPDATE_RULES_H_
#define FREEZEOPS_KERNELS_COMMON_UPDATE_RULES_H_

#include <stdint.h>

#include "mask_layout.h"

namespace freezeops {

enum class Rule { kSgd, kAdam, kNadam, kRmsprop, kAdagrad, kLion };
constexpr int kRules = 6;

// Which of its options an optimizer was made with.
struct RuleFlags {
  bool momentum;  // SGD, RMSprop
  bool nesterov;  // SGD
  bool amsgrad;   // Adam
  bool centered;  // RMSprop
};

constexpr int kMostSlots = 3;

// Positions in the vector of scalars that a step is given. The first three are every rule's.
enum Scalar {
  kRate,        // what the update is multiplied by: the learning rate; for Adam with its bias corrections
  kDecay,       // of weights
  kDecayRate,   // the learning rate that the decay is multiplied by
  kFirstOther,  // and on: those of the rule, see its function
};
constexpr int kMostScalars = kFirstOther + 8;

// A rule as an op's attribute names it.
struct NamedRule {
  const char* name;
  Rule rule;
  RuleFlags flags;
  int scalars;  // in all
  int slots;
  int places[kMostSlots];  // where in `s` the rule's function takes each of them
};

inline constexpr NamedRule kNamedRules[] = {
    {"sgd", Rule::kSgd, {false, false, false, false}, kFirstOther, 0, {}},
    {"sgd_momentum", Rule::kSgd, {true, false, false, false}, kFirstOther + 1, 1, {0}},
    {"sgd_nesterov", Rule::kSgd, {true, true, false, false}, kFirstOther + 1, 1, {0}},
    {"adam", Rule::kAdam, {false, false, false, false}, kFirstOther + 3, 2, {0, 1}},
    {"adam_amsgrad", Rule::kAdam, {false, false, true, false}, kFirstOther + 3, 3, {0, 1, 2}},
    {"nadam", Rule::kNadam, {false, false, false, false}, kFirstOther + 8, 2, {0, 1}},
    {"rmsprop", Rule::kRmsprop, {false, false, false, false}, kFirstOther + 3, 1, {0}},
    {"rmsprop_momentum", Rule::kRmsprop, {true, false, false, false}, kFirstOther + 4, 2, {0, 1}},
    {"rmsprop_centered", Rule::kRmsprop, {false, false, false, true}, kFirstOther + 3, 2, {0, 2}},
    {"rmsprop_momentum_centered", Rule::kRmsprop, {true, false, false, true}, kFirstOther + 4, 3, {0, 1, 2}},
    {"adagrad", Rule::kAdagrad, {false, false, false, false}, kFirstOther + 1, 1, {0}},
    {"lion", Rule::kLion, {false, false, false, false}, kFirstOther + 4, 1, {0}},
};

#if defined(__CUDACC__)
#define FREEZEOPS_RULE static __host__ __device__ __forceinline__
#else
#define FREEZEOPS_RULE static inline __attribute__((always_inline, unused))
#endif

// w: the variable. g: the gradient. square: its square (of repeated rows the sum of their squares). s: the slots.
// c: the scalars.

template <typename V>
FREEZEOPS_RULE void decay_weight(const V* c, V& w) {
  w = w - w * c[kDecay] * c[kDecayRate];
}

// Slots: velocity. Scalars: momentum.
template <typename V>
FREEZEOPS_RULE void update_sgd(RuleFlags flags, const V* c, V& w, V g, V* s) {
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
FREEZEOPS_RULE void update_adam(RuleFlags flags, const V* c, V& w, V g, V square, V* s) {
  s[0] = s[0] + (g - s[0]) * c[kFirstOther];
  s[1] = s[1] + (square - s[1]) * c[kFirstOther + 1];
  V second = s[1];
  if (flags.amsgrad) second = s[2] = maximum(s[2], s[1]);
  w = w - s[0] * c[kRate] / (square_root(second) + c[kFirstOther + 2]);
}

// Slots: first and second moment. Scalars: 1 - beta_1, 1 - beta_2, epsilon; u_{t+1}, 1 - u_1 ... u_{t+1}, 1 - u_t,
// 1 - u_1 ... u_t, 1 - beta_2^t.
template <typename V>
FREEZEOPS_RULE void update_nadam(const V* c, V& w, V g, V square, V* s) {
  s[0] = s[0] + (g - s[0]) * c[kFirstOther];
  s[1] = s[1] + (square - s[1]) * c[kFirstOther + 1];
  const V* const t = c + kFirstOther + 3;
  const V mean = t[0] * s[0] / t[1] + t[2] * g / t[3];
  w = w - mean * c[kRate] / (square_root(s[1] / t[4]) + c[kFirstOther + 2]);
}

// Slots: mean square; momentum, where there is any; mean, where it is centered. Scalars: rho, 1 - rho, epsilon,
// momentum.
template <typename V>
FREEZEOPS_RULE void update_rmsprop(RuleFlags flags, const V* c, V& w, V g, V square, V* s) {
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
FREEZEOPS_RULE void update_adagrad(const V* c, V& w, V g, V square, V* s) {
  s[0] = s[0] + square;
  w = w - c[kRate] * g / square_root(s[0] + c[kFirstOther]);
}

// Slots: momentum. Scalars: beta_1, 1 - beta_1, beta_2, 1 - beta_2.
template <typename V>
FREEZEOPS_RULE void update_lion(const V* c, V& w, V g, V* s) {
  const V* const b = c + kFirstOther;
  w = w - c[kRate] * sign_of(s[0] * b[0] + g * b[1]);
  s[0] = s[0] * b[2] + g * b[3];
}

// One of them. `decays`: whether the weight decays first.
template <Rule kRule, typename V>
FREEZEOPS_RULE void update_entry(RuleFlags flags, bool decays, const V* c, V& w, V g, V square, V* s) {
  if (decays) decay_weight(c, w);
  if constexpr (kRule == Rule::kSgd) update_sgd(flags, c, w, g, s);
  if constexpr (kRule == Rule::kAdam) update_adam(flags, c, w, g, square, s);
  if constexpr (kRule == Rule::kNadam) update_nadam(c, w, g, square, s);
  if constexpr (kRule == Rule::kRmsprop) update_rmsprop(flags, c, w, g, square, s);
  if constexpr (kRule == Rule::kAdagrad) update_adagrad(c, w, g, square, s);
  if constexpr (kRule == Rule::kLion) update_lion(c, w, g, s);
}

#undef FREEZEOPS_RULE

}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_COMMON_UPDATE_RULES_H_
