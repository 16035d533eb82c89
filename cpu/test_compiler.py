"""Tests of how step.c becomes a library: which compiler, under which name, whole or not at all;
and of the memory and the threads that it touches."""

import os
import subprocess
import sys

import pytest
import torch

from conftest import CONFIGS, HERE, random_model
from cpu import compiler, matrix
from cpu.compiler import NoCompiler
from decode import CpuDecoder
from model import KVCache
from quantize import Int4Linear

try:
    has_compiler = bool(compiler.compiler())
except NoCompiler:
    has_compiler = False
needs_compiler = pytest.mark.skipif(not has_compiler, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def forget():
    compiler.outcomes.clear()
    yield
    compiler.outcomes.clear()


@pytest.fixture
def two(tmp_path):
    """A little program."""
    (tmp_path / "two.c").write_text("int two(void) { return 2; }")
    return tmp_path / "two.c"


@pytest.mark.parametrize("there, module, wanted", [
    ({"cc", "gcc", "clang"}, True, ["cc"]), ({"gcc", "clang"}, True, ["gcc"]),
    ({"clang"}, True, ["clang"]), (set(), True, [sys.executable, "-m", "ziglang", "cc"]),
    (set(), False, None)])
def test_which_compiler(there, module, wanted, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name in there or None)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: module or None)
    if wanted is None:
        with pytest.raises(NoCompiler, match="pip install ziglang"):
            compiler.compiler()
    else:
        assert compiler.compiler() == wanted
    monkeypatch.setenv("CC", "ccache 'my cc'")  # what the user names wins
    assert compiler.compiler() == ["ccache", "my cc"]


@needs_compiler
def test_the_name_holds_what_the_library_depends_on(two, tmp_path, monkeypatch):
    cache, wall = tmp_path / "cache", tmp_path / "wall"
    wall.write_text("a file where a folder should be")
    assert compiler.open_library(two, (), wall / "cache").two() == 2
    assert sorted(tmp_path.iterdir()) == [two, wall]
    assert compiler.open_library(two, (), cache).two() == 2
    compiler.open_library(two, ("-DX",), cache)
    with monkeypatch.context() as patch:  # another compiler of this name, or another processor
        patch.setattr(compiler, "run", lambda command, run=compiler.run: (
            (True, "another") if "-dM" in command else run(command)))
        compiler.open_library(two, (), cache)
    two.write_text("int two(void) { return 1 + 1; }")
    assert compiler.open_library(two, (), cache).two() == 2
    assert [path.suffix for path in cache.iterdir()] == [".so"] * 4
    monkeypatch.setattr(compiler, "build", None)  # from now on nothing is compiled
    compiler.open_library(two, (), cache)


@needs_compiler
def test_processes_at_once(two, tmp_path):
    """Every one gets a whole library, and one library stays."""
    program = ("import sys; from pathlib import Path; from cpu import compiler; "
               "print(compiler.open_library(Path(sys.argv[1]), (), Path(sys.argv[2])).two())")
    words = [sys.executable, "-c", program, two, tmp_path / "cache"]
    started = [subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    assert [process.communicate()[0] for process in started] == ["2\n"] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("command, words", [
    ("no-such-compiler", "no-such-compiler"), (f"{sys.executable} -c 1/0", "cannot compile step.c"),
    (f"{sys.executable} -c 'import sys; a = sys.argv; open(a[a.index(\"-o\") + 1], \"w\")'",
     "cannot be loaded")])
def test_without_a_compiler_decoding_is_right_and_says_so_once(
        command, words, monkeypatch, capfd, tmp_path):
    """A compiler that is missing, fails or makes nothing useful: one sentence, nothing left
    behind."""
    model, chosen, x = random_model(CONFIGS["qwen2"]), [], torch.randn(3, 40)
    int4 = Int4Linear(0, "gate_up", 40, (416, 64), False, torch.float32, "cpu")
    for i, width in enumerate(int4.widths):
        int4.load_weight(i, torch.randn(width, 40))
    monkeypatch.setattr(matrix, "PIECE", 1)  # two pieces of the first projection
    for cc in (None, command, command):
        if cc:
            monkeypatch.setenv("CC", cc)
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        compiler.outcomes.clear()
        cache = KVCache(model.config, 160)
        model.forward(torch.arange(5), cache)
        decoder = CpuDecoder(model, cache, lambda logits: logits.argmax(keepdim=True))
        decoder.set_thresholds(torch.full((2, 7), 0.3))
        decoder.start(7, 5)
        chosen.append((list(decoder.tokens(4)), decoder.kept.tolist()))
        assert cache.length == 5
        chosen[-1] += (int4(x),)
    monkeypatch.setattr(compiler, "run", None)  # what failed is not tried again
    assert not compiler.has_library()
    torch.testing.assert_close(chosen[0][2], chosen[1][2])
    if has_compiler:
        assert chosen[0][:2] == chosen[1][:2]
    assert chosen[1][:2] == chosen[2][:2] and 0 < sum(chosen[1][1][0])
    errors = capfd.readouterr().err.splitlines()
    assert len(errors) == (1 if has_compiler else 2), errors
    assert words in errors[-1] and "pip install ziglang" in errors[-1]
    left = [path.suffix for path in (tmp_path / "nanoteal").iterdir()]
    assert left == [".so"] * (words == "cannot be loaded")


@needs_compiler
@pytest.mark.parametrize("kind, runtime", [
    ("address,undefined", "libasan.so"), ("thread", "libtsan.so")])
def test_sanitizers(kind, runtime):
    """Steps of an odd little model on four threads: no stray access, no overflow, no race."""
    done, path = compiler.run([*compiler.compiler(), f"-print-file-name={runtime}"])
    if not done or not os.path.isabs(path.strip()):
        pytest.skip(f"the compiler has no {runtime}")
    environment = os.environ | {"LD_PRELOAD": path.strip(), "ASAN_OPTIONS": "detect_leaks=0",
                                "TSAN_OPTIONS": "exitcode=66", "UBSAN_OPTIONS": "halt_on_error=1"}
    program = "import sys; from cpu import test_step; test_step.run_for_sanitizers(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, f"-fsanitize={kind}"],
                          cwd=HERE, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel's addresses are too random for ThreadSanitizer")
    assert done.returncode == 0 and "anitizer" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.startswith("fine True")
