"""The kernels of a decode step on a GPU, by mechanism, and the choice between them.

product.py chooses; lists.py, one_kernel.py, tensor_cores.py and four_bits.py compute y = W x;
parts.py and ../sparse_gemv.py hold what these share.
"""
