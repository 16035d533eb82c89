"""generate.py: the same tokens as transformers, honest sparsity, sampling with the right probabilities, a polite CLI."""

import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

import calibrate
import checkpoint
import generate as generate_module
import memory
import model as model_module
from calibration import find
from generate import Session, generate, sample
from gguf_file import GGUFFile
from model import SITES, Config, Model, dense

PROMPTS = ["Explain in one sentence why the sky is blue.", "Write a haiku about rivers.", "What is 17 plus 25?",
           "def fibonacci(n):", "Übersetze ins Englische: Der Hund schläft. 🐕"]


@pytest.fixture(scope="module")
def smollm():
    return checkpoint.load()


def ask(tokenizer, question):
    return tokenizer.chat([{"role": "user", "content": question}])


# ---- tokens --------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def test_greedy_equals_transformers(smollm):
    model, tokenizer = smollm
    file = checkpoint.default_model()
    config = GGUFFile(file).config() | {"pad_token_id": 0, "eos_token_id": sorted(tokenizer.eos_ids)}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).float().eval()
    missing, unexpected = theirs.load_state_dict(dict(checkpoint.open_checkpoint(file).tensors), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # the head is tied
    theirs.generation_config.eos_token_id = sorted(tokenizer.eos_ids)
    for prompt in PROMPTS:
        ids = ask(tokenizer, prompt)
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids):].tolist()
        if expected[-1] in tokenizer.eos_ids:
            expected.pop()
        assert list(generate(model, ids, 64, stop=tokenizer.eos_ids)) == expected


def test_sparse_steps_are_masked_products(smollm):
    """Every product of a sparse step is one with masked x, and the rows counted are those that the masks keep."""
    model, tokenizer = smollm
    thresholds = find(model).thresholds(0.5)
    session = Session(model, thresholds, stop=())
    multiply, kept = session.multiply, torch.zeros(thresholds.shape, dtype=torch.int64)
    first = {"qkv": 0, "o": 3, "gate_up": 4, "down": 6}

    def checked(x, p):
        y = multiply(x, p)
        if p.layer is None:
            expected = dense(x, p)
        else:
            row = thresholds[p.layer, first[p.site]:first[p.site] + len(p.ends)]
            kept[p.layer, first[p.site]:first[p.site] + len(p.ends)] += (x.abs() > row[:, None]).sum(1)
            expected = calibrate.masked(x, p, row.tolist())
        assert (y - expected).norm() <= 1e-5 * expected.norm()
        return y

    session.multiply = checked
    tokens = list(session.generate(ask(tokenizer, PROMPTS[0]), 16))
    assert torch.equal(session.kept, kept)
    assert tokens == list(generate(model, ask(tokenizer, PROMPTS[0]), 16, thresholds=thresholds))


def test_realised_sparsity(smollm):
    model, tokenizer = smollm
    reached = []
    for prompt in (PROMPTS[0], PROMPTS[1], "Explain how rain forms, step by step."):
        session = Session(model, find(model).thresholds(0.4))
        assert len(list(session.generate(ask(tokenizer, prompt), 128))) == 128
        reached.append(session.sparsity())
    assert 0.38 <= sum(reached) / len(reached) <= 0.42, reached


def test_dense_reads_everything(smollm):
    model, tokenizer = smollm
    ids = ask(tokenizer, PROMPTS[1])
    session = Session(model)
    tokens = list(session.generate(ids, 5))
    assert session.sparsity() == 0
    assert list(Session(model, find(model).thresholds(0)).generate(ids, 5)) == tokens
    weights = sum(getattr(layer, site).w_t.nbytes for layer in model.layers for site in SITES) + model.lm_head.w_t.nbytes
    seen = [len(ids) + i for i in range(1, 5)]  # by each of the four decode steps
    config = model.config
    cache = sum(seen) / 4 * 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
    assert session.bytes_per_token() == weights + cache


def test_generator(smollm):
    model, tokenizer = smollm
    ids = ask(tokenizer, PROMPTS[0])
    tokens = generate(model, ids, 12)
    first = [next(tokens) for _ in range(4)]  # one by one
    tokens.close()
    whole = list(generate(model, ids, 12))
    assert whole[:4] == first and len(whole) == 12 and all(isinstance(token, int) for token in whole)
    assert list(generate(model, ids, 12, stop=[whole[5]])) == whole[:whole.index(whole[5])]

    session = Session(model, context=len(ids) + 3)
    assert list(session.generate(ids, 12)) == whole[:3] and session.full
    assert list(session.generate(ids, 3)) == whole[:3] and not session.full
    with pytest.raises(ValueError, match=f"has {len(ids) + 4} tokens, more than the context of {len(ids) + 3}"):
        next(session.generate(ids + [1] * 4, 1))
    with pytest.raises(ValueError, match="prompt is empty"):
        next(session.generate([], 1))


