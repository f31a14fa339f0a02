// What the Python side asks the library itself.
#include "common.cuh"

#ifndef ESPALIER_SOURCE_HASH
#define ESPALIER_SOURCE_HASH "unknown"
#endif

// Hash of the sources it was built from: a library of other sources is refused.
extern "C" const char* espalier_source_hash() { return ESPALIER_SOURCE_HASH; }

extern "C" const char* espalier_error(int code) {
  switch (code) {
    case esp::BAD_TYPE: return "unsupported element type";
    case esp::BAD_OPTION: return "unknown option";
    case esp::SMALL_WORKSPACE: return "the workspace is too small";
    case esp::BAD_SHAPE: return "sizes that the kernel does not take";
    default: break;
  }
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
  return emulation::error_text(code);
#endif
}
