"""generate.py: the command line and the Python API, from the arguments to the text and summary."""

import json
import math
import re
import shlex
import shutil
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import calibrate
import checkpoint
import generate
from calibrations.thresholds import find
from checkpoint import memory
from checkpoint.tensors import weight_bytes
from cli.accounting import block_bytes, other_bytes
from cli.report import report, summary
from conftest import PROMPTS, ask, start
from model import Config, Linear, Model
from quantize import Int8Linear
from session import Session

GREEDY = ["--temperature", 0]


def edit(file, **changes):
    """Change values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- text --------------------------------------------------------------------------------------

def test_printed_text_is_the_decoded_text(smollm, capsys, monkeypatch):
    _, tokenizer = smollm
    ids = tokenizer.encode("naïve 日本語 🐕🏽  two spaces\n\ttab ") + [0]
    ids += tokenizer.encode("🐕")[:1]  # of the last character, most bytes are missing
    text = tokenizer.decode(ids[:-1])
    assert generate.write(ids, tokenizer) == (text, "stop text")
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdout", mock.Mock(**{"write.side_effect": BrokenPipeError}))
    with pytest.raises(BrokenPipeError):  # which run_script knows
        generate.write(ids, tokenizer)


def test_text_ends_before_a_stop_text(smollm):
    _, tokenizer = smollm
    ids = tokenizer.encode("One, two and three. Four")
    for stop, text in (
            (["three"], "One, two and "), (["x", " Fo", "three. F"], "One, two and "),
            ([" two", "ne,"], "O"), (["Fourteen"], "One, two and three. Four")):
        pieces = list(generate.text_pieces(iter(ids), tokenizer, stop))
        assert "".join(pieces) == text and len(pieces) > 1 - (text == "O")


def test_the_python_api_ends_where_the_model_or_a_stop_text_does(tiny):
    """And puts the first token before a text."""
    model, tokenizer = checkpoint.load(tiny)
    text = "".join(generate.generate(model, tokenizer, "abc", 9))
    ids = list(generate.generate_tokens(model, tokenizer.encode("abc"), 9))
    third = ids.index(ids[3])  # maybe not for the first time
    tokenizer.eos_ids = frozenset({ids[3]})
    assert "".join(generate.generate(model, tokenizer, "abc", 9)) == tokenizer.decode(ids[:third])
    tokenizer.eos_ids = frozenset()
    short = generate.generate(model, tokenizer, "abc", 9, stop=[text[2]])
    assert "".join(short) == text[:text.index(text[2])]
    # a text of its own, not its letters
    assert "".join(generate.generate(model, tokenizer, "abc", 9, stop=text[1] + "\u2603")) == text
    for options in {"stop": ""}, {"stop": [5]}, {"max_new_tokens": "9"}:
        with pytest.raises(ValueError, match="expected"):
            next(generate.generate(model, tokenizer, "abc", **options))
    asked, encode = [], tokenizer.encode
    tokenizer.encode = lambda *a, **o: asked.append((a, o)) or encode(*a, **o)
    with mock.patch.object(generate, "text_pieces", return_value=[""]) as pieces:
        next(generate.generate(model, tokenizer, "abc", 2))
    assert asked == [(("abc",), {})] and pieces.call_args.args[2:] == ((), encode("abc"))


# ---- the command line --------------------------------------------------------------------------

def test_help(run):
    code, out, _ = run(generate.main, "--help")
    assert code == 0 and out.count("python generate.py") == 2
    text = " ".join(out.split())
    for name, default in generate.SAMPLING.items():
        flag = text[text.index(f"--{name.replace('_', '-')} ", text.index("options:")):]
        assert float(re.search(r"\(default: ([^)]*)\)", flag)[1]) == default, name


def test_one_command(run, monkeypatch):
    """The README's command: the text and the summary are those of a session with the shipped
    thresholds."""
    loaded = []
    monkeypatch.setattr("cli.command_line.load", lambda *args, load=checkpoint.load, **options: (
        loaded.append(load(*args, **options)) or loaded[0]))
    done = run(generate.main, "--sparsity", 0.4, "--prompt", PROMPTS[0], "--max-new-tokens", 12,
               *GREEDY, "--threads", torch.get_num_threads())
    (model, tokenizer), = loaded
    ids = ask(tokenizer, PROMPTS[0])
    session = Session(model, find(model).thresholds(0.4), stop=tokenizer.eos_ids)
    text = tokenizer.decode(session.generate(ids, 12))
    assert done.code == 0 and done.out == text + "\n" and "blue" in text
    read, unread = session.bytes_per_token() / 1e6, session.sparsity()
    first, *_, last = done.err.splitlines()
    assert re.fullmatch(
        rf"prompt {len(ids)} tokens, [\d.]+ tok/s \| new 12 tokens, [\d.]+ tok/s \| {read:.1f} MB "
        rf"read per token \| {unread:.1%} of the blocks' 53.1 MB unread \(40% asked\)", last), last
    assert first.startswith("the file's weights of 8 bits or fewer run as they are, faster")


def test_thinking(run, tiny, tmp_path):
    """--thinking reaches the chat template, for one prompt and in a chat."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    template = ("{% for m in messages %}[{{ m.content }}]{% endfor %}"
                "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    words = ["--model", folder, "--max-new-tokens", "1"]
    for switch, n_tokens in ([], 5), (["--thinking"], 9), (["--no-thinking"], 10):
        for done in (run(generate.main, *words, *switch, "--prompt", "abc"),
                     run(generate.main, *words, *switch, "--chat", stdin="abc\n")):
            assert f"prompt {n_tokens} tokens" in done.err


