"""CUDA executor: kernels compiled with Numba, memory and graphs through CuPy."""
