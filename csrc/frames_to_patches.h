// The launches of frames_to_patches.
#pragma once

#include "videor1/patches.h"

namespace videor1 {

using ParallelFor = void (*)(int64_t tasks, void (*task)(int64_t index, void* context), void* context);

// Tasks are independent, and the bits of the result do not depend on ``threads``.
void frames_to_patches_cpu(const Job& job, int64_t threads, ParallelFor parallel_for);

// On ``stream`` of the current device; pointers are device pointers. 0, or a cudaError_t.
int frames_to_patches_cuda(const Job& job, void* stream);

}  // namespace videor1
