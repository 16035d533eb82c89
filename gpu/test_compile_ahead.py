"""Kernels compiled together: all that a step needs, none launched, each for the right GPU.

Triton also compiles without a GPU. So a driver that only pretends to have one is enough here.
"""

import contextlib
import gc
import sys
import threading
import types

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

import sparse_gemv
from conftest import random_model
from gpu import decode_attention, four_bits, head, lists, one_kernel, tensor_cores, token_kernels
from gpu.compile_ahead import compile_together
from gpu.decoder import GpuDecoder
from model import Config, KVCache, Linear
from quantize import Int4Linear

pytestmark = pytest.mark.skipif(
    sparse_gemv.INTERPRETED, reason="the interpreter compiles nothing")
MODULES = (sparse_gemv, lists, one_kernel, tensor_cores, four_bits, decode_attention, head,
           token_kernels)
DEVICE, OTHER_DEVICE = 990, 991  # numbers that no real GPU has


@triton.jit
def _copy_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


KERNELS = {_copy_kernel} | {kernel for module in MODULES for name, kernel in vars(module).items()
                            if name.startswith("_") and name.endswith("_kernel")}


@pytest.fixture
def driver(monkeypatch, any_head):
    """A driver of two Hopper GPUs that loads and launches by noting it. Nothing is compiled yet."""
    thread, notes = threading.local(), types.SimpleNamespace(loaded=[], launched=[])

    def load_binary(name, code, shared, device):
        notes.loaded.append((name, device))
        return "module", "function", 32, 0, 1024

    driver = types.SimpleNamespace(
        get_current_device=lambda: getattr(thread, "device", DEVICE),
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda src, metadata: lambda *arguments: notes.launched.append(src.fn),
        utils=types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=load_binary))

    @contextlib.contextmanager
    def device_of(tensor):
        before, thread.device = driver.get_current_device(), tensor.gpu
        yield
        thread.device = before

    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.Tensor, "gpu", DEVICE, raising=False)
    for module in (*MODULES, sys.modules["gpu.decoder"]):
        if hasattr(module, "launch_options"):
            monkeypatch.setattr(module, "launch_options",
                                lambda device: {"PDL": True, "launch_pdl": True})
    yield notes
    for kernel in KERNELS:
        for device in (DEVICE, OTHER_DEVICE):
            for compiled in kernel.device_caches.pop(device, ({},))[0].values():
                compiled.module = None  # there is nothing to unload


def copy(x, size=16):
    with torch.cuda.device_of(x):
        _copy_kernel[(1,)](x, torch.empty_like(x), SIZE=size)


def test_missing_kernels_are_compiled_and_loaded_and_none_is_launched(driver, monkeypatch):
    """At the same time, for the GPU of the tensor: each waits until both have begun, and the
    garbage collector for both."""
    begun, preload = threading.Barrier(2, timeout=60), triton.JITFunction.preload

    def watched(kernel, variant):
        begun.wait()
        assert not gc.isenabled()
        return preload(kernel, variant)

    def run():
        for _ in range(3):
            copy(x), copy(y)

    monkeypatch.setattr(triton.JITFunction, "preload", watched)
    x, y = torch.zeros(16), torch.zeros(16, dtype=torch.float16)
    for device in DEVICE, OTHER_DEVICE:
        x.gpu = y.gpu = device
        for _ in range(2):  # at the second time, nothing is missing
            compile_together(run, x)
        assert driver.loaded == [("_copy_kernel", device)] * 2 and not driver.launched
        driver.loaded.clear()
    assert gc.isenabled()
    run()
    assert driver.launched == [_copy_kernel] * 6 and not driver.loaded


def test_errors_surface_and_triton_is_left_as_it_was(driver, monkeypatch):
    def hook(**_):
        return False

    def fail():
        copy(x)
        raise KeyError("of run")

    x, launch = torch.zeros(16), triton.JITFunction.run
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    with pytest.raises(KeyError, match="of run"):
        compile_together(fail, x)
    assert not driver.loaded
    with pytest.raises(triton.CompilationError, match="power of 2"):
        compile_together(lambda: (copy(x), copy(x, 17)), x)
    assert not driver.launched and gc.isenabled()
    assert triton.knobs.runtime.jit_cache_hook is hook and triton.JITFunction.run is launch


@pytest.mark.parametrize("sparse, products, n_launches", [
    (False, {"_every_row_kernel"}, 4 + 4),
    (True, {"_fused_select_kernel", "_fused_sum_kernel", "_kept_rows_kernel", "_four_bit_kernel",
            "_bounds_kernel"}, 6 + 8)])
def test_a_steps_kernels_are_complete(driver, sparse, products, n_launches):
    """What is compiled ahead is exactly what a step then finds, and the step's state stays. More
    layers need no more, though their thresholds and counts lie at other places of a table."""
    def make_decoder(n_layers):
        config = Config(96, 64, 96, n_layers, 4, 2, 16, context=160)
        model = random_model(config, lambda layer, *rest: (
            Int4Linear if sparse and layer in (0, 3) else Linear)(layer, *rest), "cpu")
        decoder = GpuDecoder(model, KVCache(config, 160), token_kernels.likeliest_on_gpu,
                             top=int(sparse))
        decoder.sparse = sparse
        decoder.position.fill_(7)
        compile_together(decoder.step, decoder.x)
        assert decoder.position.item() == 7 and decoder.kept.sum() == 0 and not driver.launched
        return decoder

    make_decoder(1 + sparse)
    loaded = driver.loaded.copy()
    assert {name for name, _ in loaded} == products | {
        "_embed_kernel", "_decode_attention_kernel", "_rows_kernel", "_likeliest_kernel"}
    make_decoder(4).step()
    assert driver.loaded == loaded
    # embedding, bounds, head, choice; two kinds of layers, twice
    assert len(driver.launched) == 3 + sparse + 2 * (n_launches + 2)


def test_weights_are_loaded_before_x(driver):
    """Compiled for a Hopper GPU, a dense product and the LM head have their first weights on their
    way, 16 bytes at once, when they wait for the kernel before; what depends on it comes after."""
    x, norm, out = torch.ones(3, 1024).bfloat16()
    w_t, scale = torch.zeros(1024, 1024).bfloat16(), torch.zeros(1024, 32, 2).bfloat16()
    options = {"norm": (norm, 1e-5), "residual": out}
    tensor_cores.product_on_tensor_cores(x, w_t, out, **options)
    four_bits.product_of_four_bits(x, w_t.view(torch.uint8)[:, :512].contiguous(), None, out,
                                   scale=scale, **options)
    linear = Linear(None, "lm_head", 1024, (999,), False, torch.bfloat16, "cpu")
    linear.w_t.fill_(1)
    for top in (0, 1):
        head.Head(linear, options["norm"], top)(x, out[:999])
    for kernel, product in (
            (tensor_cores._tensor_core_kernel, "mma.sync"),
            (four_bits._four_bit_kernel, "mma.sync"),
            (head._rows_kernel, "fma.rn"), (head._bounds_kernel, "dp4a")):
        first, *_ = kernel.device_caches[DEVICE][0].values()
        before, _, after = first.asm["ptx"].partition("griddepcontrol.wait")
        assert "ld.global" in after and product in after, kernel
        if product == "mma.sync":
            assert "cp.async.cg" in before and "cp.async.commit_group" in before, kernel
            assert "ld.global" not in before, kernel
        else:
            assert before.count("ld.global") >= 4 and ".v4." in before, kernel
