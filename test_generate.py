"""generate.py: the command line, from good and bad arguments to the text and the summary."""

import io
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import calibrate
import checkpoint
import generate as generate_module
from calibrations.thresholds import find
from checkpoint import memory
from checkpoint.tensors import weight_bytes
from cli.command_line import run_script
from cli.report import report, summary, warn_of_broken_text
from conftest import PROMPTS, ask, command, run
from model import Config, Model
from session import Session


def test_printed_text_is_the_decoded_text(smollm, capsys):
    _, tokenizer = smollm
    ids = (
        tokenizer.encode("naïve 日本語 🐕🏽  two spaces\n\ttab ")
        + [0]
        + tokenizer.encode("🐕")[:1]
    )
    text = tokenizer.decode(ids[:-1])  # of the last character, most bytes are missing
    assert generate_module.write(ids, tokenizer) == (text, "stop text")
    assert capsys.readouterr().out == text + "\n"


# ---- command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--prompt", "x", "--sparsity", "0.96"], "'0.96' is not a number from 0 to 0.95"),
        (["--prompt", "x", "--sparsity", "nan"], "'nan' is not a number from 0 to 0.95"),
        (["--prompt", "x", "--top-p", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--prompt", "x", "--max-new-tokens", "0"], "'0' is not a whole number from 1"),
        (["--prompt", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["--prompt", "x", "--device", "abacus"], "device 'abacus' is not available"),
        (["--chat", "--raw"], "give one of them"),
        (["--prompt", "x", "--raw", "--no-thinking"], "--thinking needs the chat template"),
        (["--prompt", "x", "--no-thinking", "--model", "TINY"], "no switch for --thinking"),
        ([], "nothing to do"),
        (["--prompt", "x", "--calibration", "TINY"], "--calibration needs --sparsity S"),
        (["--prompt", "x", "--model", "/no/such/model"], "/no/such/model does not exist"),
        (
            ["--prompt", "x", "--context", "65", "--model", "TINY"],
            "context 65 is outside 1 to 64",
        ),
        (["--prompt", "x" * 80, "--model", "TINY"], "has 82 tokens, more than the context of 64"),
        (["--prompt", "", "--raw", "--model", "TINY"], "the prompt is empty"),
        (
            [
                "--prompt",
                "x",
                "--sparsity",
                "0.3",
                "--calibration",
                "/no/such/file",
                "--model",
                "TINY",
            ],
            "/no/such/file",
        ),
        (
            ["--prompt", "x", "--sparsity", "0.3", "--calibration", "DEFAULT", "--model", "TINY"],
            "belongs to another model",
        ),
    ],
)
def test_bad_input(arguments, words, tiny):
    default = (
        Path(calibrate.__file__).parent / "calibrations" / "smollm2-135m-instruct.safetensors"
    )
    done = run(
        *({"TINY": tiny, "DEFAULT": default}.get(argument, argument) for argument in arguments)
    )
    error = done.stderr.decode()
    assert done.returncode == 2 and done.stdout == b""
    assert error.startswith("generate.py: error: ") and words in error and error.count("\n") == 1


def test_help():
    done = run("--help")
    text = done.stdout.decode()
    assert done.returncode == 0 and text.count("python generate.py") == 2
    for flag in (
        "model",
        "prompt",
        "sparsity",
        "max-new-tokens",
        "temperature",
        "top-k",
        "top-p",
        "seed",
        "dtype",
        "device",
        "chat",
        "raw",
        "calibration",
        "context",
    ):
        assert f"--{flag}" in text


def test_one_command(smollm):
    """The README's command, from the shell to the text and its summary: those of a session with
    the shipped thresholds."""
    done = run("--sparsity", 0.4, "--prompt", PROMPTS[0], "--max-new-tokens", 40,
               "--temperature", 0, "--threads", torch.get_num_threads())
    model, tokenizer = checkpoint.load(dtype=torch.bfloat16, quantize="gguf")
    ids = ask(tokenizer, PROMPTS[0])
    session = Session(model, find(model).thresholds(0.4), stop=tokenizer.eos_ids)
    text = tokenizer.decode(session.generate(ids, 40))
    assert done.returncode == 0 and done.stdout.decode() == text + "\n" and "blue" in text
    n = session.stats.new_tokens
    read, unread = session.bytes_per_token() / 1e6, session.sparsity()
    assert re.fullmatch(
        rf"prompt {len(ids)} tokens, [\d.]+ tok/s \| new {n} tokens, [\d.]+ tok/s \| {read:.1f} MB "
        rf"read per token \| {unread:.1%} of the blocks' 53.1 MB unread \(40% asked\)",
        done.stderr.decode().splitlines()[-1]), done.stderr
    assert done.stderr.startswith(b"the file's weights of 8 bits or fewer run as they are, faster")


def test_a_file_of_few_bits_as_numbers_of_many(smollm):
    """Where the user says so, or names a dtype."""
    for flags, size in (["--quantize", "none"], b"212.3"), (["--dtype", "float32"], b"424.7"):
        done = run("--sparsity", 0.4, "--prompt", PROMPTS[0], "--max-new-tokens", 3, *flags)
        assert b"of the blocks' " + size + b" MB unread" in done.stderr, done.stderr
        assert b"few" not in done.stderr


def test_a_folder_of_many_bits_is_not_quantized(tiny):
    assert not checkpoint.open_checkpoint(tiny).few_bits
    done = run("--model", tiny, "--prompt", "abc", "--max-new-tokens", 3)
    assert done.returncode == 0 and b"int8" not in done.stderr


def test_text_ends_before_a_stop_text(smollm):
    _, tokenizer = smollm
    ids = tokenizer.encode("One, two and three. Four")
    for stop, text in (
        (["three"], "One, two and "),
        (["x", " Fo", "three. F"], "One, two and "),
        ([" two", "ne,"], "O"),
        (["Fourteen"], "One, two and three. Four"),
    ):
        pieces = list(generate_module.text_pieces(iter(ids), tokenizer, stop))
        assert "".join(pieces) == text and len(pieces) > 1 - (text == "O")


def test_thinking(tiny, tmp_path):
    """--thinking reaches the chat template, for one prompt and in a chat."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    template = ("{% for m in messages %}[{{ m.content }}]{% endfor %}"
                "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    words = ["--model", folder, "--max-new-tokens", "1"]
    for switch, n_tokens in ([], 5), (["--thinking"], 9), (["--no-thinking"], 10):
        for done in (run(*words, *switch, "--prompt", "abc"),
                     run(*words, *switch, "--chat", stdin="abc\n")):
            assert f"prompt {n_tokens} tokens" in done.stderr.decode(), done.stderr


def test_options(tiny, tmp_path):
    """generation_config.json's defaults, flags above them, JSON, and answers that are cut."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 1, "top_p": "x"}))
    words = ["--model", folder, "--raw", "--prompt", "abc", "--max-new-tokens", "9", "--threads", 1]
    best, likeliest = run(*words), run(*words, "--temperature", "0")
    assert best.stdout == likeliest.stdout != run(*words, "--top-k", 0, "--temperature", 50).stdout
    assert b"(cut at 9 tokens" in best.stderr
    numbers = json.loads(run(*words, "--json").stderr.splitlines()[-1])
    assert numbers["new_tokens"] == 9 and numbers["ended"] == "length"
    assert run(*words, "--system", "x").returncode == 2


def test_seed_is_told(tiny):
    one = run("--model", tiny, "--raw", "--prompt", "abc", "--max-new-tokens", "20")
    seed = re.search(r"\| seed (\d+)", one.stderr.decode())[1]
    two = run("--model", tiny, "--raw", "--prompt", "-", "--max-new-tokens", "20",
              "--seed", seed, stdin="abc")
    assert one.returncode == two.returncode == 0 and one.stdout == two.stdout


@pytest.mark.parametrize("way", [["--prompt", "-", "--raw"], ["--chat"]])
def test_input_of_another_encoding(tiny, way):
    done = run("--model", tiny, *way, stdin="na\xefve\n".encode("latin-1"))
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == (
        "generate.py: error: standard input is not UTF-8 text; convert it")


def test_what_ended_the_text(tiny, monkeypatch, capsys):
    """--json names a stop text and Ctrl-C, as it names the model's own end and limits."""
    words = ["generate.py", "--model", tiny, "--raw", "--prompt", "abc", "--temperature", "0",
             "--json", "--max-new-tokens", "9"]

    def ended(*more):
        monkeypatch.setattr(sys, "argv", [*map(str, words), *more])
        generate_module.main()
        out, err = capsys.readouterr()
        return out, json.loads(err.splitlines()[-1])["ended"]

    text, reason = ended()
    assert reason == "length"
    assert ended("--stop", text[3]) == (text[:text.index(text[3])] + "\n", "stop text")

    def interrupted(ids, tokenizer, stop, prompt):
        yield tokenizer.decode([next(ids)])
        raise KeyboardInterrupt

    monkeypatch.setattr("cli.report.text_pieces", interrupted)
    assert ended() == (text[:1] + "\n", "interrupted")


def test_context_end(tiny):
    done = run("--model", tiny, "--raw", "--prompt", "abc", "--temperature", "0")
    assert done.returncode == 0
    assert "(cut: the context of 64 tokens is full)" in done.stderr.decode()
    assert "new 61 tokens" in done.stderr.decode()


def test_chat(tiny):
    """Each answer continues the whole conversation, the earlier answers included."""
    done = run("--model", tiny, "--chat", "--max-new-tokens", 5, "--temperature", 0, "--dtype",
               "float32", "--system", "Be", stdin="Hi\nHo\nHu\n")
    model, tokenizer = checkpoint.load(tiny)
    messages, answers = [{"role": "system", "content": "Be"}], []
    for question in ("Hi", "Ho", "Hu"):
        messages.append({"role": "user", "content": question})
        answers.append("".join(generate_module.generate(
            model, tokenizer, tokenizer.chat(messages), 5)))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert done.returncode == 0 and done.stdout.decode() == "".join(f"{a}\n" for a in answers)
    assert len({*answers}) == 3 and "new 15 tokens" in done.stderr.decode()


def test_first_sparse_run_calibrates(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = [
        "--model",
        tiny,
        "--prompt",
        "abc",
        "--sparsity",
        "0.5",
        "--max-new-tokens",
        "30",
        "--temperature",
        "0",
    ]
    one, two = run(*arguments), run(*arguments)
    assert one.returncode == two.returncode == 0 and one.stdout == two.stdout
    assert "no calibration" in one.stderr.decode() and "no calibration" not in two.stderr.decode()
    file, = (tmp_path / "nanoteal").glob("calibration-*.safetensors")
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["source"] == "calibrations/text.txt" and metadata["allocation"] == "fisher"
    assert metadata["tokens"] == "2048" and metadata["window"] == "64"  # the model's context


def test_ctrl_c_while_calibrating(tiny, monkeypatch, capsys, tmp_path):
    """It is said how far the calibration was. Nothing is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(calibrate.ALLOCATE, "fisher", interrupted)
    words = ["generate.py", "--model", str(tiny), "--prompt", "abc", "--sparsity", "0.5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="130"):
        run_script(generate_module.main)
    assert re.search(r"^calibrating: stopped at \d+%, and nothing of it is kept$",
                     capsys.readouterr().err, re.MULTILINE)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_high_sparsity_is_warned_of(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ["--model", tiny, "--prompt", "abc", "--max-new-tokens", "3", "--sparsity"]
    high, low = run(*words, "0.71"), run(*words, "0.7")
    assert b"warning: sparsity 0.71 breaks the text of a model of 0.0 billion" in high.stderr
    assert high.returncode == low.returncode == 0 and b"warning" not in low.stderr


def test_chinese_japanese_and_korean_text(smollm):
    """What `generate` yields is the decoded text, though a character may be several tokens."""
    model, tokenizer = smollm
    prompt = "東京は日本の首都です。北京是中国的首都。서울은 한국의 수도이다. 東京は日本の"
    ids = tokenizer.encode(prompt)
    tokens = list(generate_module.generate_tokens(model, ids, 24))
    pieces = list(generate_module.generate(model, tokenizer, prompt, 24))
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert re.search("[\u3040-\u9fff]", "".join(pieces)) and "\ufffd" not in "".join(pieces)


def test_thresholds_of_other_weights_are_named_and_watched(tiny, tmp_path, monkeypatch, capsys):
    """The folder's own calibration is used in silence. On an equivalent model, norms doubled and
    their readers halved, it drops less than asked: both are said, once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    model, _ = checkpoint.load(folder)
    tokens = torch.randint(256, (512,), generator=torch.Generator().manual_seed(0))
    calibration = calibrate.calibrate(model, tokens, 256, "uniform", source="noise")
    calibration.save(folder / "calibration.safetensors")

    def run():
        arguments = ["--model", folder, "--raw", "--prompt", "abc", "--sparsity", 0.5, "--seed", 1,
                     "--temperature", 5, "--top-k", 0, "--max-new-tokens", 200]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, arguments)])
        generate_module.main()
        return capsys.readouterr()

    own = run()
    assert "thresholds:" not in own.err and "warning" not in own.err
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor *= 2
        elif any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj")):
            tensor /= 2
    save_file(tensors, folder / "model.safetensors")
    other = run()
    assert other.err.count("thresholds: ") == 1 and other.err.count("warning: ") == 1
    assert f"{folder}/calibration.safetensors (uniform, from noise), made for other" in other.err
    assert f"python calibrate.py --model {folder} makes this model's own" in other.err
    assert "sparsity 0.5 was requested, but the last 64 tokens reached 0." in other.err