def test_options(run, tiny, tmp_path):
    """generation_config.json's defaults, flags above them, JSON, and answers that are cut."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "top_p": "x"}))
    words = ["--model", folder, "--raw", "--prompt", "abc", "--max-new-tokens", "9", "--threads", 1]
    best, likeliest = run(generate.main, *words), run(generate.main, *words, *GREEDY)
    other = run(generate.main, *words, "--top-k", 0, "--temperature", 50)
    assert best.out == likeliest.out != other.out and "(cut at 9 tokens" in best.err
    numbers = json.loads(run(generate.main, *words, "--json").err.splitlines()[-1])
    assert numbers["new_tokens"] == 9 and numbers["ended"] == "length"


def test_seeds(run, tiny):
    """A new one each time, told where it matters; the same seed gives the same text."""
    def text(*flags, stdin=""):
        done = run(generate.main, "--model", tiny, "--raw", "--max-new-tokens", 20, *flags,
                   stdin=stdin)
        assert done.code == 0
        return done.out, (re.search(r"\| seed (\d+)", done.err) or "  ")[1]

    one, seed = text("--prompt", "abc")
    assert text("--prompt", "-", "--seed", seed, stdin="abc") == (one, seed)
    assert text("--prompt", "abc")[1] != seed and text("--prompt", "abc", *GREEDY)[1] == " "


@pytest.mark.parametrize("way", [["--prompt", "-", "--raw"], ["--chat"]])
def test_input_of_another_encoding(run, tiny, way):
    code, _, err = run(generate.main, "--model", tiny, *way, stdin="na\xefve\n".encode("latin-1"))
    assert code == 2 and err.splitlines()[-1] == (
        "generate.py: error: standard input is not UTF-8 text; convert it")


def test_what_ended_the_text(run, tiny, monkeypatch):
    """--json names a stop text and Ctrl-C, as it names the model's own end and limits."""
    def ended(*more):
        done = run(generate.main, "--model", tiny, "--raw", "--prompt", "abc", *GREEDY, "--json",
                   *more)
        assert done.code == 0
        return done.out, json.loads(done.err.splitlines()[-1])["ended"]

    text, reason = ended("--max-new-tokens", 9)
    assert reason == "length"
    assert ended("--stop", text[3]) == (text[:text.index(text[3])] + "\n", "stop text")
    assert ended()[1] == "context"
    full = run(generate.main, "--model", tiny, "--raw", "--prompt", "abc", *GREEDY).err
    assert "(cut: the context of 64 tokens is full)" in full and "new 61 tokens" in full

    def interrupted(ids, tokenizer, stop, prompt):
        assert prompt == tokenizer.encode("abc")  # which the text continues
        yield tokenizer.decode([next(ids)])
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.report.text_pieces", interrupted)
    assert ended() == (text[:1] + "\n", "interrupted")


def test_chat(run, tiny):
    """Each answer continues the whole conversation, the earlier answers included; so does that to
    one prompt."""
    words = ["--model", tiny, "--max-new-tokens", 5, *GREEDY, "--dtype", "float32", "--system",
             "Be"]
    done = run(generate.main, *words, "--chat", stdin="Hi\nHo\nHu\n")
    model, tokenizer = checkpoint.load(tiny)
    messages, answers = [{"role": "system", "content": "Be"}], []
    for question in ("Hi", "Ho", "Hu"):
        messages.append({"role": "user", "content": question})
        answers.append("".join(generate.generate(model, tokenizer, tokenizer.chat(messages), 5)))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert done.code == 0 and done.out == "".join(f"{answer}\n" for answer in answers)
    assert len({*answers}) == 3 and "new 15 tokens" in done.err
    assert run(generate.main, *words, "--prompt", "Hi").out == f"{answers[0]}\n"


