// Runs the bodies of the CUDA kernels on the host: for tests, not for speed.
//
// The 32 lanes of a warp are 32 stacks on one thread. Each runs until it waits for the others, in an order that changes
// from tile to tile, so that a body which relies on lanes being in step shows. Lanes that do not all come to the same
// call of all() or ballot(), which hangs or worse on a device, end the program. Bodies that never wait (kWaits is
// false) need no stacks: their lanes run one after the other.

#ifndef FREEZEOPS_KERNELS_CUDA_WARPS_ON_HOST_H_
#define FREEZEOPS_KERNELS_CUDA_WARPS_ON_HOST_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <memory>

namespace freezeops {
namespace cuda {

class LanesOnHost {
 public:
  static constexpr int kCount = 32;

  // Runs work(lane) for each lane.
  template <typename Work>
  void run(int64_t tile, const Work& work) {
    work_ = [](const void* argument, int lane) { (*static_cast<const Work*>(argument))(lane); };
    argument_ = &work;
    for (int lane = 0; lane < kCount; ++lane) {
      state_[lane] = State::kRunning;
      getcontext(&lanes_[lane]);
      lanes_[lane].uc_stack.ss_sp = stacks_.get() + lane * kStackBytes;
      lanes_[lane].uc_stack.ss_size = kStackBytes;
      lanes_[lane].uc_link = &scheduler_;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(&lanes_[lane], reinterpret_cast<void (*)()>(&LanesOnHost::enter), 3,
                  static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), static_cast<unsigned>(lane));
    }
    for (bool waiting = true; waiting;) {
      int finished = 0;
      for (int i = 0; i < kCount; ++i) {
        const int lane = tile % 2 == 0 ? (i + static_cast<int>(tile % 29)) % kCount : kCount - 1 - i;
        if (state_[lane] != State::kFinished) {
          state_[lane] = State::kRunning;
          swapcontext(&scheduler_, &lanes_[lane]);
          if (state_[lane] == State::kRunning) state_[lane] = State::kFinished;
        }
        finished += state_[lane] == State::kFinished;
      }
      if (finished != 0 && finished != kCount) {
        fprintf(stderr, "freezeops: %d lanes of a warp wait for %d that have ended\n", kCount - finished, finished);
        abort();
      }
      waiting = finished == 0;
      ballot_ = arriving_;
      arriving_ = 0;
    }
  }

  // Called by a lane: waits until each lane has said its word, and returns all of them.
  uint32_t exchange(int lane, bool mine) {
    arriving_ |= static_cast<uint32_t>(mine) << lane;
    state_[lane] = State::kWaiting;
    swapcontext(&lanes_[lane], &scheduler_);
    return ballot_;
  }

 private:
  enum class State { kRunning, kWaiting, kFinished };
  static constexpr size_t kStackBytes = size_t{64} << 10;

  static void enter(unsigned high, unsigned low, unsigned lane) {
    LanesOnHost* const self = reinterpret_cast<LanesOnHost*>(static_cast<uintptr_t>(high) << 32 | low);
    self->work_(self->argument_, static_cast<int>(lane));
  }

  std::unique_ptr<char[]> stacks_{new char[kCount * kStackBytes]};
  ucontext_t scheduler_;
  ucontext_t lanes_[kCount];
  State state_[kCount];
  void (*work_)(const void*, int) = nullptr;
  const void* argument_ = nullptr;
  uint32_t arriving_ = 0;
  uint32_t ballot_ = 0;
};

class HostWarp {
 public:
  HostWarp(LanesOnHost* lanes, int lane) : lanes_(lanes), lane_(lane) {}
  int lane() const { return lane_; }
  bool all(bool each) const { return ballot(each) == ~uint32_t{0}; }
  uint32_t ballot(bool each) const {
    if (lanes_ == nullptr) {
      fprintf(stderr, "freezeops: a body waits that says it does not\n");
      abort();
    }
    return lanes_->exchange(lane_, each);
  }

 private:
  LanesOnHost* lanes_;
  int lane_;
};

template <typename Body>
void run_on_host(const Body& body) {
  static thread_local LanesOnHost lanes;
  const int64_t tiles = body.tiles();
  // Backwards, which no body may rely on either.
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    if (Body::kWaits) {
      lanes.run(tile, [&](int lane) { body(HostWarp(&lanes, lane), tile); });
    } else {
      for (int lane = LanesOnHost::kCount - 1; lane >= 0; --lane) body(HostWarp(nullptr, lane), tile);
    }
  }
}

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_WARPS_ON_HOST_H_