def test_what_the_command_line_passes_on(tiny, monkeypatch, capsys):
    """Every flag of sampling and the model's stop tokens reach the session; the summary names the
    sparsity that was counted."""
    made = []

    class Watched(generate_module.Session):
        def __init__(self, *arguments, **options):
            made.append(options)
            super().__init__(*arguments, **options)

        def sparsity(self, *arguments):
            return 0.123

    monkeypatch.setattr(generate_module, "Session", Watched)
    arguments = ["--model", str(tiny), "--prompt", "abc", "--top-k", "7", "--top-p", "0.6",
                 "--min-p", "0.2", "--repetition-penalty", "1.3",
                 "--temperature", "0.9", "--seed", "11", "--max-new-tokens", "5", "--json"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    generate_module.main()
    passed, = made
    assert passed["stop"] == {255} and passed["top_k"] == 7 and passed["top_p"] == 0.6
    assert passed["temperature"] == 0.9 and passed["seed"] == 11
    assert passed["min_p"] == 0.2 and passed["repetition_penalty"] == 1.3
    assert '"realised_sparsity": 0.123' in capsys.readouterr().err


def test_the_watch_knows_the_sparsity_of_each_answer(tiny, monkeypatch, capsys):
    asked = []

    class Watch(generate_module.SparsityWatch):
        def watch(self, ids, sparsity):
            asked.append((sparsity, self.session.thresholds[0, 0].item()))
            return ids

    monkeypatch.setattr(generate_module, "SparsityWatch", Watch)
    monkeypatch.setattr(generate_module, "find_thresholds", lambda model, tokenizer, sparsity, *_:
                        torch.full((2, 7), sparsity))
    words = ["--model", tiny, "--chat", "--max-new-tokens", 2, "--sparsity", 0.25]
    monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n/sparsity 0.5\nb\n/sparsity 2\nc\n"))
    generate_module.main()
    assert asked == [(0.25, 0.25), (0.5, 0.5), (0.5, 0.5)]


def test_suggested_commands_can_be_pasted(tiny, monkeypatch, capsys):
    monkeypatch.setattr(generate_module, "find", lambda *_, **__: mock.Mock(
        is_own=lambda model: False, origin=lambda: "a file"))
    generate_module.find_thresholds(None, None, 0.5, name="/my models/it's")
    told = capsys.readouterr().err.rpartition("; python ")[2].partition(" makes ")[0]
    assert shlex.split(told) == ["calibrate.py", "--model", "/my models/it's"]


def test_system_prompt_and_stop_text(tiny, monkeypatch, capsys):
    """--system stands in front of the prompt; --stop ends the answer before its text."""
    def text(*arguments):
        words = ["--model", tiny, "--temperature", 0, "--max-new-tokens", 20, *arguments]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
        generate_module.main()
        return capsys.readouterr().out

    whole = text("--prompt", "abc")
    stop = whole[4:6]
    assert text("--prompt", "abc", "--stop", stop) == whole[:whole.index(stop)] + "\n"
    assert text("--prompt", "abc", "--system", "Be brief.") == text(
        "--raw", "--prompt", "[Be brief.][abc]") != whole


def test_numbers_of_a_run(smollm):
    """Speeds are tokens over the seconds of their own phase."""
    session = Session(smollm[0])
    list(session.generate([1, 2, 3], 4))
    stats = session.measured()
    stats.prefill_seconds, stats.decode_seconds = 0.5, 0.25
    numbers = report(session, stats, 0, None)
    assert numbers["prompt_tokens_per_second"] == 3 / 0.5
    assert numbers["tokens_per_second"] == 3 / 0.25  # the first new token comes from prefill
    assert summary(numbers).startswith("prompt 3 tokens, 6.0 tok/s | new 4 tokens, 12.0 tok/s | ")
    assert "unread" not in summary(numbers | {"realised_sparsity": 0.1})
    session.stats.prefill_seconds = 100.0
    list(session.generate([4, 5], 1))
    assert 100 < session.stats.prefill_seconds < 200 and session.stats.prompt_tokens == 5


def test_numbers_are_those_of_the_answer(tiny):
    """Not of what the session read before with other thresholds."""
    session = Session(checkpoint.load(tiny)[0])
    list(session.generate([1, 2], 4))
    before = session.measured()
    session.set_thresholds(torch.full((2, 7), math.inf))
    list(session.generate([3], 4))
    numbers = report(session, session.measured() - before, 0.5, None)
    assert numbers["realised_sparsity"] == 1 and numbers["ranks"] == 1
    assert numbers["bytes_per_token"] < numbers["block_bytes"]


def test_which_models_break_at_high_sparsity(capsys):
    for n, sparsity, warned in (2.9e9, 0.71, True), (2.9e9, 0.7, False), (3.1e9, 0.9, False):
        matrix = mock.Mock(in_features=n / 2, ends=(1,))
        model = mock.Mock(lm_head=matrix, **{"linears.return_value": [matrix]})
        warn_of_broken_text(model, sparsity)
        assert ("warning" in capsys.readouterr().err) == warned


def test_the_defaults_are_those_of_the_help():
    text = " ".join(run("--help").stdout.decode().split())
    for name, default in generate_module.SAMPLING.items():
        flag = text[text.index(f"--{name.replace('_', '-')} ", text.index("options:")):]
        assert float(re.search(r"\(default: ([^)]*)\)", flag)[1]) == default, name


def test_a_seed_is_new_each_time_and_told_if_it_matters(tiny, monkeypatch, capsys):
    seeds = set()
    for flags in ([], [], ["--temperature", "0"]):
        words = ["--model", str(tiny), "--prompt", "a", "--max-new-tokens", "1", "--json", *flags]
        monkeypatch.setattr(sys, "argv", ["generate.py", *words])
        generate_module.main()
        seeds.add(json.loads(capsys.readouterr().err.splitlines()[-1])["seed"])
    assert len(seeds) == 3 and None in seeds


def test_the_python_api_ends_where_the_model_or_a_stop_text_does(tiny):
    """And puts the first token in front of a text."""
    model, tokenizer = checkpoint.load(tiny)
    text = "".join(generate_module.generate(model, tokenizer, "abc", 9))
    ids = list(generate_module.generate_tokens(model, tokenizer.encode("abc"), 9))
    third = ids.index(ids[3])  # maybe not for the first time
    tokenizer.eos_ids = frozenset({ids[3]})
    assert "".join(generate_module.generate(model, tokenizer, "abc", 9)) == tokenizer.decode(
        ids[:third])
    tokenizer.eos_ids = frozenset()
    short = generate_module.generate(model, tokenizer, "abc", 9, stop=[text[2]])
    assert "".join(short) == text[:text.index(text[2])]
    asked = []
    encode = tokenizer.encode
    tokenizer.encode = lambda *a, **o: asked.append((a, o)) or encode(*a, **o)
    next(generate_module.generate(model, tokenizer, "abc", 2))
    assert asked == [(("abc",), {})]


def test_reader_leaves():
    process = subprocess.Popen(
        command("--prompt", PROMPTS[1], "--max-new-tokens", "2000", "--quantize", "none"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(120) == 0 and process.stderr.read() == b""


def test_interrupt():
    def heed_interrupts():  # a background job, as these tests may be, ignores them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = command(
        "--prompt", "Write a long story.", "--max-new-tokens", "4000", "--temperature", "0"
    )
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    ) as process:
        try:
            process.stdout.read(100)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (
        process.returncode == 0
        and "Traceback" not in error.decode()
        and "MB read per token" in error.decode()
    )


def test_too_little_memory(tiny, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 40_000)
    with pytest.raises(
        ValueError,
        match="the model in float32 needs 0.0 GB of memory, but 0.0 GB are free on cpu; "
        "try --dtype bfloat16 or --quantize int8 or a smaller model",
    ):
        checkpoint.load(tiny)
    expected = 4 * (2 * 2 + 2 + 2 * 2 + 4 * 4 + 3 * 6)
    assert weight_bytes(Config(1, 2, 3, 1, 1, 1, 2), torch.float32) == expected
    with pytest.raises(
        ValueError,
        match="a context of 9999999 tokens needs 1.3 GB .* try a shorter one with --context "
        "or --dtype bfloat16",
    ):
        model = Model(Config(64, 32, 48, 1, 4, 2, 8, context=9_999_999))
        generate_module.open_session(model, context=9_999_999)
    with pytest.raises(ValueError, match="with --context$"):
        model = Model(Config(64, 32, 48, 1, 4, 2, 8, context=9_999_999), torch.bfloat16)
        generate_module.open_session(model, context=9_999_999)


def test_chat_context_that_fits(tiny, tmp_path, monkeypatch, capsys):
    """A chat sets memory aside for the model's longest context, or for less where half of what is
    free is less."""
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    contexts = []
    monkeypatch.setattr(
        generate_module.Chat, "run", lambda chat, _: contexts.append(chat.session.cache.context)
    )
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(folder), "--chat"])
    token = 2 * 2 * 2 * 16 * 2  # bytes: k and v, 2 layers, 2 heads of 16, bfloat16
    for free in (math.inf, 2 * token * 3000, 0):
        monkeypatch.setattr(generate_module, "free_memory", lambda device: free)
        generate_module.main()
    assert contexts == [100_000, 3000, 512]


