// Which instruction set the kernels in this directory were compiled for.
#pragma once

namespace fc {

// A name as FLASHCORESET_ISA takes it: "x86-64-v3".
const char* kernel_isa();

}  // namespace fc
