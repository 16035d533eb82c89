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
from gpu.token_kernels import likeliest_on_gpu
from model import Config, KVCache, Linear
from quantize import Int4Linear

pytestmark = pytest.mark.skipif(
    sparse_gemv.INTERPRETED, reason="the interpreter compiles nothing")
MODULES = (sparse_gemv, lists, one_kernel, tensor_cores, four_bits, decode_attention, head,
           token_kernels)
KERNELS = {kernel for module in MODULES for name, kernel in vars(module).items()
           if name.startswith("_") and name.endswith("_kernel")}
DEVICE, OTHER_DEVICE = 990, 991  # numbers that no real GPU has


@triton.jit
def _copy_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def _broken_kernel(x_ptr, SIZE: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, SIZE + 1), 0)  # not a power of two


@pytest.fixture
def driver(monkeypatch, tmp_path, any_head):
    """A driver of two Hopper GPUs that loads and launches by noting it. Nothing is compiled yet."""
    thread, notes = threading.local(), types.SimpleNamespace(loaded=[], launched=[])

    class Driver:
        def get_current_device(self):
            return getattr(thread, "device", DEVICE)

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def launcher_cls(self, src, metadata):
            return lambda *arguments: notes.launched.append(src.fn)

        class utils:
            @staticmethod
            def get_device_properties(device):
                return {"max_shared_mem": 232448}

            @staticmethod
            def load_binary(name, code, shared, device):
                notes.loaded.append((name, device))
                return "module", "function", 32, 0, 1024

    @contextlib.contextmanager
    def device_of(tensor):
        before, thread.device = Driver().get_current_device(), tensor.gpu
        yield
        thread.device = before

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch.Tensor, "gpu", DEVICE, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = {_copy_kernel, _broken_kernel} | KERNELS
    for kernel in kernels:
        monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(
            kernel.create_binder))
    for module in (*MODULES, sys.modules["gpu.decoder"]):
        if hasattr(module, "launch_options"):
            monkeypatch.setattr(module, "launch_options",
                                lambda device: {"PDL": True, "launch_pdl": True})
        if hasattr(module, "INTERPRETED"):
            monkeypatch.setattr(module, "INTERPRETED", True)  # take the kernels' way on a CPU
    yield notes
    for kernel in kernels:
        for compiled, *_ in kernel.device_caches.values():
            for one in compiled.values():
                one.module = None  # there is nothing to unload


def copy(x):
    with torch.cuda.device_of(x):
        _copy_kernel[(1,)](x, torch.empty_like(x), SIZE=16)


def test_missing_kernels_are_compiled_and_loaded_and_none_is_launched(driver):
    """For the GPU of the tensor."""
    x, half = torch.zeros(16), torch.zeros(16, dtype=torch.float16)
    compile_together(lambda: copy(x), x)
    assert len(driver.loaded) == 1 and not driver.launched

    def run():
        for _ in range(3):
            copy(x), copy(half)  # the first is compiled, the second is not

    compile_together(run, x)
    assert len(driver.loaded) == 2 and not driver.launched
    triton.knobs.runtime.jit_cache_hook = lambda **_: pytest.fail("compiled once more")
    try:
        run()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
    assert driver.launched == [_copy_kernel] * 6 and len(driver.loaded) == 2
    x.gpu = OTHER_DEVICE
    compile_together(lambda: copy(x), x)
    assert driver.loaded[2:] == [("_copy_kernel", OTHER_DEVICE)]
    assert _copy_kernel.device_caches.keys() == {DEVICE, OTHER_DEVICE}


def test_they_are_compiled_at_the_same_time(driver, monkeypatch):
    """Each waits until both have begun. The garbage collector waits for both."""
    begun, preload = threading.Barrier(2, timeout=60), triton.JITFunction.preload

    def watched(kernel, variant):
        begun.wait()
        assert not gc.isenabled()
        return preload(kernel, variant)

    monkeypatch.setattr(triton.JITFunction, "preload", watched)
    x = torch.zeros(16)
    compile_together(lambda: (copy(x), copy(x.long())), x)
    assert len(driver.loaded) == 2


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
        compile_together(lambda: (copy(x), _broken_kernel[(1,)](x, SIZE=16)), x)
    assert not driver.launched
    assert gc.isenabled() and triton.knobs.runtime.jit_cache_hook is hook
    assert triton.JITFunction.run is launch