def test_out_of_memory_is_told(monkeypatch, capsys):
    """Where memory runs out in spite of the checks."""

    def run():
        torch.empty(1 << 55)

    monkeypatch.setattr(sys, "argv", ["generate.py", "--prompt", "x"])
    with pytest.raises(SystemExit, match="2"):
        run_script(run)
    error = capsys.readouterr().err
    assert (
        "out of memory" in error
        and "--quantize int8" in error
        and "GB free" in error
        and error.count("\n") == 1
    )


def test_calibration_that_cannot_be_kept(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    done = run("--model", tiny, "--prompt", "abc", "--sparsity", "0.5", "--max-new-tokens", "3")
    assert done.returncode == 0 and "cannot write the calibration" in done.stderr.decode()


def test_full_disk(tiny):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("--model", tiny, "--prompt", "abc"),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
        )
    assert (
        done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_closed_streams(closed, tiny):
    line = (
        " ".join(
            map(
                shlex.quote,
                command("--model", tiny, "--prompt", "abc", "--max-new-tokens", 5, "--seed", 1),
            )
        )
        + " "
        + closed
    )
    done = subprocess.run(line, shell=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and b"new 5 tokens" in done.stderr


def test_same_text_in_every_process(tiny, request):
    """`pytest --processes 50` runs more of them."""
    arguments = [
        "--model",
        tiny,
        "--prompt",
        "abc",
        "--seed",
        "5",
        "--temperature",
        "1.5",
        "--top-k",
        "0",
        "--max-new-tokens",
        "50",
    ]
    assert (
        len({run(*arguments).stdout for _ in range(request.config.getoption("processes"))}) == 1
    )
