"""Tests of int8 weights (the rounding, products with them) and of the folders of quantize.py, int8
and int4. All on tiny random models and the CPU."""

import json
import math
import os
import resource
import shutil
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import calibrate
import checkpoint
import quantize
from checkpoint.config import parse_config
from checkpoint.conftest import CONFIG, strings, weights, write_folder, write_gguf
from checkpoint.tensors import is_quantized, tensor_shapes
from cli import quantize_folder
from cli.command_line import load_model
from generate import generate_tokens
from model import PROJECTIONS, Linear, dense, masked
from quantize import Int4Linear, Int8Linear, quantize_tensor

torch.set_num_threads(1)  # tiny products: a second thread would only wait


@pytest.fixture(params=[False, True], ids=["own head", "tied"])
def source(request, tmp_path):
    """A checkpoint folder of random weights."""
    config = CONFIG | {"tie_word_embeddings": request.param, "eos_token_id": 2}
    tensors = {name: tensor.bfloat16() * 0.2 for name, tensor in weights(config).items()}
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return write_folder(tmp_path / "source", config, tensors, tokenizer_config={
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template},
        generation_config={"eos_token_id": [2, 5], "temperature": 0.3, "top_k": 9})


@pytest.fixture
def quantized(run):
    """A function that runs quantize.py's command line -> (exit code, stderr)."""
    return lambda *words: run(quantize_folder.main, *words)[::2]


@pytest.fixture
def folder(tmp_path):
    """A function that writes a folder with "int8" or "int4" weights -> its path."""
    def folder(kind, source=None):
        opened = checkpoint.open_checkpoint(source or write_folder(tmp_path / "source"))
        quantize_folder.write_folder(opened, tmp_path / kind, kind)
        return tmp_path / kind
    return folder


# ---- the arithmetic ----------------------------------------------------------------------------

@pytest.mark.parametrize("n, k, dtype", [
    (1, 1, torch.float64), (7, 33, torch.float16), (50, 4096, torch.bfloat16),
    (3, quantize.PIECE + 1, torch.float32)])
def test_rounding_is_off_by_half_a_step_at_most(n, k, dtype):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)
    q, scale = quantize_tensor(weight)
    assert q.dtype == torch.int8 and q.shape == (n, k)
    assert scale.dtype == torch.float32 and scale.shape == (n,)
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    # The float32 division is off by some 1e-5 of a step.
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()
    assert (q.abs().amax(1) == 127).all()


def test_rows_of_zeros_tiny_and_huge_numbers():
    row = torch.linspace(-1, 1, 255, dtype=torch.float64)
    for size in (0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1.0, 1e30, 3.4e38):
        weight = (row * size).float()[None]
        q, scale = quantize_tensor(weight)
        assert scale.isfinite().all() and scale > 0
        error = (q.double() * scale - weight.double()).abs()
        assert (error <= scale.double() * (0.5 + 1e-5)).all()
        if size > 1e-35:
            assert torch.equal(q, torch.arange(-127, 128)[None]), size
    q, _ = quantize_tensor(torch.stack((torch.zeros(5), torch.ones(5))))
    assert q.tolist() == [[0] * 5, [127] * 5]


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, quantized, tmp_path):
    tensors = weights()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    folder = write_folder(tmp_path / "source", tensors=tensors)
    for kind in ("int8", "int4"):
        with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight"):
            checkpoint.load(folder, quantize=kind)
        code, error = quantized("--model", folder, "--out", tmp_path / "out", "--quantize", kind)
        assert code == 2 and error.count("\n") == 1
        assert "model.layers.1.mlp.up_proj.weight" in error
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---- products ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dense_products_in_pieces(dtype, tolerance, monkeypatch):
    torch.manual_seed(0)
    linear = Int8Linear(0, "qkv", 64, (96, 32, 32), True, dtype, "cpu")
    parts = [torch.randn(width, 64) for width in linear.widths]
    for i, part in enumerate(parts):
        linear.load_weight(i, part)
        linear.load_bias(i, torch.randn(len(part)))
    x = torch.randn(20, 64).to(dtype)
    wanted = torch.cat([q * scale[:, None] for q, scale in map(quantize_tensor, parts)])
    torch.testing.assert_close(
        linear.weight(96, 160), wanted.T[:, 96:].to(dtype), rtol=1e-6, atol=0)
    wanted = x.double() @ wanted.T.double() + linear.bias.double()
    close = {"rtol": tolerance, "atol": tolerance * 10}
    for piece in (1 << 24, 1, 64 * 50):
        monkeypatch.setattr(quantize, "FLOATS", piece)
        monkeypatch.setattr(quantize, "PIECE", piece)
        torch.testing.assert_close(dense(x, linear).double(), wanted, **close)
    torch.testing.assert_close(masked(x, linear, [-1.0] * 3).double(), wanted, **close)


