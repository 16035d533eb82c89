"""Tests of the code's shape: who imports whom, and how long lines and files are."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest

from conftest import HERE

FOLDERS = ("", "cpu", "gpu", "checkpoint", "calibrations", "cli", "examples", "results", "tests")
FILES = [file for folder in FOLDERS for file in sorted((HERE / folder).glob("*.py"))]


def module_name(file):
    """checkpoint/hub.py -> checkpoint.hub; checkpoint/__init__.py -> checkpoint"""
    parts = file.relative_to(HERE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(name):
    """The project's modules that a module imports, those inside functions included.

    Importing checkpoint.hub also runs checkpoint/__init__.py. That counts for everybody but the
    modules of the package, whose parent is on its way already.
    """
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; write the name out"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"  # of from checkpoint import memory
                found.add(module if module in MODULES else node.module)
    package = name.partition(".")[0]
    parents = {module.rpartition(".")[0] for module in found} - {package}
    return {module for module in found | parents if module in MODULES} - {name}


GRAPH = {name: imports(name) for name in MODULES}


def test_no_circles():
    """And nobody imports a test."""
    assert {"model", "checkpoint", "checkpoint.hub", "generate", "tests.test_house"} <= GRAPH.keys()
    assert "checkpoint.hub" in GRAPH["checkpoint"] and "checkpoint" in GRAPH["cli.command_line"]
    list(graphlib.TopologicalSorter(GRAPH).static_order())  # raises CycleError and names it
    for name, found in GRAPH.items():
        assert not any(".test_" in f".{other}" for other in found), name


@pytest.mark.parametrize("name, needs", [
    ("model", set()), ("sparse_gemv", set()), ("gpu.decode_attention", set()),
    ("sparse_linear", {"sparse_gemv"})])
def test_files_that_copy_alone(name, needs):
    assert GRAPH[name] == needs


def test_the_top_level_is_small():
    if not (HERE / ".git").exists():
        pytest.skip("the tree may hold more than the project")
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout
    top = {line.partition("/")[0] for line in listed.split("\n") if line}
    assert sum(name.startswith("test_") for name in top) <= 10 and len(top) <= 40
    assert sum(f"{name}.py" in top for name in MODULES if "test_" not in name) <= 14


def test_the_command_line_alone_knows_of_torchrun():
    users = {name for name, found in GRAPH.items() if "tensor_parallel" in found}
    assert {name for name in users if "test_" not in name} == {
        "benchmark", "generate", "cli.chat", "cli.command_line", "cli.report"}


def test_a_cpu_needs_no_triton():
    """Nor do the tests that it can run."""
    code = """
import sys
sys.modules["triton"] = None
import benchmark, calibrate, evaluate, generate, quantize
from conftest import CONFIGS, random_model
print(list(generate.generate_tokens(random_model(CONFIGS["llama"], device="cpu"), [5], 3)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.split(",")) == 3, done.stderr


def test_what_a_captured_graph_may_read_is_never_freed():
    """A cache of tensors with an end would free the oldest."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            for decorator in getattr(node, "decorator_list", ()):
                if "lru_cache" in ast.unparse(decorator):
                    assert ast.unparse(decorator) == "functools.lru_cache(maxsize=None)", node.name


def test_offsets_have_64_bits_from_2_to_the_31_on():
    """Of every kernel that reads weights; test_sparse_gemv.py has 2 GB of them for one."""
    tests = [ast.unparse(node.test) for file in FILES for node in ast.walk(
        ast.parse(file.read_text())) if isinstance(node, ast.IfExp) and ".to(tl.int64)"
        in ast.unparse(node.body)]
    assert len(tests) >= 5 and all(test.endswith(">= 2 ** 31") for test in tests), tests


def test_kernels_are_launched_on_the_device_of_their_tensors():
    """Triton launches on the current device, which need not be that."""
    launches = 0
    for tree in (ast.parse(file.read_text()) for file in FILES):
        inside = {node for block in ast.walk(tree) if isinstance(block, ast.With) and "device_of"
                  in ast.unparse(block.items) for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.match(r"_\w+_kernel\[", ast.unparse(node.func)):
                assert node in inside, ast.unparse(node.func)
                launches += 1
    assert launches >= 13


def test_lines_have_at_most_100_columns():
    for file in FILES:
        for i, line in enumerate(file.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{file.relative_to(HERE)}:{i} has {len(line)} columns"


def test_the_course_is_short():
    course = [HERE / f"{name}.py" for name in ("model", "sparse_gemv", "decode", "generate")]
    lines = {file.name: len(file.read_text().splitlines()) for file in course}
    assert max(lines.values()) <= 350 and lines["model.py"] <= 320, lines
    assert sum(file.stat().st_size for file in course) <= 60_000
    start = course[0].read_text().splitlines()[:150]  # attention comes early
    assert any(line.strip().startswith("def attention(") for line in start)
