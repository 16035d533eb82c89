"""All Triton kernels of a step, compiled at the same time.

Triton compiles a kernel when it is first launched, and a step's kernels one after the other: a
dozen, half a second or more each. So the first token would take the longest of all. Nearly all of
that time passes in compilers that release Python's lock, so threads can share it.

Triton compiles a kernel again for other types, sizes and constants, and for a pointer that is not
a multiple of 16. Where a kernel gets its pointer from the middle of a table and gains nothing from
the multiple, its `do_not_specialize_on_alignment` saves those variants.

This file needs only torch and triton.
"""

import gc
from concurrent.futures import ThreadPoolExecutor

import torch
import triton


def compile_together(run, x):
    """Compile and load the Triton kernels that run() would launch, for the GPU of the tensor x.

    Calls run() once. No Triton kernel is launched in it, not even one that was compiled before:
    after kernels that did not run, its lists of rows might point anywhere. PyTorch's operations
    do run, on whatever the kernels' outputs happen to hold. So run() must tolerate garbage there,
    and its results mean nothing. No other thread may launch Triton kernels meanwhile.

    Raises what run() raises, and what a kernel's compiler does.
    """
    missing = {}  # all that Triton knows of a variant, as a string -> its kernel

    def remember(*, fn, compile, **_):
        missing[compile["specialization_data"]] = fn.jit_function
        return True  # do not compile it now

    def do_not_launch(kernel, *arguments, grid, warmup, **options):
        return launch(kernel, *arguments, grid=grid, warmup=True, **options)

    runtime, JITFunction = triton.knobs.runtime, triton.JITFunction
    hook, launch = runtime.jit_cache_hook, JITFunction.run
    runtime.jit_cache_hook, JITFunction.run = remember, do_not_launch
    try:
        run()
    finally:
        runtime.jit_cache_hook, JITFunction.run = hook, launch

    def load(variant):
        with torch.cuda.device_of(x):  # each thread has a current device of its own
            return missing[variant].preload(variant).run  # this attribute loads it into the GPU

    # In Python up to 3.11.7, `ast.parse` fails if the garbage collector lets another thread call
    # it meanwhile.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(load, missing))  # `list` raises what a thread raised
    finally:
        if collecting:
            gc.enable()