def test_dense_products_whose_integers_sum_up_beyond_float16():
    linear = Int8Linear(0, "o", 64, (32,), False, torch.float16, "cpu")
    linear.load_weight(0, torch.full((32, 64), 0.1))
    y = dense(torch.full((3, 64), 100.0, dtype=torch.float16), linear)  # 64 * 100 * 127 unscaled
    torch.testing.assert_close(y, torch.full((3, 32), 640.0, dtype=torch.float16))


# ---- models and folders ------------------------------------------------------------------------

def test_the_int8_model_is_a_model_with_rounded_weights(source):
    model, _ = checkpoint.load(source, quantize="int8")
    assert all(isinstance(linear, Int8Linear) for linear in model.linears())
    assert model.lm_head.w_t.dtype == torch.int8 and model.embedding.dtype == torch.float32
    plain, _ = checkpoint.load(source)
    plain.embedding = model.embedding
    for ours, theirs in zip([*plain.linears(), plain.lm_head], [*model.linears(), model.lm_head]):
        ours.w_t = theirs.weight(0, theirs.ends[-1])
    tokens = torch.randint(320, (32,), generator=torch.Generator().manual_seed(0))
    logits, expected = (m.logits(m.forward(tokens)) for m in (model, plain))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    ours, expected = (calibrate.calibrate(m, tokens.repeat(2), 32, "fisher").thresholds(0.5)
                      for m in (model, plain))
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    for thresholds in (None, ours):
        ids, expected = (list(generate_tokens(m, tokens[:8].tolist(), 24, thresholds=thresholds))
                         for m in (model, plain))
        assert ids == expected


def same_tensors(ours, theirs):
    """Assert that two models, blocks or matrices hold the same tensors under the same names."""
    assert type(ours) is type(theirs) and vars(ours).keys() == vars(theirs).keys()
    for name, value in vars(ours).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, vars(theirs)[name]), name
        elif isinstance(value, Linear):
            same_tensors(value, vars(theirs)[name])


@pytest.mark.parametrize("kind, holds, dtype", [
    ("int8", {Int8Linear}, torch.bfloat16), ("int4", {Int8Linear, Int4Linear}, torch.float32)])
def test_a_folder_is_the_same_model_as_quantizing_while_loading(
        source, folder, kind, holds, dtype, tmp_path, monkeypatch):
    """Its files hold what the config promises, and nothing twice."""
    monkeypatch.setattr(quantize_folder, "SHARD", 1)  # bytes: a file for each tensor
    opened = checkpoint.open_checkpoint(source)
    written = checkpoint.open_checkpoint(folder(kind, source))
    files = [load_file(file) for file in written.folder.glob("*.safetensors")]
    held = {name: tensor for tensors in files for name, tensor in tensors.items()}
    assert all(files) and sum(map(len, files)) == len(held) and len(files) > 10
    config = parse_config(json.loads((written.folder / "config.json").read_text()))
    shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert shapes == written.shapes == tensor_shapes(config, kind)
    before = load_file(source / "model.safetensors")
    for name, tensor in before.items():
        wanted = torch.uint8 if held[name].ndim == 3 else torch.int8
        assert held[name].dtype == (wanted if is_quantized(name) else tensor.dtype)
    # Of two layers, q, k and v stay int8, for k and v have 16 columns.
    assert sum(t.dtype == torch.uint8 for t in held.values()) == (kind == "int4") * 2 * 4
    n_quantized = sum(is_quantized(name) for name in before)
    assert n_quantized == 2 * len(PROJECTIONS) + (not config.tie_embeddings)
    assert len({(written.folder / name).stat().st_mode
                for name in ("config.json", "model-00001.safetensors")}) == 1
    assert sorted(os.listdir(tmp_path)) == [kind, "source"]
    assert written.quantized == kind and written.config == opened.config
    assert written.folder == tmp_path / kind and opened.folder == source
    assert not (written.few_bits or opened.few_bits)  # that is for GGUF files

    model, tokenizer = checkpoint.load(written, dtype=dtype)
    wanted, theirs = checkpoint.load(source, dtype=dtype, quantize=kind)
    assert {type(linear) for linear in model.linears()} == holds
    for ours, other in zip((model, *model.blocks), (wanted, *wanted.blocks)):
        same_tensors(ours, other)
    ours, expected = (list(generate_tokens(m, [1, 50, 60], 32)) for m in (model, wanted))
    assert ours == expected
    assert tokenizer.eos_ids == theirs.eos_ids == {2, 5} and tokenizer.special == theirs.special
    assert tokenizer.sampling == theirs.sampling == {"temperature": 0.3, "top_k": 9}
    messages = [{"role": "user", "content": "the"}]
    assert tokenizer.chat(messages) == theirs.chat(messages)
    assert all(tokenizer.encode(text) == theirs.encode(text) for text in strings(50))


