"""Thousands of damaged checkpoints: each is refused in one sentence, or read exactly as it was.

Small real checkpoints of every form are damaged at random, from a fixed seed: cut off, bytes
turned, headers and settings rewritten with hostile values. No case may raise anything but the one
error meant for it, take 5 seconds or 1 GiB, or load numbers other than those in the file.

    pytest test_fuzz.py --fuzz 20000        more cases than in CI
"""


import collections
import json
import math
import random
import resource
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import generate
from calibrations.thresholds import CalibrationError
from checkpoint import CheckpointError, load
from checkpoint.config import parse_config
from checkpoint.conftest import CASES, ROPE, SMALL
from checkpoint.conftest_damage import DAMAGES, SHARES, edit_json, turn_weight_bytes
from checkpoint.conftest_victims import MAKERS, TEMPLATE, Victim, byte_level, numbers, refusal
from checkpoint.gguf_file import hf_name
from checkpoint.tensors import put
from checkpoint.tokenizer import Tokenizer, TokenizerError
from model import Linear, Model
from quantize import Int8Linear, int4_linear

MEMORY = 1 << 30


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    return {name: Victim(make, tmp_path_factory.mktemp("fuzz") / "m")
            for name, make in MAKERS.items()}


# ---- how a case must end -----------------------------------------------------------------------

def read_by_other_means(victim):
    """{Hugging Face name: tensor} as a damaged copy's bytes have it, its headers being sound."""
    tensors = {}
    for name, start in victim.headers.items():
        if name.endswith(".gguf"):
            reader = gguf.GGUFReader(victim.path)
            for tensor in reader.tensors:
                with np.errstate(invalid="ignore", over="ignore"):
                    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
                if heads and "llama.block_count" in reader.fields:
                    array = array.reshape(heads, 4, 2, -1).swapaxes(1, 2).reshape(array.shape)
                tensors[hf_name(tensor.name, "llama")] = torch.from_numpy(array.copy())
        else:
            data = bytearray((victim.folder / name).read_bytes())
            dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16,
                      "I8": torch.int8, "U8": torch.uint8}
            for tensor, entry in json.loads(data[8:start]).items():
                if tensor != "__metadata__":
                    begin, end = entry["data_offsets"]
                    part = torch.frombuffer(data[start + begin:start + end],
                                            dtype=dtypes[entry["dtype"]])
                    tensors[tensor] = part.view(entry["shape"])
    return tensors


def expected_numbers(victim):
    """What a copy with damaged weights must give: numbers, or None if weights are not finite."""
    tensors = read_by_other_means(victim)
    if victim.network is None:
        return [tensors["thresholds"], tensors["sparsities"]]
    for tensor in tensors.values():
        if tensor.dtype == torch.uint8:
            scale, minimum = tensor[..., 16:].contiguous().view(torch.bfloat16).float().unbind(-1)
            tensor = torch.stack((minimum, minimum + 15 * scale))
        if not tensor.float().isfinite().all():
            return None
    linear = Linear if victim.network.lm_head.scale is None else Int8Linear
    if any(tensor.dtype == torch.uint8 for tensor in tensors.values()):
        linear = int4_linear
    network = Model(victim.network.config, linear_class=linear)
    for name, tensor in tensors.items():
        put(network, name, tensor)
    return numbers(network)


