// Launchers of hard_concrete.
#include "hard_concrete.cuh"

extern "C" int64_t espalier_hard_concrete_workspace(int64_t gates) {
  return esp::ceil_div(gates, esp::GATE_THREADS) * sizeof(double);
}

// uniforms (G,) fp64 or null; state (2,) int64 seed and offset, or null.
extern "C" int espalier_hard_concrete(const void* log_alpha, const void* costs, const void* uniforms,
                                      const void* state, void* z, void* size, void* workspace,
                                      int64_t bytes, int64_t gates, int64_t seed, int64_t offset,
                                      void* stream) {
  using namespace esp;
  if (bytes < espalier_hard_concrete_workspace(gates)) return SMALL_WORKSPACE;
  int64_t blocks = ceil_div(gates, GATE_THREADS);
  Noise noise{static_cast<const double*>(uniforms), static_cast<const int64_t*>(state), seed, offset};
  double* partial = static_cast<double*>(workspace);
  if (blocks > 0) {
    ESP_LAUNCH(gates_forward, dim3(blocks), dim3(GATE_THREADS), stream,
               static_cast<const float*>(log_alpha), static_cast<const double*>(costs), noise,
               static_cast<float*>(z), partial, gates);
  }
  ESP_LAUNCH(gates_finish, dim3(1), dim3(GATE_THREADS), stream, partial, static_cast<double*>(size),
             blocks);
  return ESP_STATUS();
}

extern "C" int espalier_hard_concrete_backward(const void* dz, const void* dsize, const void* z,
                                               const void* log_alpha, const void* costs, void* out,
                                               int64_t gates, void* stream) {
  using namespace esp;
  if (gates == 0) return 0;
  ESP_LAUNCH(gates_backward, dim3(ceil_div(gates, GATE_THREADS)), dim3(GATE_THREADS), stream,
             static_cast<const float*>(dz), static_cast<const double*>(dsize),
             static_cast<const float*>(z), static_cast<const float*>(log_alpha),
             static_cast<const double*>(costs), static_cast<float*>(out), gates);
  return ESP_STATUS();
}