def test_a_gguf_file_becomes_a_folder(quantized, tmp_path):
    write_gguf(tmp_path / "m.gguf")
    out = tmp_path / "new" / "out"
    assert quantized("--model", tmp_path / "m.gguf", "--out", out) == (0, "")
    model, tokenizer = checkpoint.load(out)
    wanted, theirs = checkpoint.load(tmp_path / "m.gguf", quantize="int8")
    same_tensors(model.lm_head, wanted.lm_head)
    same_tensors(model.blocks[1], wanted.blocks[1])
    assert all(tokenizer.encode(text) == theirs.encode(text) for text in strings(50))
    assert tokenizer.eos_ids == theirs.eos_ids


def test_what_is_no_new_folder_is_refused(quantized, folder, tmp_path):
    int8 = folder("int8")
    (tmp_path / "empty").mkdir()
    before = sorted(os.listdir(tmp_path))
    code, error = quantized("--model", int8, "--out", tmp_path / "twice")
    assert code == 2 and "quantized already" in error and sorted(os.listdir(tmp_path)) == before
    assert quantized("--model", tmp_path / "source", "--out", tmp_path / "empty") == (0, "")
    checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize("size", [0, 30 << 10])
def test_a_full_disk(folder, tmp_path, size):
    """No file can grow beyond: config.json fails, or the weights do."""
    source, before = write_folder(tmp_path / "source"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(ValueError, match="cannot write"):
            folder("int8", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["source"]


def test_damaged_folders_are_refused(folder):
    out, name = folder("int8"), "model.layers.1.mlp.up_proj.weight"
    source = out.parent / "source"
    # floats under the int8 config
    shutil.copy(source / "model.safetensors", out / "model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="stored as F32, though"):
        checkpoint.open_checkpoint(out)
    # int8 under a plain config
    shutil.copy(out / "model-00001.safetensors", source / "model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="does not say whose"):
        checkpoint.open_checkpoint(source)
    out = folder("int4")
    sound = load_file(out / "model-00001.safetensors")

    def refused(tensor, words):
        save_file(sound | {name: tensor}, out / "model-00001.safetensors")
        with pytest.raises(checkpoint.CheckpointError, match=f"{name} {words}"):
            checkpoint.load(out, dtype=torch.float16)

    for scale, minimum, words in ((0.5, math.nan, "nan"), (math.inf, 0.0, "[-0-9.]+ to inf"),
                                  (3e37, 3e38, "[-0-9.]+ to inf"),
                                  (4500, 0.0, "[-0-9.]+ to 67680")):  # 15 of it are too many
        groups = sound[name].clone()
        groups[1, 7, 16:] = torch.tensor([scale, minimum]).bfloat16().view(torch.uint8)
        refused(groups, f"holds weights from {words}")
    refused(sound[name].view(torch.int8), "is stored as I8, .* U8")
    refused(torch.zeros(64, 32, dtype=torch.int8), "has shape .64, 32.; the config")


@pytest.mark.parametrize("kind, version", [("int8", 2), ("int4", [1])])
def test_a_folder_of_another_version_is_refused(kind, version, folder):
    out = folder(kind)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": f"nanoteal-{kind}", "version": 1}
    config["quantization_config"]["version"] = version
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(checkpoint.CheckpointError) as raised:
        checkpoint.load(out)
    assert str(raised.value) == (
        f"{out}/config.json cannot be read: it names version {version} of the format nanoteal-"
        f"{kind}, and this program reads version 1; write the folder anew with quantize.py")
    del config["quantization_config"]["version"]  # as folders were before there was a number
    (out / "config.json").write_text(json.dumps(config))
    checkpoint.load(out)


def test_a_folder_cannot_become_something_else(folder):
    for kind, other in (("int4", "int8"), ("int8", "int4")):
        out = folder(kind)
        checkpoint.load(out, quantize=kind)
        with pytest.raises(checkpoint.CheckpointError, match=f"cannot become {other}; leave out"):
            checkpoint.load(out, quantize=other)
    for options in ({"quantize": "int3"}, {"dtype": "float32"}, {"dtype": torch.int8}):
        with pytest.raises(ValueError, match="expected None or int8|expected torch.float32 or"):
            checkpoint.load(out.parent / "source", **options)


def test_what_int4_does_not_cover_is_said(quantized, tmp_path, capfd):
    """By quantize.py, and by whoever loads: a line each."""
    folder = write_folder(tmp_path / "source")
    left = "q, k, v are int8: int4 needs columns in multiples of 32\n"
    words = "--model", folder, "--out", tmp_path / "out", "--quantize", "int4"
    assert quantized(*words) == (0, left)
    for model, kind, wanted in ((folder, "int4", left), (folder, "int8", ""),
                                (tmp_path / "out", None, left)):
        load_model(Namespace(model=model, dtype="float32", device="cpu", quantize=kind))
        assert capfd.readouterr().err == wanted
