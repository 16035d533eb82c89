"""Tensor parallel: two processes give the logits and tokens of one.

On CPUs with gloo; on a machine with as many GPUs as processes, there with NCCL.
"""

import dataclasses
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import benchmark
import checkpoint
import generate
import tensor_parallel
from checkpoint.config import parse_config
from checkpoint.tensors import tensor_shapes
from cli import quantize_folder
from conftest import CONFIGS, HERE, Ended, start, write_llama
from session import Session

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with 8 query heads, 4 key heads and biases, whose text is bytes."""
    folder = write_llama(
        tmp_path_factory.mktemp("model"), hidden_size=64, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, eos_token_id=None,
        max_position_embeddings=128, attention_bias=True, initializer_range=0.2)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[-1].content }}"}')
    return folder


def results(folder, device, quantize=None):
    """Logits of the prompt, and 32 greedy ids and the sparsity reached, dense and sparse."""
    device = tensor_parallel.start(device)
    model, _ = checkpoint.load(folder, device=device, quantize=quantize,
                               ranks=tensor_parallel.ranks())
    with torch.inference_mode():
        logits = model.logits(model.forward(torch.tensor(PROMPT, device=device)))
    found = {"logits": logits.tolist(), "digest": model.digest}
    # No |x| of these texts is nearer than 1e-5 to 0.37, so that no rounding decides what is kept.
    for name, thresholds in (("dense", None), ("sparse", torch.full((3, 7), 0.37))):
        session = Session(model, thresholds)
        ids = list(session.generate(PROMPT, 32))
        found[name] = ids, tensor_parallel.mean(session.sparsity())
    return found


def main():
    """What one rank does: the first one writes the results."""
    folder, out, device, quantize = sys.argv[1:]
    found = results(Path(folder), device, quantize or None)
    if tensor_parallel.rank() == 0:
        Path(out).write_text(json.dumps(found))


def ranks(n, main, *words, stdin="/dev/null"):
    """Run a script's main() on n ranks, as torchrun would -> Ended, output and errors of all."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        port = listening.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        files = [(f"{folder}/out{i}", f"{folder}/err{i}") for i in range(n)]
        started = [start(main, *words, streams=[stdin, *files[i]], RANK=str(i),
                         LOCAL_RANK=str(i), WORLD_SIZE=str(n), MASTER_ADDR="localhost",
                         MASTER_PORT=str(port)) for i in range(n)]
        deadline = time.monotonic() + 120
        while any(process.is_alive() for process in started) and time.monotonic() < deadline:
            if any(process.exitcode for process in started):
                break
            time.sleep(0.02)
        for process in started:  # as torchrun does once one has failed
            process.terminate()
            process.join()
        out, err = ("".join(Path(file).read_text() for file in kind) for kind in zip(*files))
        return Ended(next((p.exitcode for p in started if p.exitcode), 0), out, err)


@pytest.mark.parametrize("kind", ["float32", "int8", "an int4 folder"])
def test_ranks_give_what_one_process_gives(kind, folder, tmp_path):
    out, device = tmp_path / "out.json", "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    quantize, exact = "int8" if kind == "int8" else "", kind == "float32"
    if kind == "an int4 folder":  # its heads are wide enough for two ranks to share its groups
        config = json.loads((folder / "config.json").read_text()) | {
            "head_dim": 16, "intermediate_size": 128}
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(shape, generator=generator) * 0.2
                   for name, shape in tensor_shapes(parse_config(config)).items()}
        source = shutil.copytree(folder, tmp_path / "source")
        (source / "config.json").write_text(json.dumps(config))
        save_file(tensors, source / "model.safetensors")
        folder, device = tmp_path / "int4", "cpu"
        quantize_folder.write_folder(checkpoint.open_checkpoint(source), folder, "int4")
        with pytest.raises(ValueError, match="4 ranks cannot share tensor .*q_proj.weight: int4 is "
                           "cut at multiples of 32 columns"):  # four would have 16 of k each
            checkpoint.load(folder, ranks=tensor_parallel.Ranks(0, 4))
    done = ranks(2, main, folder, out, device, quantize)
    assert done.code == 0 and "Exception" not in done.err, done.err
    ours, expected = json.loads(out.read_text()), results(folder, device, quantize or None)
    # int8 rounds o and down by their slices, which have scales of their own
    off = torch.tensor(ours["logits"]) - torch.tensor(expected["logits"])
    assert off.norm() <= (1e-5 if exact else 0.02) * torch.tensor(expected["logits"]).norm()
    if exact:
        assert ours["dense"][0] == expected["dense"][0]
        assert ours["sparse"][0] == expected["sparse"][0]
    assert ours["digest"] == expected["digest"]  # one calibration serves both
    assert ours["dense"][1] == 0
    tolerance = 1e-3 if exact else 0.02
    assert ours["sparse"][1] == pytest.approx(expected["sparse"][1], abs=tolerance)
    assert 0.05 < ours["sparse"][1] < 0.95