def test_same_seed_same_tokens(smollm):
    model, tokenizer = smollm
    ids = ask(tokenizer, PROMPTS[1])
    options = dict(temperature=1.0, top_k=50, top_p=0.9)
    runs = [list(generate(model, ids, 16, seed=seed, **options)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_conversation_reuses_its_cache(smollm):
    model, tokenizer = smollm
    session, messages = Session(model, context=512, stop=tokenizer.eos_ids), []
    for question in ("Name a colour.", "And another one, please?", "Which of them is darker?"):
        messages.append({"role": "user", "content": question})
        ids = tokenizer.chat(messages)
        before = session.stats.prompt_tokens
        tokens = list(session.generate(ids, 24))
        assert tokens == list(generate(model, ids, 24, stop=tokenizer.eos_ids))
        if len(messages) > 1:
            assert session.stats.prompt_tokens - before < len(ids) / 2
        messages.append({"role": "assistant", "content": tokenizer.decode(tokens)})
    other = ask(tokenizer, "Something else entirely.")  # shares only a beginning with what the cache holds
    assert list(session.generate(other, 12)) == list(generate(model, other, 12, stop=tokenizer.eos_ids))


def test_printed_text_is_the_decoded_text(smollm, capsys):
    _, tokenizer = smollm
    ids = tokenizer.encode("naïve 日本語 🐕🏽  two spaces\n\ttab ") + [0] + tokenizer.encode("🐕")[:1]
    assert generate_module.write(ids, tokenizer) == tokenizer.decode(ids)
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


# ---- sampling ------------------------------------------------------------------------------------------------------

def draws(logits, n, **options):
    generator = torch.Generator().manual_seed(1)
    return torch.cat([sample(logits, generator=generator, **options) for _ in range(n)])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 12, "top_p": 0.7},
                                     {"top_k": 1000}, {"temperature": 1.7, "top_p": 0.5}])
def test_sample_probabilities(options):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    # By the definition, one token at a time.
    exact = [math.exp(logit / options.get("temperature", 1)) for logit in logits.tolist()]
    order = sorted(range(40), key=lambda i: -exact[i])[:options.get("top_k", 40)]
    total, reached, kept = sum(exact[i] for i in order), 0.0, []
    for i in order:
        if reached / total >= options.get("top_p", 1):
            break
        kept.append(i)
        reached += exact[i]
    expected = torch.zeros(40, dtype=torch.float64)
    expected[kept] = torch.tensor([exact[i] / reached for i in kept], dtype=torch.float64)

    n = 20_000
    counts = torch.bincount(draws(logits, n, **options), minlength=40)
    assert counts[expected == 0].sum() == 0
    likely = expected * n >= 5  # where the chi-square statistic is one
    chi_square = ((counts - expected * n) ** 2 / (expected * n))[likely].sum().item()
    freedom = likely.sum().item()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_sample_corners():
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    best = logits.argmax().item()
    for options in ({"temperature": 0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 0}, {"top_p": 1e-9}):
        assert set(draws(logits, 20, **options).tolist()) == {best}
    assert sample(torch.zeros(5), temperature=0).shape == (1,)
    ties = torch.tensor([0.0, 1, 1, 1])
    assert set(draws(ties, 50, top_p=0.5).tolist()) == {1, 2}  # of equals the first ones
    masked = torch.tensor([0.0, -math.inf, 0, -math.inf])
    assert set(draws(masked, 100).tolist()) == {0, 2}
    half = draws(logits.bfloat16(), 50, top_k=3)
    assert set(half.tolist()) <= set(logits.bfloat16().topk(3).indices.tolist())


# ---- command line --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of random weights whose text is bytes, with a chat template and a context of 64."""
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=255, architectures=["LlamaForCausalLM"])
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


def command(*arguments):
    return [sys.executable, str(Path(generate_module.__file__)), *map(str, arguments)]


def run(*arguments, stdin=""):
    return subprocess.run(command(*arguments), input=stdin.encode(), capture_output=True, timeout=120)


