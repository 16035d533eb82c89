"""Tests of digest.py: a model is known by its weights, and by nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
from benchmark import random_model
from checkpoint.digest import Digest, weights_digest
from conftest import CONFIG, tiny_model
from model import Config


@pytest.fixture
def save(tiny, tmp_path):
    """A function of changes {tensor name: function} and a dtype -> a changed copy's folder."""
    def save(name, changes, dtype=torch.float32):
        folder = shutil.copytree(tiny, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        for tensor_name, change in changes.items():
            tensors[tensor_name] = change(tensors[tensor_name]).contiguous()
        save_file({n: t.to(dtype) for n, t in tensors.items()}, folder / "model.safetensors")
        return folder
    return save


def test_dtype_quantize_and_place_do_not_matter(tiny, save):
    expected = checkpoint.load(tiny)[0].digest
    assert len(expected) == 16 and int(expected, 16)
    for options in ({"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"quantize": "int8"},
                    {"context": 9}):
        assert weights_digest(checkpoint.load(tiny, **options)[0]) == expected
    copy = save("copy", {})
    model = checkpoint.load(copy)[0]
    assert model.digest == expected and model.folder == copy
    assert checkpoint.load(save("bfloat16", {}, torch.bfloat16))[0].digest == expected
    config = json.loads((copy / "config.json").read_text()) | {"max_position_embeddings": 99}
    (copy / "config.json").write_text(json.dumps(config))
    assert checkpoint.load(copy)[0].digest == expected


def test_every_tensor_matters(tiny, save):
    """A low-rank change of one matrix, a norm, the head: each makes another model."""
    def low_rank(w):
        generator = torch.Generator().manual_seed(0)
        b, a = (torch.randn(n, 1, generator=generator) for n in w.shape)
        return w + 0.05 * b @ a.T

    digests = {checkpoint.load(tiny)[0].digest}
    names = checkpoint.open_checkpoint(tiny).shapes
    for i, name in enumerate(names):
        change = (lambda w: w * 2) if "norm" in name else low_rank
        digests.add(checkpoint.load(save(str(i), {name: change}))[0].digest)
    assert len(digests) == 1 + len(names)


def test_a_model_made_by_hand_is_known_by_what_it_holds():
    one, same, other = (weights_digest(tiny_model(seed)) for seed in (0, 0, 1))
    assert one == same != other
    model = random_model(CONFIG, torch.float32, "cpu", None)
    seen = [weights_digest(model)]
    for tensor in (model.norm, *(matrix.w_t for matrix in model.linears())):
        tensor.add_(1)
        seen.append(weights_digest(model))
    assert len(set(seen)) == 10
    digests = set()  # names and shapes matter
    for name, shape in (("a", (2, 6)), ("b", (2, 6)), ("a", (3, 4))):
        digest = Digest()
        digest.add(name, torch.arange(12.0).view(shape))
        digests.add(digest.hexdigest())
    assert len(digests) == 3


def test_a_large_tensor_is_sampled_all_over():
    """Of a tensor with more than 4,096 numbers, every column and the last rows count."""
    model = random_model(Config(300, 256, 320, 1, 4, 2, 64), torch.float32, "cpu", None)
    before = weights_digest(model)
    w_t = model.blocks[0].down.w_t  # [320, 256]
    columns = [w_t[:, i] for i in (*range(8), 100, 255)]
    for part in (w_t[:64], w_t[-64:], *columns):
        sound = w_t.clone()
        part.add_(1)
        assert weights_digest(model) != before
        w_t.copy_(sound)
