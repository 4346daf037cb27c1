"""CPU executor: compiled with Numba, SIMD through LLVM."""
