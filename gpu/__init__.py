"""The kernels of a decode step on a GPU, by mechanism, and the choice between them."""
