#include "cpu/isa.h"

namespace fc {

const char* kernel_isa() { return FC_ISA_NAME; }

}  // namespace fc
