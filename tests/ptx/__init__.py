"""A machine that runs PTX on a CPU, for kernels that have no GPU to run on (docs/kernels.md)."""
