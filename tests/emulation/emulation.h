// CUDA on a CPU, for the logic of kernels: one fiber per thread, blocks one after the other.
//
// Blocks, and the threads between two barriers, run in an order drawn anew for each launch. Shared
// memory is filled with 0xff (NaN) before each block: a value that is read before any thread of the
// block wrote it shows. Vector accesses are checked for alignment and, when tensors were announced
// with emulation_ranges, for being inside one. Grids and blocks that a GPU would refuse are refused.
// Not emulated: real races, divergence, tensor cores, asynchronous copies. A run with
// compute-sanitizer on a GPU remains the real test.
#pragma once

#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#define ESP_DEVICE inline
#define ESP_HOST_DEVICE inline
#define ESP_KERNEL(threads) inline void
#define ESP_KERNEL_RESIDENT(threads, blocks) inline void
#define ESP_GRID_CONSTANT const
#define ESP_SHARED(type, name, dims) \
  using name##_type = type dims;     \
  name##_type& name = *emulation::shared<name##_type>(__FILE__, __LINE__)
#define ESP_LAUNCH(kernel, grid, block, stream, ...) \
  emulation::launch(grid, block, [=] { kernel(__VA_ARGS__); })
#define ESP_STATUS() emulation::take_error()
#define ESP_MAY_ACCESS(pointer, bytes) emulation::may_access(pointer, bytes)

struct dim3 {
  unsigned x, y, z;
  dim3(int64_t x = 1, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// Codes of cudaError_t for the same mistakes.
enum { INVALID_CONFIGURATION = 9, OUT_OF_BOUNDS = 700, DEADLOCK = 702, MISALIGNED = 716 };

inline const char* error_text(int code) {
  switch (code) {
    case INVALID_CONFIGURATION: return "invalid configuration argument";
    case OUT_OF_BOUNDS: return "an access outside every tensor of the call";
    case DEADLOCK: return "threads wait for each other at different barriers";
    case MISALIGNED: return "misaligned address";
    default: return "unknown error";
  }
}

constexpr size_t STACK = 128 * 1024;
constexpr unsigned LANES = 32;
enum class State { READY, AT_WARP_BARRIER, AT_BLOCK_BARRIER, DONE };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state = State::DONE;
  uint64_t exchange[2];
};

struct Machine {
  dim3 grid, block, block_index;
  std::vector<Fiber> fibers;
  std::vector<unsigned> ready;
  std::function<void()> body;
  std::map<std::pair<const char*, int>, std::vector<char>> shared;
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  ucontext_t scheduler;
  unsigned current = 0, threads = 0;
  uint64_t random = 0x9e3779b97f4a7c15u;
  int error = 0;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void fail(int code) {
  if (machine().error == 0) machine().error = code;
}

inline int take_error() { return std::exchange(machine().error, 0); }

inline uint64_t draw(uint64_t below) {
  uint64_t& state = machine().random;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return state % below;
}

// An access that fails is not made: the rest of the test process stays whole.
inline bool may_access(const void* pointer, size_t bytes) {
  auto begin = reinterpret_cast<uintptr_t>(pointer);
  const auto& ranges = machine().ranges;
  auto holds = [=](const auto& range) { return range.first <= begin && begin + bytes <= range.second; };
  bool inside = ranges.empty() || std::any_of(ranges.begin(), ranges.end(), holds);
  if (!inside) fail(OUT_OF_BOUNDS);
  if (begin % bytes != 0) fail(MISALIGNED);
  return inside && begin % bytes == 0;
}

template <class T> T* shared(const char* file, int line) {
  auto& pool = machine().shared[{file, line}];
  if (pool.size() != sizeof(T)) pool.assign(sizeof(T), static_cast<char>(0xff));
  return reinterpret_cast<T*>(pool.data());
}

inline void wait(State state) {
  Fiber& fiber = machine().fibers[machine().current];
  fiber.state = state;
  swapcontext(&fiber.context, &machine().scheduler);
}

inline void run_thread() {
  machine().body();
  wait(State::DONE);
}

inline void release(unsigned begin, unsigned end, State waiting) {
  for (unsigned i = begin; i < end; ++i) {
    if (machine().fibers[i].state != waiting) continue;
    machine().fibers[i].state = State::READY;
    machine().ready.push_back(i);
  }
}

// Lets the threads go on whose barrier every live thread of the warp, or of the block, has reached.
inline bool release_barriers() {
  Machine& m = machine();
  auto all_at = [&](unsigned begin, unsigned end, State state) {
    auto here = [=](const Fiber& f) { return f.state == state || f.state == State::DONE; };
    return std::all_of(m.fibers.begin() + begin, m.fibers.begin() + end, here);
  };
  for (unsigned begin = 0; begin < m.threads; begin += LANES) {
    unsigned end = std::min(begin + LANES, m.threads);
    if (all_at(begin, end, State::AT_WARP_BARRIER)) release(begin, end, State::AT_WARP_BARRIER);
  }
  if (m.ready.empty() && all_at(0, m.threads, State::AT_BLOCK_BARRIER)) {
    release(0, m.threads, State::AT_BLOCK_BARRIER);
  }
  return !m.ready.empty();
}

inline void run_block() {
  Machine& m = machine();
  for (auto& pool : m.shared) memset(pool.second.data(), 0xff, pool.second.size());
  m.ready.clear();
  for (unsigned i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
    fiber.state = State::READY;
    m.ready.push_back(i);
  }
  do {
    while (!m.ready.empty()) {
      std::swap(m.ready[draw(m.ready.size())], m.ready.back());
      m.current = m.ready.back();
      m.ready.pop_back();
      swapcontext(&m.scheduler, &m.fibers[m.current].context);
    }
  } while (release_barriers());
  for (unsigned i = 0; i < m.threads; ++i) {
    if (m.fibers[i].state != State::DONE) fail(DEADLOCK);
  }
}

inline bool accepted(dim3 grid, dim3 block) {
  uint64_t threads = uint64_t(block.x) * block.y * block.z;
  bool some = grid.x && grid.y && grid.z && threads;
  return some && threads <= 1024 && grid.x < (1u << 31) && grid.y < 65536 && grid.z < 65536;
}

template <class Body> void launch(dim3 grid, dim3 block, Body body) {
  Machine& m = machine();
  if (!accepted(grid, block)) return fail(INVALID_CONFIGURATION);
  m.grid = grid, m.block = block, m.body = body, m.threads = block.x * block.y * block.z;
  if (m.fibers.size() < m.threads) m.fibers = std::vector<Fiber>(m.threads);
  std::vector<uint64_t> order(uint64_t(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (uint64_t i : order) {
    m.block_index = dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y));
    run_block();
  }
}

// Every lane leaves its value, all lanes read, and only then may anything be overwritten.
template <class T> T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(Fiber::exchange), "too large for a shuffle");
  Machine& m = machine();
  unsigned mine = m.current, warp = mine / LANES * LANES;
  memcpy(m.fibers[mine].exchange, &value, sizeof(T));
  wait(State::AT_WARP_BARRIER);
  unsigned other = from < LANES && warp + from < m.threads ? warp + from : mine;
  memcpy(&value, m.fibers[other].exchange, sizeof(T));
  wait(State::AT_WARP_BARRIER);
  return value;
}

