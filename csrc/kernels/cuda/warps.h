// The form of the CUDA kernels, and their launch.
//
// A kernel is a body: a struct of arguments with
//   static constexpr bool kWaits                             whether its lanes wait for each other
//   int64_t tiles() const                                    how many parts its work has; asked on the host
//   void operator()(const Warp& warp, int64_t tile) const    what one lane of the warp that has a part does
// `warp` has lane(), and all() and ballot(), in which all lanes of a warp wait for each other. launch(body, stream)
// runs it: by nvcc as a kernel of warps that share the tiles out among themselves, and by any other compiler on the
// host, lane by lane. So all of a body, and whatever chooses between bodies, is tested without a GPU.
//
// Bodies are in *_bodies.h, launchers in *.cu, which are compiled both ways.

#ifndef FREEZEOPS_KERNELS_CUDA_WARPS_H_
#define FREEZEOPS_KERNELS_CUDA_WARPS_H_

#include <stdint.h>

#include "kernels/cuda/kernels.h"
#include "mask_layout.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>
#else
#include "kernels/cuda/warps_on_host.h"
#endif

namespace freezeops {
namespace cuda {

constexpr int kLanes = 32;

// Before a loop over arrays of constant length, which then are registers and no memory.
#if defined(__CUDA_ARCH__)
#define FREEZEOPS_UNROLL _Pragma("unroll")
#else
#define FREEZEOPS_UNROLL
#endif

#if defined(__CUDACC__)

constexpr int kWarpsInBlock = 8;

// As many as give every processor of the largest device several to choose from; the rest are a loop.
constexpr int64_t kMostBlocks = int64_t{1} << 20;

class DeviceWarp {
 public:
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ bool all(bool each) const { return __all_sync(~0u, each); }
  __device__ __forceinline__ uint32_t ballot(bool each) const { return __ballot_sync(~0u, each); }
};

template <typename Body>
__global__ void __launch_bounds__(kLanes* kWarpsInBlock) run_body(const Body body, const int64_t tiles) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarpsInBlock;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarpsInBlock + threadIdx.y;
  for (int64_t tile = first; tile < tiles; tile += warps) body(DeviceWarp(), tile);
}

// Returns a cudaError_t.
template <typename Body>
int launch(const Body& body, Stream stream) {
  const int64_t tiles = body.tiles();
  if (tiles <= 0) return cudaSuccess;
  const int64_t blocks = min64(ceil_divide(tiles, kWarpsInBlock), kMostBlocks);
  run_body<Body><<<static_cast<unsigned>(blocks), dim3(kLanes, kWarpsInBlock), 0, stream>>>(body, tiles);
  return cudaGetLastError();
}

#else

template <typename Body>
int launch(const Body& body, Stream) {
  run_on_host(body);
  return 0;
}

#endif

// --- Moving 16 bytes at a time

struct alignas(16) Bytes16 {
  uint64_t low;
  uint64_t high;
} __attribute__((may_alias));

// The number of entries in 16 bytes.
template <typename U>
FREEZEOPS_INLINE constexpr int in_bytes16() {
  return static_cast<int>(16 / sizeof(U));
}

FREEZEOPS_INLINE int64_t bytes_past_16(const void* pointer) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) & 15);
}

// `kWords` words of a mask from a multiple of 32 bits on.
template <int kWords>
FREEZEOPS_INLINE void load_words(const uint8_t* bits, int64_t byte_count, int64_t bit, uint32_t* words) {
  if (kWords % 4 == 0 && bit / 8 + 4 * kWords <= byte_count && bytes_past_16(bits + bit / 8) == 0) {
    const Bytes16* const from = reinterpret_cast<const Bytes16*>(bits + bit / 8);
    FREEZEOPS_UNROLL
    for (int i = 0; i < kWords / 4; ++i) {
      const Bytes16 four = from[i];
      words[4 * i] = static_cast<uint32_t>(four.low);
      words[4 * i + 1] = static_cast<uint32_t>(four.low >> 32);
      words[4 * i + 2] = static_cast<uint32_t>(four.high);
      words[4 * i + 3] = static_cast<uint32_t>(four.high >> 32);
    }
    return;
  }
  FREEZEOPS_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = load_word(bits, byte_count, bit + 32 * i);
}

