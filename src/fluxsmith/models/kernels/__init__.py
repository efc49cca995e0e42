"""Triton kernels for the steps between matrix products; each has a twin in plain PyTorch in `models/fused.py` that it must equal.

`choice.kernel_ops` picks a table of steps by name. Only the modules it names import triton, which is optional.
"""