@pytest.mark.parametrize("arguments, words", [
    (["--prompt", "x", "--sparsity", "0.96"], "'0.96' is not a number from 0 to 0.95"),
    (["--prompt", "x", "--sparsity", "nan"], "'nan' is not a number from 0 to 0.95"),
    (["--prompt", "x", "--top-p", "1.5"], "'1.5' is not a number from 0 to 1"),
    (["--prompt", "x", "--max-new-tokens", "0"], "'0' is not a whole number from 1"),
    (["--prompt", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
    (["--prompt", "x", "--device", "abacus"], "device 'abacus' is not available"),
    (["--chat", "--raw"], "give one of them"),
    ([], "nothing to do"),
    (["--prompt", "x", "--model", "/no/such/model"], "/no/such/model does not exist"),
    (["--prompt", "x", "--context", "65", "--model", "TINY"], "context 65 is outside 1 to 64"),
    (["--prompt", "x" * 80, "--model", "TINY"], "has 82 tokens, more than the context of 64"),
    (["--prompt", "", "--raw", "--model", "TINY"], "the prompt is empty"),
    (["--prompt", "x", "--sparsity", "0.3", "--calibration", "/no/such/file", "--model", "TINY"], "/no/such/file"),
    (["--prompt", "x", "--sparsity", "0.3", "--calibration", "DEFAULT", "--model", "TINY"], "belongs to another model"),
])
def test_bad_input(arguments, words, tiny):
    default = Path(calibrate.__file__).parent / "calibrations" / "smollm2-135m-instruct.safetensors"
    done = run(*({"TINY": tiny, "DEFAULT": default}.get(argument, argument) for argument in arguments))
    error = done.stderr.decode()
    assert done.returncode == 2 and done.stdout == b""
    assert error.startswith("generate.py: error: ") and words in error and error.count("\n") == 1


def test_help():
    done = run("--help")
    text = done.stdout.decode()
    assert done.returncode == 0 and text.count("python generate.py") == 2
    for flag in ("model", "prompt", "sparsity", "max-new-tokens", "temperature", "top-k", "top-p", "seed", "dtype", "device",
                 "chat", "raw", "calibration", "context"):
        assert f"--{flag}" in text


def test_one_command(smollm):
    """The README's command, from the shell to the text and its summary, twice the same."""
    arguments = ["--sparsity", "0.4", "--prompt", PROMPTS[0], "--max-new-tokens", "40", "--temperature", "0"]
    one, two = run(*arguments), run(*arguments)
    assert one.returncode == 0 and one.stdout == two.stdout and b"blue" in one.stdout
    summary = one.stderr.decode().strip()
    assert "sparsity 0.4 asked, 0." in summary and "MB read per token" in summary and "seed" not in summary


def test_seed_is_told(tiny):
    one = run("--model", tiny, "--raw", "--prompt", "abc", "--max-new-tokens", "20")
    seed = one.stderr.decode().strip().rpartition("seed ")[2]
    two = run("--model", tiny, "--raw", "--prompt", "-", "--max-new-tokens", "20", "--seed", seed, stdin="abc")
    assert one.returncode == two.returncode == 0 and one.stdout == two.stdout


def test_context_end(tiny):
    done = run("--model", tiny, "--raw", "--prompt", "abc", "--temperature", "0")
    assert done.returncode == 0 and "context of 64 tokens is full" in done.stderr.decode()
    assert "new 61 tokens" in done.stderr.decode()


def test_chat(tiny):
    done = run("--model", tiny, "--chat", "--max-new-tokens", "5", "--temperature", "0", stdin="Hi\nHo\n")
    assert done.returncode == 0 and "new 10 tokens" in done.stderr.decode()


def test_first_sparse_run_calibrates(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["--model", tiny, "--prompt", "abc", "--sparsity", "0.5", "--max-new-tokens", "30", "--temperature", "0"]
    one, two = run(*arguments), run(*arguments)
    assert one.returncode == two.returncode == 0 and one.stdout == two.stdout
    assert "no calibration" in one.stderr.decode() and "no calibration" not in two.stderr.decode()


def test_reader_leaves():
    process = subprocess.Popen(command("--prompt", PROMPTS[1], "--max-new-tokens", "2000"),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(120) == 0 and process.stderr.read() == b""


def test_interrupt():
    def heed_interrupts():  # which a background job, as these tests may be, would pass on as ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = command("--prompt", "Write a long story.", "--max-new-tokens", "4000", "--temperature", "0")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts) as process:
        try:
            process.stdout.read(100)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in error.decode() and "MB read per token" in error.decode()


# ---- numbers that are none -----------------------------------------------------------------------------------------

def overflowing(dtype, spoil):
    """A model of random weights, spoilt by a function of it."""
    config = Config("llama", 64, 32, 48, 3, 4, 2, 8, context=32)
    model, generator = Model(config, dtype), torch.Generator().manual_seed(0)
    for name, shape in model.shapes.items():
        model.put(name, torch.randn(shape, generator=generator) * 0.2)
    spoil(model)
    return model


@pytest.mark.parametrize("spoil, words", [
    (lambda model: model.layers[1].down.w_t.mul_(6e5), "the output of down in layer 1"),
    (lambda model: model.layers[1].attn_norm.fill_(6e4), "the input of q/k/v in layer 1"),
    (lambda model: model.layers[2].gate_up.w_t.mul_(1e3), "the input of down in layer 2"),
    (lambda model: model.norm.fill_(6e4), "the input of the LM head"),
    (lambda model: model.lm_head.w_t.fill_(math.nan), "the output of the LM head")])
def test_infinite_numbers_are_named(spoil, words):
    with pytest.raises(ValueError, match=f"{words} is infinite or NaN at token 3 of the text; float16 ends at 65504, so try --dtype bfloat16"):
        list(generate(overflowing(torch.float16, spoil), [1, 2, 3], 4))


def test_infinite_numbers_while_decoding():
    model = overflowing(torch.float32, lambda model: None)
    session = Session(model)
    tokens = session.generate([1, 2, 3], 8)
    next(tokens)
    session.cache.k[1, :, 2] = math.nan
    with pytest.raises(ValueError, match="the input of o in layer 1 is infinite or NaN at token 4 of the text"):
        next(tokens)


def test_weights_beyond_the_type():
    model = Model(Config("llama", 64, 32, 48, 1, 4, 2, 8), torch.float16)
    norm = torch.ones(32)
    norm[3] = 7e4
    with pytest.raises(ValueError, match="model.norm.weight .* torch.float16 ends at 65504; try --dtype bfloat16"):
        model.put("model.norm.weight", norm)
    norm[3] = math.nan
    with pytest.raises(ValueError, match="model.norm.weight .* get a sound checkpoint"):
        model.put("model.norm.weight", norm)


# ---- limits --------------------------------------------------------------------------------------------------------

def test_prompts_around_the_context():
    model = overflowing(torch.float32, lambda model: None)  # a sound one, with a context of 32
    for n, new in ((30, 2), (31, 1), (32, 1)):  # a prompt as long as the context still gets one token
        session = Session(model)
        assert len(list(session.generate([1] * n, 10))) == new and session.full
    with pytest.raises(ValueError, match="has 33 tokens, more than the context of 32"):
        next(Session(model).generate([1] * 33, 10))


def test_too_little_memory(tiny, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 40_000)
    with pytest.raises(ValueError, match="the model in float32 needs 0.0 GB of memory, but 0.0 GB are free on cpu; "
                                         "try --dtype bfloat16 or --quantize int8 or a smaller model"):
        checkpoint.load(tiny)
    assert model_module.weight_bytes(Config("llama", 1, 2, 3, 1, 1, 1, 2), torch.float32) == 4 * (2 * 2 + 2 + 2 * 2 + 4 * 4 + 3 * 6)
    with pytest.raises(ValueError, match="a context of 9999999 tokens needs 1.3 GB .* try a shorter one with --context or --dtype bfloat16"):
        model_module.KVCache(Config("llama", 64, 32, 48, 1, 4, 2, 8), 9_999_999)


def test_chat_context_that_fits(tiny, tmp_path, monkeypatch, capsys):
    """A chat sets memory aside for the model's longest context, or for less where half of what is free is less."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    contexts = []
    monkeypatch.setattr(generate_module, "chat", lambda session, *_: contexts.append(session.cache.context))
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder), "--chat"])
    token = 2 * 2 * 2 * 16 * 2  # bytes: k and v, 2 layers, 2 heads of 16, bfloat16
    for free in (math.inf, 2 * token * 3000, 0):
        monkeypatch.setattr(generate_module, "free_memory", lambda device: free)
        generate_module.main()
    assert contexts == [100_000, 3000, 512]


def test_out_of_memory_is_told(monkeypatch, capsys):
    """Where memory runs out in spite of the checks."""
    def run(args):
        torch.empty(1 << 55)
    monkeypatch.setattr(generate_module, "run", run)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "x"])
    with pytest.raises(SystemExit, match="2"):
        generate_module.main()
    error = capsys.readouterr().err
    assert "out of memory" in error and "--quantize int8" in error and "GB free" in error and error.count("\n") == 1


def test_calibration_that_cannot_be_kept(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = run("--model", tiny, "--prompt", "abc", "--sparsity", "0.5", "--max-new-tokens", "3")
    assert done.returncode == 0 and "cannot write the calibration" in done.stderr.decode()


def test_full_disk(tiny):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command("--model", tiny, "--prompt", "abc"), stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_streams(closed, tiny):
    line = " ".join(map(shlex.quote, command("--model", tiny, "--prompt", "abc", "--max-new-tokens", 5, "--seed", 1))) + " " + closed
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"new 5 tokens" in done.stderr


def test_same_text_in_every_process(tiny, request):
    """`pytest --processes 50` runs more of them."""
    arguments = ["--model", tiny, "--prompt", "abc", "--seed", "5", "--temperature", "1.5", "--top-k", "0", "--max-new-tokens", "50"]
    assert len({run(*arguments).stdout for _ in range(request.config.getoption("processes"))}) == 1
