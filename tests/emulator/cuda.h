// CUDA on the CPU: the parts of the language and its headers that this project's kernels use, as plain C++. A
// kernel is compiled as C++ with FC_EMULATOR defined, launched through csrc/cuda/launch.h, and run by
// emulator.h.
#pragma once

#include "emulator/device.h"
#include "emulator/emulator.h"
#include "emulator/half.h"
#include "emulator/host.h"