def int4_linear(layer, *arguments):
    """The LM head is never of 4 bits."""
    return (Linear if layer is None else Int4Linear)(layer, *arguments)


def make_decoder(n_layers=2, linear=Linear, sparse=False):
    config = Config(96, 64, 96, n_layers, 4, 2, 16, context=160, tie_embeddings=False)
    model = random_model(config, linear, "cpu")
    decoder = GpuDecoder(model, KVCache(config, 160), likeliest_on_gpu, top=int(sparse))
    decoder.sparse = sparse
    return decoder


@pytest.mark.parametrize("linear, sparse, n_launches, products", [
    (Linear, False, 4, {"_every_row_kernel"}),
    (Linear, True, 6, {"_fused_select_kernel", "_fused_sum_kernel", "_kept_rows_kernel"}),
    (int4_linear, True, 8, {"_fused_select_kernel", "_four_bit_kernel"})])
def test_a_steps_kernels_are_complete(driver, linear, sparse, n_launches, products):
    """What is compiled ahead is exactly what a step then finds; the step's state stays. The dense
    step reads the whole LM head."""
    decoder = make_decoder(2, linear, sparse)
    decoder.position.fill_(7)
    compile_together(decoder.step, decoder.x)
    assert decoder.position.item() == 7 and decoder.kept.sum() == 0 and not driver.launched
    loaded = [name for name, _ in driver.loaded]
    assert set(loaded) == products | {"_bounds_kernel"} & {"_bounds_kernel" * sparse} | {
        "_embed_kernel", "_decode_attention_kernel", "_rows_kernel", "_likeliest_kernel"}
    decoder.step()
    assert len(driver.loaded) == len(loaded)  # a step compiles nothing
    # embedding, head, choice; layers
    assert len(driver.launched) == 3 + sparse + 2 * (n_launches + 1)


@pytest.mark.parametrize("linear", [Linear, int4_linear])
@pytest.mark.parametrize("sparse", [False, True])
def test_more_layers_need_no_more_kernels(driver, monkeypatch, linear, sparse):
    """Though their thresholds and counters lie at other places of a table."""
    def note(kernel, variant):
        found.append(kernel.__name__)
        return types.SimpleNamespace(run=None)

    monkeypatch.setattr(triton.JITFunction, "preload", note)
    counts = []
    for n_layers in (1, 5):
        found, decoder = [], make_decoder(n_layers, linear, sparse)
        compile_together(decoder.step, decoder.x)
        counts.append(sorted(found))
    assert counts[0] == counts[1] and ("_fused_select_kernel" in found) == sparse


def test_weights_are_loaded_before_x(driver):
    """Compiled for a Hopper GPU, a dense product and the LM head have their first weights on their
    way, 16 bytes at once, when they wait for the kernel before; what depends on it comes after."""
    x, norm, logits = torch.ones(3, 4096).bfloat16()
    w_t, scale = torch.zeros(4096, 4096).bfloat16(), torch.zeros(4096, 128, 2).bfloat16()
    options = {"norm": (norm, 1e-5), "residual": logits}
    tensor_cores.product_on_tensor_cores(x, w_t, logits, **options)
    four_bits.product_of_four_bits(x, w_t.view(torch.uint8)[:, :2048].contiguous(), None, logits,
                                   scale=scale, **options)
    linear = Linear(None, "lm_head", 2048, (999,), False, torch.bfloat16, "cpu")
    linear.w_t.fill_(1)
    for top in (0, 1):
        head.Head(linear, (norm[:2048], 1e-5), top)(x[:2048], logits[:999])
    for kernel, product in (
            (tensor_cores._tensor_core_kernel, "mma.sync"),
            (four_bits._four_bit_kernel, "mma.sync"),
            (head._rows_kernel, "fma.rn"), (head._bounds_kernel, "dp4a")):
        (variants, *_), = kernel.device_caches.values()
        before, _, after = next(iter(variants.values())).asm["ptx"].partition(
            "griddepcontrol.wait")
        assert "ld.global" in after and product in after, kernel
        if product == "mma.sync":
            assert "cp.async.cg" in before and "cp.async.commit_group" in before, kernel
            assert "ld.global" not in before, kernel
        else:
            assert before.count("ld.global") >= 4 and ".v4." in before, kernel
