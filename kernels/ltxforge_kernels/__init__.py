"""Compiled kernels for LTX training: one folder per op, each with a definition, a reference, a kernel and a launch.

Imports torch and triton only, and works without Triton and without a GPU: what then remains is the reference.
Nothing is chosen here: `choice.py` says which implementation an op has, and its caller passes that on.

An op's folder:
    __init__.py   what callers call: signature, formula, shapes, bytes moved, source
    reference.py  plain PyTorch, the definition; also the `eager` and `compile` implementations
    kernel.py     `@triton.jit` functions, nothing else
    launch.py     allocates, chooses blocks, launches; torch.library op, fake and autograd
    inputs.py     inputs of a given shape, for tests, the bench and `compile_only.py` alike
"""