def test_generate_prints_once(run, folder, tmp_path):
    """And its numbers are those of both ranks, which is said: only the LM head is read twice."""
    words = ["--model", folder, "--raw", "--prompt", "-", "--dtype", "float32", "--device", "cpu",
             "--max-new-tokens", 20, "--temperature", 0.8]
    (tmp_path / "in").write_text("abc")
    two = ranks(2, generate.main, *words, stdin=tmp_path / "in")
    seed = re.search(r"\| seed (\d+)", two.err)[1]  # the first rank's, for all
    one = run(generate.main, *words, "--seed", seed, stdin="abc")
    assert one.code == two.code == 0 and two.out == one.out.replace("\r", "\n")  # as a file has it
    assert two.err.count("new 20 tokens") == 1 and "Exception" not in two.err
    read = [float(re.search(r"([\d.]+) MB read per token" + ranks, text)[1])
            for text, ranks in ((one.err, r"\n"), (two.err, " by 2 ranks"))]
    assert read[1] == pytest.approx(read[0] + 64 * 256 * 4 / 1e6, abs=0.1)


def quick_speeds(*arguments, decode_speeds=benchmark.decode_speeds):
    return decode_speeds(*arguments[:4], n_tokens=32, runs=1)


def quick_benchmark():
    """benchmark.py, which need not know this machine; in a process of its own."""
    benchmark.read_bandwidth, benchmark.decode_speeds = lambda device: 1e9, quick_speeds
    benchmark.main()


def test_benchmark_counts_a_rank(run, folder, monkeypatch):
    """The bytes of one of two ranks: half of the blocks and the cache; the whole LM head, norms,
    biases of o and embedding row."""
    words = ["--model", folder, "--device", "cpu", "--sparsity", 0, 0.5, "--context", 70, "--dtype",
             "float32", "--json"]
    monkeypatch.setattr(benchmark, "read_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(benchmark, "decode_speeds", quick_speeds)
    one = run(benchmark.main, *words, folder / "1.json")
    two = ranks(2, quick_benchmark, *words, folder / "2.json")
    assert one.code == two.code == 0, two.err
    assert "2 ranks, bytes and limit of each" in two.out and "us per layer" in two.out
    rows = [json.loads((folder / f"{n}.json").read_text()) for n in (1, 2)]
    whole = (64 * 256 + (7 + 3 + 1) * 64) * 4
    one, two = (row[0]["bytes_per_token"] for row in rows)
    assert two == pytest.approx((one - whole) / 2 + whole)
    assert rows[1][1]["realised_sparsity"] == pytest.approx(0.5, abs=0.1)


def test_slices_of_four():
    third, every = tensor_parallel.Ranks(2, 4), slice(None)
    for name, slices in (("mlp.up_proj", (slice(48, 72), every)), ("self_attn.o_proj", (
            every, slice(32, 48))), ("input_layernorm", (every, every))):
        assert third.cut(f"model.layers.0.{name}.weight", (96, 64)) == slices


@pytest.mark.parametrize("change, n, message", [
    ({"qk_norm": "all"}, 2, "norms over all heads or after the block"),
    ({"norms_after": True}, 2, "norms over all heads or after the block"),
    ({}, 4, "4 ranks cannot share the model's 2 n_kv_heads; start a number of processes that")])
def test_models_that_ranks_cannot_share(change, n, message):
    config = dataclasses.replace(CONFIGS["llama"], **change)
    with pytest.raises(ValueError, match=message):
        tensor_parallel.Ranks(0, n).slim(config)


def test_ranks_cannot_calibrate(folder, tmp_path, monkeypatch):
    """Which one of them says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = ranks(2, generate.main, "--model", folder, "--raw", "--prompt", "x", "--device", "cpu",
                 "--sparsity", 0.5)
    assert done.code == 2 and done.err.count(
        "error: the calibration of a new model takes one process; run it without torchrun") == 1


def test_torchrun_ends_all_when_one_dies(folder):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "generate.py", "--model", folder, "--chat", "--device", "cpu",
             "--max-new-tokens", "5"]
    ranks = subprocess.Popen(words, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        ranks.stdin.write(b"Hello\n")
        ranks.stdin.flush()
        assert select.select([ranks.stdout], [], [], 120)[0]  # the answer has begun
        listed = subprocess.run(["ps", "--ppid", str(ranks.pid), "-o", "pid="],
                                capture_output=True, text=True).stdout.split()
        os.kill(int(listed[1]), signal.SIGKILL)
        start = time.time()
        assert ranks.wait(30) != 0 and time.time() - start < 10
    finally:
        ranks.kill()
