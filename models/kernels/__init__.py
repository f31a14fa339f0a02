"""Kernels for masks, gates and distillation: a plain torch reference and a CUDA form of each op.

reference*.py specify, csrc/ holds the CUDA code, ops.py says how an op is registered (and how to
add one), dispatch.py which form runs, build.py and library.py how the CUDA code gets here. The
ground floor of models/: imports nothing above it.
"""
