"""The output head on CUDA: cuBLAS makes tiles of logits, Triton kernels read them; the numbers are those of ``tiles``."""