def test_what_the_command_line_passes_on(run, tiny, monkeypatch):
    """Every flag of sampling and the model's stop tokens reach the session; the summary names the
    sparsity that was counted."""
    made = []

    class Watched(generate.Session):
        def __init__(self, *arguments, **options):
            made.append(options)
            super().__init__(*arguments, **options)

        def sparsity(self, *arguments):
            return 0.123

    monkeypatch.setattr(generate, "Session", Watched)
    threads = mock.Mock()
    monkeypatch.setattr(torch, "set_num_threads", threads)
    sampling = {"top_k": 7, "top_p": 0.6, "min_p": 0.2, "repetition_penalty": 1.3,
                "temperature": 0.9, "seed": 11}
    flags = [word for name, value in sampling.items()
             for word in (f"--{name.replace('_', '-')}", value)]
    done = run(generate.main, "--model", tiny, "--prompt", "abc", "--max-new-tokens", 5, "--json",
               "--threads", 3, *flags)
    assert made[0].items() >= (sampling | {"stop": {255}}).items()
    assert mock.call(3) in threads.mock_calls
    assert '"realised_sparsity": 0.123' in done.err


@pytest.mark.parametrize("closed", [0, 1])
def test_every_process_writes_the_same_text(run, tiny, tmp_path, closed, request):
    """Also one whose input or output is closed. `pytest --processes 50` starts more of them."""
    words = ["--model", tiny, "--prompt", "abc", "--seed", 5, "--temperature", 1.5, "--top-k", 0,
             "--max-new-tokens", 50]
    expected = run(generate.main, *words).out
    for _ in range(request.config.getoption("processes")):
        streams = ["/dev/null", tmp_path / "out", tmp_path / "err"]
        streams[closed] = None
        process = start(generate.main, *words, streams=streams)
        process.join(120)
        assert process.exitcode == 0 and "new 50 tokens" in (tmp_path / "err").read_text()
        assert closed or (tmp_path / "out").read_text() == expected


# ---- thresholds --------------------------------------------------------------------------------

