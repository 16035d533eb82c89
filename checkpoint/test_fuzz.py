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
import struct
from pathlib import Path

import pytest
import torch

import generate
from checkpoint import CheckpointError, load
from checkpoint.config import parse_config
from checkpoint.conftest import CASES, ROPE, SMALL
from checkpoint.conftest_damage import DAMAGES, SHARES, edit_json, turn_weight_bytes
from checkpoint.conftest_victims import MAKERS, Victim, refusal
from checkpoint.tokenizer import TokenizerError

MEMORY = 1 << 30


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    return {name: Victim(name, tmp_path_factory.mktemp("fuzz") / "m") for name in MAKERS}


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
            found, message = refusal(victim.read, victim.error)
            if found is None:
                assert str(victim.folder) in message, message
            elif damage is turn_weight_bytes:
                assert all(tensor.isfinite().all() for tensor in found)
            else:
                assert all(map(torch.equal, found, victim.numbers)), "other numbers"
        except BaseException:
            print(f"case {i} of {damage.__name__} on {names[i % len(names)]}")
            raise
        finally:
            victim.repair(changes)
        ends["read" if message is None else "refused"] += 1
    print(f"{damage.__name__}: {dict(ends)}")
    assert damage is turn_weight_bytes or ends["refused"] > 0


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


@pytest.mark.parametrize("case", ["header", "template", "NaN", "panic"])
def test_command(case, victims, run):
    """From the shell: exit code 2 and one sentence. Only Rust may say more, before it panics."""
    victim = victims["gguf" if case == "NaN" else "folder"]
    tokenizer = json.loads(victims["folder"].files["tokenizer.json"])
    tokenizer["post_processor"]["special_tokens"] = {}
    changes = {
        "header": {"model.safetensors": victims["folder"].files["model.safetensors"][:99]},
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