inline unsigned lane() { return machine().current % LANES; }

inline dim3 thread_index() {
  const Machine& m = machine();
  unsigned t = m.current;
  return dim3(t % m.block.x, t / m.block.x % m.block.y, t / (m.block.x * m.block.y));
}

}  // namespace emulation

#define gridDim emulation::machine().grid
#define blockDim emulation::machine().block
#define blockIdx emulation::machine().block_index
#define threadIdx emulation::thread_index()

inline void __syncthreads() { emulation::wait(emulation::State::AT_BLOCK_BARRIER); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait(emulation::State::AT_WARP_BARRIER); }
inline void __threadfence() {}
template <class T> T __shfl_sync(unsigned, T value, int from) { return emulation::exchange(value, from); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane() ^ mask);
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulation::exchange(value, emulation::lane() + delta);
}
template <class T> T __shfl_up_sync(unsigned, T value, unsigned delta) {
  return emulation::exchange(value, emulation::lane() - delta);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned bits = 0;
  for (unsigned i = 0; i < emulation::LANES; ++i) {
    bits |= (emulation::exchange(predicate != 0, i) ? 1u : 0u) << i;
  }
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

namespace esp {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }
inline float to_float(half value) {
  uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  float magnitude = rest < 0x400 ? std::ldexp(float(rest), -24)
                                 : float_of((rest << 13) + (uint32_t(127 - 15) << 23));
  return sign ? -magnitude : magnitude;
}

// Both round to nearest, ties to even, as the conversions on the device do.
template <class T> T from_float(float value);
template <> inline float from_float<float>(float value) { return value; }
template <> inline bfloat16 from_float<bfloat16>(float value) {
  uint32_t bits = bits_of(value);
  if (std::isnan(value)) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline half from_float<half>(float value) {
  uint16_t sign = bits_of(value) >> 16 & 0x8000;
  if (std::isnan(value)) return {uint16_t(sign | 0x7e00)};
  double magnitude = std::fabs(double(value));
  if (magnitude >= 65520.0) return {uint16_t(sign | 0x7c00)};
  int exponent = magnitude == 0.0 ? -14 : std::max(std::ilogb(magnitude), -14);
  // In units of the last place; a carry into the next binade needs no care, the codes are adjacent.
  auto units = uint32_t(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | (units + (uint32_t(exponent + 14) << 10)))};
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

}  // namespace esp
