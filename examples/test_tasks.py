"""Tests of tasks.py and many_texts.py: offline, without their packages of problems."""

import types

import pytest
import torch

from conftest import random_model, tiny_model
from decode import decode_one_token
from examples.many_texts import read, write
from examples.tasks import Problem, interval, is_right, mcnemar, passes_tests, solve
from model import Config, KVCache

PROBLEM = {"prompt": "from typing import List\n\ndef f(x: int) -> int:\n    '''Return x + 1.'''\n",
           "test": "def check(f):\n    assert f(1) == 2\n", "entry_point": "f"}
RIGHT = "def f(x: int) -> int:\n    return x + 1\n"


@pytest.mark.parametrize("answer, passes", [
    (RIGHT, True),
    ("def f(x):\n    return x\n", False),
    ("def f(x) return", False),
    ("import os\nos._exit(0)\n", False),  # a good exit code before the tests
    (RIGHT + "bytearray(8 << 30)\n", False),  # more memory than it may have
    (RIGHT + "print('x' * (2 << 20), flush=True)\n", False),  # larger output than it may write
    (RIGHT + "import sys\nprint(sys.stdin.read())\n", True)])  # standard input is empty
def test_programs(answer, passes):
    assert passes_tests(PROBLEM, answer) == passes


def test_a_program_may_not_run_for_ever(monkeypatch):
    monkeypatch.setattr("examples.tasks.SECONDS", 1)
    assert not passes_tests(PROBLEM, RIGHT + "import time\ntime.sleep(60)\n")


@pytest.mark.parametrize("answer, right", [
    (r"So \boxed{57}.", True), (r"\boxed{3} or \boxed{57.0}", True), (r"\boxed{\$57}", True),
    (r"\boxed{57 \text{ pens}}", True), ("57", False), (r"\boxed{}", False),
    (r"\boxed{58}", False), (r"\boxed{-57}", False)])
def test_numbers(answer, right):
    assert is_right(57, answer) == right


def test_mcnemar():
    assert mcnemar("1100", "1100") == (0, 0, 1)
    assert mcnemar("11111111", "00000000") == (8, 0, 2 / 2**8)
    assert mcnemar("110", "011") == (1, 1, 1)
    assert interval([True] * 8 + [False] * 2) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_problems_are_solved_in_parts(monkeypatch):
    """Three, two at a time: the answers of each alone, the sparsity of all."""
    monkeypatch.setattr("examples.tasks.N_TOKENS", 6)
    model, tables = tiny_model(), [None, torch.full((2, 7), 0.1)]
    tokenizer = types.SimpleNamespace(
        eos_ids=(), chat=lambda messages: [ord(c) % 64 for c in messages[0]["content"]],
        encode=lambda text, bos: [len(text)], decode=lambda ids: "".join(chr(64 + i) for i in ids))
    problems = [Problem(question, "ab", "", lambda answer: answer > "`") for question in "xyz"]
    right, unread = solve(model, tokenizer, problems, tables, 2)
    for table, found, reached in zip(tables, right, unread):
        alone = [write(model, read(model, [[ord(c) % 64, 2]], 6), table, 6, (), None)
                 for c in "xyz"]
        assert found == [tokenizer.decode(ids) > "`" for (ids,), _ in alone]
        assert reached == pytest.approx(sum(share for _, share in alone) / 3)


@pytest.mark.parametrize("kind", [
    {}, {"qk_norm": "head", "sliding_window": 8}, {"norms_after": True, "qkv_bias": True}])
@pytest.mark.parametrize("sparse", [False, True])
def test_many_texts_are_written_as_each_alone(kind, sparse):
    config = Config(vocab_size=64, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4,
                    n_kv_heads=2, head_dim=8, context=128, **kind)
    torch.manual_seed(0)
    model = random_model(config, device="cpu")
    prompts = [torch.randint(64, (n,)).tolist() for n in (3, 12, 7, 5)]
    table = torch.full((2, 7), 0.1 if sparse else -1.0)

    def alone(prompt):
        cache, kept, new = KVCache(config, 64), torch.zeros(2, 7), []
        logits = model.logits(model.forward(torch.tensor(prompt), cache)[-1:])[0]
        while len(new) < 40:
            new.append(logits.argmax().item())
            if new[-1] in (7, 8):
                return new[:-1]
            logits = decode_one_token(model, cache, torch.tensor(new[-1:]), table, kept)
        return new

    asked = set()
    answers, unread = write(model, read(model, prompts, 40), table if sparse else None, 40, {7, 8},
                            lambda i, ids: asked.add(i))
    assert answers == [alone(prompt) for prompt in prompts]
    assert (0.01 < unread < 0.5) if sparse else unread == 0
    assert asked <= set(range(4))
    first, _ = write(model, read(model, prompts, 40), table, 40, {7, 8}, lambda i, ids: True)
    assert all(a == b[:len(a)] for a, b in zip(first, answers))
