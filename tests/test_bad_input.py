"""What each script says of bad input: one sentence, exit code 2, before any work is done."""

import shlex

import pytest
import torch

import benchmark
import calibrate
import checkpoint
import evaluate
import generate
from calibrations import convert
from cli import quantize_folder
from conftest import HERE
from examples import tasks
from results import draw

# What must not begin, and what stands before a row's words: of options given twice, the last counts
SCRIPTS = {
    "generate": (generate.main, [(generate, "Session")], "--prompt x"),
    "calibrate": (calibrate.main, [(calibrate, "write_text"), (calibrate, "count")],
                  "--model TINY --window 32"),
    "evaluate": (evaluate.main, [(evaluate, "score")],
                 "--model TINY --text TEXT --window 32 --calibration UNIFORM"),
    "benchmark": (benchmark.main, [(benchmark, "read_bandwidth")], "--device cpu"),
    "quantize": (quantize_folder.main, [(quantize_folder, "write_weights")], "--model TINY"),
    "tasks": (tasks.main, [(tasks, "load_model")], "--tasks words"),
    "draw": (draw.main, [(draw, "load")], ""), "convert": (convert.main, [], "")}
# Scripts, words, what the sentence says. Words in capitals are files, see `files`.
ROWS = """
generate evaluate benchmark tasks | --sparsity 0.96 | '0.96' is not a number from 0 to 0.95
generate  | --sparsity nan | 'nan' is not a number from 0 to 0.95
generate  | --top-p 1.5 | '1.5' is not a number from 0 to 1
generate  | --max-new-tokens 0 | '0' is not a whole number from 1
generate  | --dtype int3 | invalid choice: 'int3'
generate calibrate | --device abacus | device 'abacus' is not available
generate  | --chat --raw | give one of them
generate  | --raw --no-thinking | --thinking needs the chat template
generate  | --raw --system y | --system needs the chat template
generate  | --no-thinking --model TINY | no switch for --thinking
generate  | --stop '' | the text is empty
generate  | --calibration TINY | --calibration needs --sparsity S
generate benchmark | --model /no/such/model | /no/such/model does not exist
generate  | --context 65 --model TINY | context 65 is outside 1 to 64
generate  | --sparsity 0.3 --calibration /no/such/file --model TINY | /no/such/file
generate  | --chat --sparsity 0.3 --calibration /no/such/file --model TINY | /no/such/file
generate  | --sparsity 0.3 --calibration DEFAULT --model TINY | belongs to another model
calibrate evaluate | --text nowhere.txt | nowhere.txt
calibrate | --text TEXT --window 99 | is outside 9 to 64
calibrate | --text TEXT --window 8 | is outside 9 to 64
calibrate | --text TEXT --tokens 31 | 31 tokens do not fill one window of 32
calibrate | --tokens 0 | argument --tokens: '0' is not a whole number from 1
calibrate | --tokens 1e3 | argument --tokens: '1e3' is not a whole number
calibrate | --out /proc/c | cannot write /proc/c (No such file or directory); name another
calibrate evaluate | --text LATIN | is not UTF-8 text (byte 1); convert it, or name another file
calibrate | --text TEXT --seed 0 | --seed is of the self-written text
calibrate | --text TEXT --seed -1 | argument --seed: '-1' is not a whole number from 0
evaluate  | --window 3 | --window 3 is outside 4 to 64
evaluate  | --window 65 | --window 65 is outside 4 to 64
evaluate  | --windows 99 | the text holds 16 windows of 32 tokens
evaluate  | --offset 15 --windows 2 | the text holds 16 windows of 32 tokens
evaluate  | --windows 0 | argument --windows: '0' is not a whole number from 1
evaluate  | --offset -1 | argument --offset: '-1' is not a whole number from 0
evaluate  | --calibration nowhere.safetensors | nowhere.safetensors
evaluate  | --allocation fisher | no fisher calibration
evaluate  | --calibration UNIFORM UNIFORM | is a second uniform calibration
evaluate  | --sparsity 0 --allocation uniform | --calibration needs a --sparsity above 0
evaluate  | --plot FOLDER | it is a folder
benchmark | --timeline | --timeline needs a GPU, and cpu is not a GPU
benchmark | --model m --config llama-3-8b | name two models
benchmark | --sparsity 0 0.96 | '0.96' is not a number from 0 to 0.95
benchmark | --context 0 | '0' is not a whole number from 1
benchmark | --model TINY --context 9 65 | --context 65 is longer than this model's text of
benchmark | --config llama-2-7b --context 9 5000 | --context 5000 is longer than this model's
benchmark | --config huge | invalid choice: 'huge'
benchmark | --model TINY --json FOLDER | it is a folder
evaluate benchmark tasks | --model TINY --json TEXT/a.json | name another file with --json
evaluate benchmark | --model TINY --json /proc/a.json | cannot write /proc/a.json
quantize  | --out FOLDER | exists already; name a new or an empty folder with --out
quantize  | --out TEXT/out | cannot write
quantize  | --out o --model /no/such/model | /no/such/model does not exist
quantize  | --quantize int4 | arguments are required: --out
tasks     | --tasks humaneval | allow it with --execute
draw      | | arguments are required: FILE.png
convert   | all | unrecognized arguments: all
"""


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    """{the word in capitals: its file}"""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text").write_text("The quick brown fox jumps over the lazy dog. " * 12)
    (folder / "latin").write_bytes("né".encode("latin-1") + b"e")
    calibrate.calibrate(checkpoint.load(tiny)[0], torch.arange(256).flip(0), 64, "uniform").save(
        folder / "uniform")
    default = HERE / "calibrations" / "smollm2-135m-instruct.safetensors"
    return {"TINY": tiny, "TEXT": folder / "text", "LATIN": folder / "latin", "FOLDER": folder,
            "UNIFORM": folder / "uniform", "DEFAULT": default}


@pytest.mark.parametrize("name, words, sentence", [
    (name, *map(str.strip, rest)) for row in ROWS.strip().splitlines()
    for names, *rest in [row.split("|")] for name in names.split()])
def test_it_is_refused_in_one_sentence(run, files, name, words, sentence, monkeypatch, tmp_path):
    main, work, before = SCRIPTS[name]
    for module, function in work:
        monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("works"))
    monkeypatch.chdir(tmp_path)
    left = sorted(files["FOLDER"].rglob("*"))
    words = shlex.split(f"{before} {words}")
    for word, file in files.items():
        words = [w.replace(word, str(file)) if w.partition("/")[0] == word else w for w in words]
    code, out, err = run(main, *words)
    assert code == 2 and sentence in err and not out
    assert ": error: " in err and err.count("\n") == 1
    assert sorted(files["FOLDER"].rglob("*")) == left and not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("words, sentence", [
    ([], "there is nothing to do"), (["--raw", "--prompt", "", "--model", "TINY"], "is empty"),
    (["--prompt", "x" * 80, "--model", "TINY"], "82 tokens, more than the context of 64"),
    (["--prompt", "-"], "standard input is closed"), (["--chat"], "standard input is closed")])
def test_nothing_to_answer(run, tiny, words, sentence, monkeypatch):
    if "closed" in sentence:
        monkeypatch.setattr("io.TextIOWrapper", lambda *_: None)
    code, out, err = run(generate.main, *[tiny if word == "TINY" else word for word in words])
    assert code == 2 and sentence in err and err.count("\n") == 1 and not out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_large_model_meets_no_cpu_by_accident(run):
    code, _, err = run(benchmark.main, "--config", "llama-2-7b")
    assert code == 2 and "no GPU" in err and err.count("\n") == 1
