"""The output head on CUDA: cuBLAS makes tiles of logits, Triton kernels read them; the same numbers as ``lit_opd.scoring.tiles``."""