def test_first_sparse_run_calibrates(run, tiny, cache, monkeypatch):
    """Where the calibration cannot be written, the run goes on; after Ctrl-C there is none."""
    words = ["--model", tiny, "--prompt", "abc", "--max-new-tokens", 30, *GREEDY, "--sparsity",
             0.71]
    one, two = run(generate.main, *words), run(generate.main, *words)
    assert one.code == two.code == 0 and one.out == two.out
    assert "no calibration" in one.err and "no calibration" not in two.err
    file, = cache.glob("calibration-*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["source"] == "calibrations/text.txt" and metadata["allocation"] == "fisher"
    assert metadata["tokens"] == "2048" and metadata["window"] == "64"  # the model's context

    shutil.rmtree(cache)
    cache.write_text("")  # a file, and no folder
    monkeypatch.setitem(calibrate.ALLOCATE, "fisher", calibrate.ALLOCATE["uniform"])  # faster
    done = run(generate.main, *words)
    assert done.code == 0 and "cannot write the calibration" in done.err
    cache.unlink()
    monkeypatch.setitem(calibrate.ALLOCATE, "fisher", mock.Mock(side_effect=KeyboardInterrupt))
    assert run(generate.main, *words).code == 130 and not cache.exists()


def test_thresholds_of_other_weights_are_named_and_watched(run, tiny, cache, tmp_path):
    """The folder's own calibration is used in silence. On an equivalent model, norms doubled and
    their readers halved, it drops less than asked: both are said, once."""
    folder = shutil.copytree(tiny, tmp_path / "it's mine")
    edit(folder / "config.json", max_position_embeddings=256, eos_token_id=None)
    model, _ = checkpoint.load(folder)
    tokens = torch.randint(256, (512,), generator=torch.Generator().manual_seed(0))
    calibration = calibrate.calibrate(model, tokens, 256, "uniform", source="noise")
    calibration.save(folder / "calibration.safetensors")
    words = ["--model", folder, "--raw", "--prompt", "abc", "--sparsity", 0.5, "--seed", 1,
             "--temperature", 5, "--top-k", 0, "--max-new-tokens", 200]
    own = run(generate.main, *words)
    assert "thresholds:" not in own.err and "warning" not in own.err
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor *= 2
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj")):
            tensor /= 2
    save_file(tensors, folder / "model.safetensors")
    other = run(generate.main, *words)
    assert other.err.count("thresholds: ") == 1 and other.err.count("warning: ") == 1
    assert f"{folder}/calibration.safetensors (uniform, from noise), made for other" in other.err
    command = other.err.partition("; python ")[2].partition(" makes this model's own")[0]
    assert shlex.split(command) == ["calibrate.py", "--model", str(folder)]  # can be pasted
    assert "sparsity 0.5 was requested, but this answer reached 0." in other.err


def test_each_answer_is_watched_at_its_sparsity(run, tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(generate, "warn_of_sparsity", lambda session, stats, sparsity: asked.append(
        (sparsity, session.thresholds[0, 0].item(), stats.new_tokens)))
    monkeypatch.setattr(generate, "find_thresholds", lambda model, tokenizer, sparsity, *_:
                        torch.full((2, 7), sparsity))
    run(generate.main, "--model", tiny, "--chat", "--max-new-tokens", 2, "--sparsity", 0.25,
        stdin="a\n/sparsity 0.5\nb\n/sparsity 2\nc\n")
    assert asked == [(0.25, 0.25, 2), (0.5, 0.5, 2), (0.5, 0.5, 2)]


# ---- numbers and memory ------------------------------------------------------------------------

def test_numbers_of_a_run(tiny):
    """Speeds are tokens over the seconds of their own phase."""
    session = Session(checkpoint.load(tiny)[0])
    list(session.generate([1, 2, 3], 4))
    stats = session.measured()
    stats.prefill_seconds, stats.decode_seconds = 0.5, 0.25
    numbers = report(session, stats, 0, None)
    assert numbers["prompt_tokens_per_second"] == 3 / 0.5
    assert numbers["tokens_per_second"] == 3 / 0.25  # the first new token comes from prefill
    assert summary(numbers).startswith("prompt 3 tokens, 6.0 tok/s | new 4 tokens, 12.0 tok/s | ")
    assert "unread" not in summary(numbers | {"realised_sparsity": 0.1})
    session.stats.prefill_seconds = session.stats.decode_seconds = 100.0
    list(session.generate([4, 5], 3))
    assert 100 < session.stats.prefill_seconds < 200 and session.stats.prompt_tokens == 5
    assert 100 < session.stats.decode_seconds < 200
    # of this answer, not of what the session read before with other thresholds
    before = session.measured()
    session.set_thresholds(torch.full((2, 7), math.inf))
    list(session.generate([3], 4))
    numbers = report(session, session.measured() - before, 0.5, None)
    assert numbers["realised_sparsity"] == 1 and numbers["ranks"] == 1
    assert numbers["bytes_per_token"] < numbers["block_bytes"]


def test_too_little_memory(tiny, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 40_000)
    with pytest.raises(ValueError, match="the model in float32 needs 0.0 GB of memory, but 0.0 GB "
                       "are free on cpu; try --dtype bfloat16 or --quantize int8 or a smaller"):
        checkpoint.load(tiny)
    with pytest.raises(ValueError, match="try --dtype bfloat16 or a smaller model"):
        checkpoint.load(tiny, quantize="int8")
    for dtype, words in ((torch.float32, "a context of 9999999 tokens needs 1.3 GB .* try a "
                          "shorter one with --context or --dtype bfloat16"),
                         (torch.bfloat16, "with --context$")):
        with pytest.raises(ValueError, match=words):
            model = Model(Config(64, 32, 48, 1, 4, 2, 8, context=9_999_999), dtype)
            generate.open_session(model, context=9_999_999)
    # where the LM head's certificate does not fit beside the context, all of the head is read
    monkeypatch.setattr("lm_head.LEAST_WEIGHTS", 0)
    for free, whole in (20 * 64 + 64 * 44 - 1, True), (20 * 64 + 64 * 44, False):
        monkeypatch.setattr(generate, "free_memory", lambda device, free=free: free)
        assert (generate.open_session(model, context=20).decoder.bounds is None) == whole


@pytest.mark.parametrize("dtype, quantized, linear", [
    (torch.bfloat16, None, Linear), (torch.float32, "int8", Int8Linear)])
def test_the_bytes_of_a_models_weights(dtype, quantized, linear):
    config = Config(64, 32, 48, 1, 4, 2, 8, tie_embeddings=True)
    model = Model(config, dtype, linear_class=linear)
    embedding = 63 * 32 * 4 if quantized else 0  # int8 has one of its own, of which a row is read
    assert weight_bytes(config, dtype, quantized) == pytest.approx(
        block_bytes(model) + other_bytes(model) + embedding, rel=0.02 if quantized else 0)


def test_chat_context_that_fits(run, tiny, tmp_path, monkeypatch):
    """A chat sets memory aside for the model's longest context, or for less where half of what is
    free is less."""
    folder = shutil.copytree(tiny, tmp_path / "m")
    edit(folder / "config.json", max_position_embeddings=100_000)
    contexts = []
    monkeypatch.setattr(generate.Chat, "run",
                        lambda chat, _: contexts.append(chat.session.cache.context))
    token = 2 * 2 * 2 * 16 * 2  # bytes: k and v, 2 layers, 2 heads of 16, bfloat16
    for free in (math.inf, 2 * token * 3000, 0):
        monkeypatch.setattr(generate, "free_memory", lambda device, free=free: free)
        run(generate.main, "--model", folder, "--chat")
    assert contexts == [100_000, 3000, 512]
