// All gates of a model at once: hard-concrete samples and their expected size (1712.01312).
//
//   s = sigmoid((logit u + a) / T)    z = clip(s (high - low) + low, 0, 1)
//   p = clip(sigmoid(a - shift), eps, 1 - eps) = P(z > 0)    size = sum cost p
//
// One flat vector of G log-alphas; u is given, or drawn by Philox4x32-10 from (seed, offset). The
// slope dz/da is a function of z alone, so the backward needs nothing but z, a and the costs.
#pragma once

#include "common.cuh"

namespace esp {

constexpr int GATE_THREADS = 256;
constexpr float GATE_TEMPERATURE = 2.0f / 3.0f;
constexpr float GATE_LOW = -0.1f, GATE_HIGH = 1.1f, GATE_SPAN = 1.2f;
constexpr double GATE_EPSILON = 1e-6;
constexpr float GATE_SHIFT = -1.5985968f;  // T ln(-low / high)

struct Noise {
  const double* uniforms;  // (G,), or null: Philox
  const int64_t* state;    // (seed, offset) on the device, or null: the two below
  int64_t seed, offset;
};

struct Bits {
  uint32_t word[4];
};

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
ESP_DEVICE Bits philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  Bits c{{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0}};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint64_t left = static_cast<uint64_t>(0xD2511F53u) * c.word[0];
    uint64_t right = static_cast<uint64_t>(0xCD9E8D57u) * c.word[2];
    c = {{static_cast<uint32_t>(right >> 32) ^ c.word[1] ^ k0, static_cast<uint32_t>(right),
          static_cast<uint32_t>(left >> 32) ^ c.word[3] ^ k1, static_cast<uint32_t>(left)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Gate i takes word i % 4 of counter offset + i / 4; in (0, 1), in steps of 2^-32.
ESP_DEVICE double uniform(const Noise& noise, int64_t i) {
  if (noise.uniforms) return load<1>(noise.uniforms + i).value[0];
  uint64_t seed = noise.seed, offset = noise.offset;
  if (noise.state) {
    seed = load<1>(noise.state).value[0];
    offset = load<1>(noise.state + 1).value[0];
  }
  uint32_t word = philox(seed, offset + static_cast<uint64_t>(i) / 4).word[i % 4];
  double u = (static_cast<double>(word) + 0.5) * (1.0 / 4294967296.0);
  return u * (1.0 - 2.0 * GATE_EPSILON) + GATE_EPSILON;
}

ESP_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// As torch.clamp: NaN stays NaN.
ESP_DEVICE float clip(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

ESP_DEVICE float open_probability(float log_alpha) {
  return clip(sigmoid(log_alpha - GATE_SHIFT), static_cast<float>(GATE_EPSILON),
              static_cast<float>(1.0 - GATE_EPSILON));
}

// The block's sum, in thread 0, always in one order.
ESP_DEVICE double block_sum(double value) {
  ESP_SHARED(double, warps, [GATE_THREADS / WARP]);
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < GATE_THREADS / WARP; ++w) sum += warps[w];
  }
  return sum;
}

ESP_KERNEL(GATE_THREADS)
gates_forward(const float* log_alpha, const double* costs, Noise noise, float* z, double* partial,
              int64_t gates) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * GATE_THREADS + threadIdx.x;
  double size = 0.0;
  if (i < gates) {
    float a = load<1>(log_alpha + i).value[0];
    // In fp64: near 1 an fp32 u has only a few bits left.
    double u = uniform(noise, i);
    float logit = static_cast<float>(log(u) - log1p(-u));
    float stretched = sigmoid((logit + a) / GATE_TEMPERATURE) * GATE_SPAN + GATE_LOW;
    store<1>(z + i, Vector<float, 1>{{clip(stretched, 0.0f, 1.0f)}});
    size = static_cast<double>(open_probability(a)) * load<1>(costs + i).value[0];
  }
  double sum = block_sum(size);
  if (threadIdx.x == 0) store<1>(partial + blockIdx.x, Vector<double, 1>{{sum}});
}

ESP_KERNEL(GATE_THREADS) gates_finish(const double* partial, double* size, int64_t blocks) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < blocks; i += GATE_THREADS) sum += load<1>(partial + i).value[0];
  sum = block_sum(sum);
  if (threadIdx.x == 0) store<1>(size, Vector<double, 1>{{sum}});
}

// d/da of sum(dz z) + dsize size; either gradient may be null.
ESP_KERNEL(GATE_THREADS)
gates_backward(const float* dz, const double* dsize, const float* z, const float* log_alpha,
               const double* costs, float* out, int64_t gates) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * GATE_THREADS + threadIdx.x;
  if (i >= gates) return;
  float gradient = 0.0f;
  if (dz) {
    float value = load<1>(z + i).value[0];
    float s = (value - GATE_LOW) / GATE_SPAN;
    // Not `0 < z && z < 1`: a NaN gate has a NaN gradient.
    bool clipped = value <= 0.0f || value >= 1.0f;
    float slope = clipped ? 0.0f : GATE_SPAN / GATE_TEMPERATURE * s * (1.0f - s);
    gradient = load<1>(dz + i).value[0] * slope;
  }
  if (dsize) {
    float x = load<1>(log_alpha + i).value[0] - GATE_SHIFT;
    float p = sigmoid(x);
    bool clipped = p < static_cast<float>(GATE_EPSILON) || p > static_cast<float>(1.0 - GATE_EPSILON);
    double factor = load<1>(dsize).value[0] * load<1>(costs + i).value[0];
    // 1 - p would have lost its last bits where p is near 1.
    gradient += clipped ? 0.0f : static_cast<float>(factor) * p * sigmoid(-x);
  }
  store<1>(out + i, Vector<float, 1>{{gradient}});
}

}  // namespace esp
