// FC_HOST_DEVICE marks functions that kernels on the GPU call too.
#pragma once

#if defined(__CUDACC__)
#define FC_HOST_DEVICE __host__ __device__
#else
#define FC_HOST_DEVICE
#endif