// The lanes of a warp set `count` entries to zero.
template <typename U>
FREEZEOPS_INLINE void zero_range(int lane, U* destination, int64_t count) {
  const int64_t past = bytes_past_16(destination);
  const int64_t head = min64(past == 0 ? 0 : (16 - past) / static_cast<int64_t>(sizeof(U)), count);
  const int64_t vectors = (count - head) / in_bytes16<U>();
  if (lane < head) destination[lane] = 0;
  Bytes16* const aligned = reinterpret_cast<Bytes16*>(destination + head);
  for (int64_t v = lane; v < vectors; v += kLanes) aligned[v] = Bytes16{0, 0};
  const int64_t tail = head + vectors * in_bytes16<U>() + lane;
  if (tail < count) destination[tail] = 0;
}

// The lanes of a warp copy `count` values, each of which one lane moves at once. All that are read together are on
// their way before the first is written.
template <typename T>
FREEZEOPS_INLINE void copy_values(int lane, T* destination, const T* source, int64_t count) {
  constexpr int kAtOnce = 4;
  int64_t i = lane;
  for (; i + (kAtOnce - 1) * kLanes < count; i += kAtOnce * kLanes) {
    T values[kAtOnce];
    FREEZEOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) values[k] = source[i + k * kLanes];
    FREEZEOPS_UNROLL
    for (int k = 0; k < kAtOnce; ++k) destination[i + k * kLanes] = values[k];
  }
  for (; i < count; i += kLanes) destination[i] = source[i];
}

// The lanes of a warp copy `count` entries.
template <typename U>
FREEZEOPS_INLINE void copy_range(int lane, U* destination, const U* source, int64_t count) {
  const int64_t past = bytes_past_16(destination);
  if (bytes_past_16(source) != past) {
    copy_values(lane, destination, source, count);
    return;
  }
  const int64_t head = min64(past == 0 ? 0 : (16 - past) / static_cast<int64_t>(sizeof(U)), count);
  const int64_t vectors = (count - head) / in_bytes16<U>();
  if (lane < head) destination[lane] = source[lane];
  copy_values(lane, reinterpret_cast<Bytes16*>(destination + head), reinterpret_cast<const Bytes16*>(source + head),
              vectors);
  const int64_t tail = head + vectors * in_bytes16<U>() + lane;
  if (tail < count) destination[tail] = source[tail];
}

// --- Sharing rows out among warps

// Rows at least this long (bytes) are worked on as rows: each lane then has 16 bytes of one.
constexpr int64_t kLongRowBytes = 512;

// Tiles of up to 32 whole rows, or of a piece of one long row.
struct RowTiling {
  int64_t rows;
  int64_t row_size;      // entries
  int64_t rows_in_tile;  // 1 to 32
  int64_t piece;         // entries of a row in a tile
  int64_t pieces_in_row;

  struct Tile {
    int64_t row;
    int rows;
    int64_t begin;  // entries in the row
    int64_t end;
  };

  int64_t tiles() const { return ceil_divide(rows, rows_in_tile) * pieces_in_row; }

  FREEZEOPS_METHOD Tile at(int64_t tile) const {
    const int64_t group = pieces_in_row == 1 ? tile : tile / pieces_in_row;
    const int64_t begin = (tile - group * pieces_in_row) * piece;
    const int64_t row = group * rows_in_tile;
    return Tile{row, static_cast<int>(min64(rows_in_tile, rows - row)), begin, min64(begin + piece, row_size)};
  }
};

// Enough tiles for a large device, each large enough to be worth its start.
inline RowTiling tile_rows(int64_t rows, int64_t row_size) {
  constexpr int64_t kWantedTiles = 8192;
  constexpr int64_t kLargestPiece = 16384;  // a multiple of 16 bytes, so that pieces of aligned rows are aligned
  RowTiling tiling{rows, row_size, 1, min64(row_size, kLargestPiece), 1};
  if (row_size > 0) tiling.pieces_in_row = ceil_divide(row_size, tiling.piece);
  while (tiling.rows_in_tile < kLanes && rows / (2 * tiling.rows_in_tile) >= kWantedTiles) tiling.rows_in_tile *= 2;
  return tiling;
}

}  // namespace cuda
}  // namespace freezeops

#endif  // FREEZEOPS_KERNELS_CUDA_WARPS_H_
