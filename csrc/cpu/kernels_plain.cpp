// Kernels for any CPU.
#include "table.h"

EPMQ_KERNEL_TABLE(plain)
