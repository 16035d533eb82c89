"""Every command and example of README.md works, on the default model and shortened where it is
long; so does the example of calibrations/thresholds.py."""

import functools
import re
import runpy
import shlex

import pytest
import torch

import benchmark
import calibrations.thresholds
import checkpoint
from checkpoint.default_model import fetch
from conftest import HERE

# Lines of code are indented by four. A line that begins neither a command nor an example is none.
CODE = [line[4:] for line in (HERE / "README.md").read_text().splitlines()
        if line.startswith("    ") or not line]
COMMANDS = sorted({
    line.partition("   #")[0].rpartition("&& ")[2] for line in CODE
    if line.startswith(("python ", "pip install -r requirements.txt &&"))})
PYTHON = "\n".join(line for line in CODE if not line.startswith(("python ", "pip ")))
EXAMPLES = [block for block in re.split(r"\n{3,}", PYTHON) if "import" in block]
EXAMPLES.append("\n".join(re.findall(r"(?m)^    (.*)", calibrations.thresholds.__doc__)))
CHAINED, ON_A_GPU = r"/tmp/.*\.safetensors|smollm2-int8", r"benchmark\.py --config"
SHORTER = {  # added to a command: of an option that is given twice, the last one counts
    "generate.py": "--max-new-tokens 4 --seed 1",
    "calibrate.py": "--tokens 64 --window 32 --allocation uniform",
    "evaluate.py": "--text README.md --window 64 --windows 1 --offset 0 --sparsity 0 0.5 "
                   "--json /tmp/e.json --plot /tmp/e.png",
    "benchmark.py": "--sparsity 0.5", "quantize.py": ""}


def shortened(command, folder):
    """The command's words after "python", its files in `folder`, with less to do."""
    _, script, *words = shlex.split(command)
    words += shlex.split(SHORTER[script]) if "--help" not in words else []
    return [script, *(word.replace("/tmp/", f"{folder}/") for word in words)]


def test_the_readme_shows_something():
    assert len(COMMANDS) >= 8 and len(EXAMPLES) == 3, (COMMANDS, EXAMPLES)


load = checkpoint.load
load_default = functools.cache(lambda **options: load(**options))


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The project's folder, in which the default model is loaded once for all that ask alike."""
    def load_once(model=None, **options):
        if model is None or getattr(model, "files", None) == [fetch()]:
            return load_default(**options)
        return load(model, **options)

    monkeypatch.chdir(HERE)
    monkeypatch.setattr("cli.command_line.load", load_once)
    monkeypatch.setattr("checkpoint.load", load_once)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", [
    c for c in COMMANDS if not re.search(f"{CHAINED}|{ON_A_GPU}", c)])
def test_command(run, command, folder):
    check(run, command, folder)


@pytest.mark.parametrize("pattern", CHAINED.split("|"))
def test_commands_that_follow_each_other(run, pattern, folder):
    """The first writes what the second reads: calibrate or quantize, then generate."""
    commands = sorted((c for c in COMMANDS if re.search(pattern, c)),
                      key=lambda c: "generate.py" in c)
    assert len(commands) == 2
    for command in commands:
        check(run, command, folder)


def check(run, command, folder):
    """The command works, in this process, and prints what it should."""
    words = shortened(command, folder)

    def main():
        runpy.run_path(words[0], run_name="__main__")

    code, out, err = run(main, *words[1:], stdin="Hi\n", name=words[0])  # a line for --chat
    expected = printed(words)
    assert code == 0 and re.search(expected[0], out) and re.search(expected[1], err), (out, err)


def printed(words):
    """Patterns of what a command prints: on standard output, and on standard error."""
    script = words[0]
    if "--help" in words:
        return rf"^usage: {script} ", "^$"
    if script == "quantize.py":
        return rf"^{words[-1]}: 2\d\d\.\d MB, made from 98\.4 MB$", ""
    if script == "calibrate.py":
        return rf"^{words[words.index('--out') + 1]}$", ""
    if script == "evaluate.py":
        rows = r"\nuniform +0\.50 +0\.[45]\d+ +\d+\.\d\d "
        return rf"^allocation [^\n]*\ndense +0\.00 +0\.000 +\d+\.\d\d (.|\n)*{rows}", ""
    # generate.py: a text, and the numbers of a run
    numbers = r"\| new 4 tokens, [\d.]+ tok/s \| seed 1 \| [\d.]+ MB read per token"
    if "--sparsity" in words:
        asked = float(words[words.index("--sparsity") + 1])
        int8 = any("int8" in word for word in words)
        size = "106.2" if int8 else "212.3" if torch.cuda.is_available() else "53.1"
        numbers += rf" \| [3-6]\d\.\d% of the blocks' {size} MB unread \({asked:.0%} asked\)"
    return r"\w{2,}", numbers + r"\n$"


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(ON_A_GPU, c)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes where there is a GPU")
def test_benchmark_says_that_it_needs_a_gpu(run, command):
    code, _, err = run(benchmark.main, *shlex.split(command)[2:])
    assert code == 2 and "no GPU" in err


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(example, capsys):
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    if "import generate" in example:
        assert "Paris" in capsys.readouterr().out
    elif "sparse_gemv" in example:
        dropped = (names["x"].abs() <= names["threshold"]).float().mean()
        assert names["y"].shape == (1, 11008) and 0.49 < dropped < 0.51
    else:  # Llama-2-13B has 40 layers
        assert names["metadata"]["allocation"] == "greedy"
        assert names["q_at_half"].shape == (40,) and names["q_at_half"].gt(0).all()