@pytest.fixture
def bounded_memory():
    """An allocation of more than MEMORY beyond what is there fails."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints(damage, victims, bounded_memory, request):
    names, share = DAMAGES[damage]
    rng, ends = random.Random(damage.__name__), collections.Counter()
    for i in range(request.config.getoption("fuzz") * share // SHARES):
        victim = victims[names[i % len(names)]]
        changes = damage(victim, rng)
        victim.damage(changes)
        try:
            expected = expected_numbers(victim) if damage is turn_weight_bytes else victim.numbers
            kind = CheckpointError if victim.network else CalibrationError
            found, message = refusal(victim.read, kind)
            if found is None:
                assert str(victim.folder) in message, message
                if damage is turn_weight_bytes and victim.network:
                    assert expected is None, message
            else:
                assert expected is not None, "loaded weights that are infinite or NaN"
                assert len(found) == len(expected), "other numbers than the file's"
                assert all(map(torch.equal, found, expected)), "other numbers than the file's"
        except BaseException:
            (victim.folder.parent / "case").mkdir(exist_ok=True)
            print(f"case {i} of {damage.__name__} on {names[i % len(names)]}; its files are "
                  f"kept in {victim.folder.parent / 'case'}")
            shutil.copytree(victim.folder, victim.folder.parent / "case", dirs_exist_ok=True)
            raise
        finally:
            victim.repair(changes)
        ends["read" if message is None else "refused"] += 1
    print(f"{damage.__name__}: {dict(ends)}")


def test_configs_of_every_family(request):
    """A config.json with something hostile in it is read or refused, whatever the family."""
    rng, ends = random.Random("configs"), collections.Counter()
    for stem, changes, rope in CASES.values():
        config = SMALL | changes | {"model_type": stem.lower(), "rope_parameters": ROPE[rope]}
        parse_config(config)
        for _ in range(request.config.getoption("fuzz") // 50):
            try:
                parse_config(edit_json(config, rng), rng.choice([None, 5, 200]))
                ends["read"] += 1
            except ValueError:
                ends["refused"] += 1
    assert min(ends.values()) > 0
    print(f"configs: {dict(ends)}")


def test_chat_templates(request):
    """Damaged templates end in text or in one sentence, soon."""
    rng, ends = random.Random("templates"), collections.Counter()
    pieces = ["", "{", "}}", "{%", "\u0000", "\ud800", "|", "'", ".x", "()"]
    for _ in range(request.config.getoption("fuzz") // 400):
        at = rng.randrange(len(TEMPLATE))
        template = TEMPLATE[:at] + rng.choice(pieces) + TEMPLATE[at + rng.randrange(3):]
        tokenizer = Tokenizer(byte_level()[0], 320, {"bos_token": "<s>"}, [], template)
        said = [{"role": "user", "content": "{{ 7 * 7 }} <s>"}]
        _, message = refusal(lambda: tokenizer.chat(said), TokenizerError)
        assert message is None or "chat template" in message, message
        ends["rendered" if message is None else "refused"] += 1
    print(f"chat templates: {dict(ends)}")


def test_endless_tokenizer(victims, bounded_memory):
    """A regular expression that takes exponential time is given up."""
    victim = victims["folder"]
    content = json.loads(victim.files["tokenizer.json"])
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"},
                                "behavior": "Isolated", "invert": False}
    changes = {"tokenizer.json": json.dumps(content).encode()}
    victim.damage(changes)
    _, message = refusal(lambda: load(victim.path)[1].encode("a banana é " + "x" * 40),
                         CheckpointError, TokenizerError)
    victim.repair(changes)
    assert "tokenizer" in message


def test_large_gguf_header(victims, bounded_memory):
    """A header as long as any may be, full of empty strings."""
    file, key = victims["gguf"].path.with_name("large.gguf"), b"tokenizer.ggml.eos_token_id"
    data = victims["gguf"].files["m.gguf"].replace(
        key + struct.pack("<II", 4, 2), key + struct.pack("<IIQ", 9, 8, 4_000_000)
        + bytes(8 * 4_000_000))
    file.write_bytes(data)
    assert len(data) > 32_000_000 and refusal(lambda: load(file), CheckpointError)[1]
    file.unlink()


@pytest.mark.parametrize("case", ["config.json", "header", "index", "template", "NaN", "panic"])
def test_command(case, victims, run):
    """From the shell: exit code 2 and one sentence. Only Rust may say more, before it panics."""
    victim = victims["shards" if case == "index" else "gguf" if case == "NaN" else "folder"]
    tokenizer = json.loads(victims["folder"].files["tokenizer.json"])
    tokenizer["post_processor"]["special_tokens"] = {}
    changes = {
        "config.json": {"config.json": b'{"hidden_size": [[[['},
        "header": {"model.safetensors": victims["folder"].files["model.safetensors"][:99]},
        "index": {"model.safetensors.index.json": b'{"weight_map": {"x": "/etc/passwd"}}'},
        "template": {"chat_template.jinja": b"{{ ''.__class__.__mro__[1].__subclasses__() }}"},
        "NaN": {"m.gguf": victims["gguf"].files["m.gguf"][:-4] + struct.pack("<f", math.nan)},
        "panic": {"tokenizer.json": json.dumps(tokenizer).encode()}}[case]
    victim.damage(changes)
    done = run(generate.main, "--model", victim.path, "--prompt", "the", "--max-new-tokens", 3)
    victim.repair(changes)
    assert done.code == 2 and done.out == "", done.err
    *before, sentence = done.err.splitlines()
    assert sentence.startswith("generate.py: error: ") and done.err.endswith("\n")
    assert not before or case == "panic" and "Traceback" not in done.err
