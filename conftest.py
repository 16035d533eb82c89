"""Settings, options and fixtures of the tests, and the one reference of all products."""

import collections
import io
import json
import math
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

# As in generate.py, before anything imports PyTorch.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from checkpoint.tensors import put, tensor_shapes
from cli.command_line import run_script
from lm_head import limits
from model import Config, Linear, Model

try:
    import sparse_gemv
    from sparse_gemv import INTERPRETED
except ImportError:  # without Triton, only a CPU's tests are collected
    INTERPRETED, collect_ignore_glob = False, ["gpu/*", "test_sparse_*.py", "test_decode.py"]

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNELS = DEVICE == "cuda" or INTERPRETED  # whether Triton code can run
needs_kernels = pytest.mark.skipif(not KERNELS, reason="needs a GPU or TRITON_INTERPRET=1")
# What an output's rounding may be off, relative to the whole vector; the interpreter cuts bfloat16
# off where the hardware rounds to nearest.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3,
             torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}
HERE = Path(__file__).parent
SEED = random.SystemRandom().randrange(2**32)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1500,
                     help="mutated files in test_fuzz.py (default: %(default)s)")
    parser.addoption("--processes", type=int, default=1,
                     help="processes that must write the same text (default: %(default)s)")


@pytest.fixture(scope="session")
def smollm():
    """The default model and its tokenizer, in float32."""
    import checkpoint

    return checkpoint.load()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that keeps this test's calibrations; the user's keeps the compiled step.c."""
    monkeypatch.setattr("calibrations.thresholds.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


# ---- kernels -----------------------------------------------------------------------------------

@pytest.fixture
def seed():
    """A seed that a failing test prints."""
    print("seed", SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def any_head(monkeypatch):
    """Bounds of LM heads of any size."""
    monkeypatch.setattr("lm_head.LEAST_WEIGHTS", 0)


@pytest.fixture
def poisoned(monkeypatch):
    """Before each call of a kernel, all that its programs hand over is NaN or out of range: what
    one of them reads must have been written in this call."""
    real = sparse_gemv.workspace

    def workspace(device, *parts):
        buffers = real(device, *parts)
        for buffer in buffers[:-1]:  # the last one may count programs, and be 0 as it must
            buffer.fill_(float("nan") if buffer.is_floating_point() else 1 << 30)
        return buffers

    for module in list(sys.modules.values()):
        if getattr(module, "workspace", None) is real:
            monkeypatch.setattr(module, "workspace", workspace)


def reference(x, w_t, thresholds, *, ends=None, scale=None, bias=None, norm=None, swiglu=False,
              residual=None, kept=None):
    """The definition of a product with all that may be fused into it: the arguments of
    `product_by_lists`, in plain PyTorch, sums in float64. Returns float64 [N]."""
    dtype, x = x.dtype, x.reshape(-1).double()
    if swiglu:
        gate, up = x.chunk(2)
        x = F.silu(gate) * up
    if norm is not None:
        x = F.rms_norm(x, x.shape, norm[0].double(), norm[1])
    x, y, start = x.to(dtype), [], 0
    ends = ends or (w_t.shape[1],)
    thresholds = torch.as_tensor(-1.0 if thresholds is None else thresholds, device=x.device)
    for i, (t, end) in enumerate(zip(thresholds.float().view(-1).expand(len(ends)), ends)):
        keep = ~(x.float().abs() <= t)
        y.append(x[keep].double() @ w_t[keep, start:end].double())
        if kept is not None:
            kept[i] += keep.sum()
        start = end
    y = torch.cat(y)
    y = y if scale is None else y * scale.double()
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


def error(y, expected):
    """Relative to the size of the whole vector, or to 1 for each of its elements, if more; NaN
    never passes."""
    y, expected = y.double().view(-1), expected.double().view(-1)
    return ((y - expected).norm() / expected.norm().clamp(min=len(y) ** 0.5)).item()


# ---- LM heads with bounds -----------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def scaled_rows(w, x, low, high):
    w *= 10 ** (torch.rand(len(w), 1) * (high - low) + low)


def near_ties(w, x):
    """Many rows close to the best, by less than any bound tells, and two that are equal."""
    best = (w @ x).argmax()
    w[::3] = w[best] * (1 + 1e-6 * torch.randn(len(w[::3]), 1))
    w[7] = w[-2]


def close_to_the_end(w, x):
    """The largest logit is beyond float16, the others far below."""
    w[5] = x / x.norm() ** 2 * 70000


HEADS = {  # changes W [V, K] and x [K] in place; whether the largest logits are finite
    "random": (lambda w, x: None, True),
    "near ties": (near_ties, True),
    "all rows equal": (lambda w, x: w.copy_(w[3].clone()), True),
    "a row of zeros": (lambda w, x: w[11].zero_(), True),
    "zeros": (lambda w, x: w.zero_(), True),
    "negative logits": (lambda w, x: w.copy_(-x + 0.1 * w), True),
    "hugely negative logits": (lambda w, x: w.copy_(-1e34 * x * (1 + torch.rand(len(w), 1))), None),
    "sums beyond 2**31": (lambda w, x: (x.fill_(1), w[3].fill_(1)), True),  # of integers
    "rows of all sizes": (lambda w, x: scaled_rows(w, x, -3, 2), True),
    "huge and tiny rows": (lambda w, x: scaled_rows(w, x, -44, 36), None),
    "tiny rows": (lambda w, x: scaled_rows(w, x, -44, -38), True),
    "an outlier in x": (lambda w, x: x[3].fill_(1000.0), True),
    "an outlier in W": (lambda w, x: w[9, 3].fill_(1000.0), True),
    "x is zero": (lambda w, x: x.zero_(), True),
    "NaN in W": (lambda w, x: w[2, 5].fill_(NAN), False),
    "infinity in W": (lambda w, x: w[2, 5].fill_(INF), False),
    "NaN in x": (lambda w, x: x[1].fill_(NAN), False),
    "infinity in x": (lambda w, x: x[1].fill_(-INF), False),
    "close to the end of float16": (close_to_the_end, None),
}
HEAD_SIZES = ((300, 64, 1), (403, 100, 3), (70, 960, 1))  # V, K, how many logits matter


def make_head(v, k, dtype, change, device=DEVICE):
    """(x [K], LM head, norm): the case that `change` makes."""
    w, x = torch.randn(v, k) * k ** -0.5, torch.randn(k)
    change(w, x)
    head = Linear(None, "lm_head", k, (v,), False, dtype, device)
    head.load_weight(0, w.to(device))
    norm = (torch.rand(k, device=device) + 0.5).to(dtype)
    return x.to(device, dtype), head, (norm, 1e-5)


def check_head(whole, some, n_read, top, choose):
    """What is read has the whole head's bits, and the `top` largest are read, and all that tie."""
    read = some != limits(some.dtype)[1]  # true for a NaN
    assert torch.equal(whole[read].nan_to_num(nan=7), some[read].nan_to_num(nan=7))
    assert n_read == read.sum() > 0
    assert choose(some).tolist() == choose(whole).tolist()
    if whole.isfinite().all():
        assert torch.equal(whole.float().topk(top).values, some.float().topk(top).values)
        assert read[whole >= whole.float().topk(top).values[-1]].all()


# ---- models ------------------------------------------------------------------------------------

def random_model(config, linear=Linear, device=DEVICE):
    model = Model(config, torch.float32, device, linear)
    for tensor in [model.norm] + [
        value for block in model.blocks for name, value in vars(block).items() if "norm" in name
    ]:
        tensor.normal_()
    for matrix in [*model.linears(), model.lm_head]:
        for i, width in enumerate(matrix.widths):
            weight = torch.randn(width, matrix.in_features) * matrix.in_features**-0.5
            matrix.load_weight(i, weight.to(device))
            if matrix.bias is not None:
                matrix.load_bias(i, torch.randn(width))
    if model.embedding is not None:
        model.embedding.normal_()
    return model


CONFIGS = {
    "llama": Config(101, 48, 80, 2, 6, 2, 16, context=160, tie_embeddings=True),
    "mistral": Config(101, 64, 96, 2, 4, 4, 16, context=160, sliding_window=20),
    "ministral3": Config(101, 48, 80, 2, 6, 2, 16, context=160, query_growth=(0.9, 8)),
    "olmo3": Config(101, 48, 80, 2, 6, 2, 16, context=160, qk_norm="all", norms_after=True,
                    sliding_window=20, full_layers=(1,), rope_divisors=(1, 1, 1, 2, 4, 8, 8, 8),
                    rope_factor=1.2),
    "qwen3": Config(101, 48, 80, 2, 3, 1, 24, context=160, qk_norm="head"),
    "phi-4-mini": Config(101, 48, 80, 2, 6, 2, 16, context=160, rope_factor=1.2,
                         rope_divisors=(1, 1, 1, 2, 4, 8, math.inf, math.inf)),
    "smollm3": Config(101, 48, 80, 2, 6, 2, 16, context=160, no_rope_layers=(1,)),
    "olmo2": Config(101, 48, 80, 2, 6, 2, 16, context=160, qk_norm="all", norms_after=True),
    # products of one kernel and of two: 64 columns divide all matrices but gate and up
    "both forms": Config(101, 64, 96, 2, 4, 2, 32, context=160),
    "qwen2": Config(101, 48, 80, 2, 3, 1, 16, context=160, qkv_bias=True),
}


CONFIG = Config(vocab_size=64, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4,
                n_kv_heads=2, head_dim=8)


def tiny_model(seed=0):
    """A model of CONFIG with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(CONFIG)
    for name, shape in tensor_shapes(CONFIG).items():
        noise = torch.randn(shape, generator=generator)
        put(model, name, 1 + 0.1 * noise if "norm" in name else noise / shape[-1] ** 0.5)
    return model


def write_llama(folder, **changes):
    """A random Llama of transformers whose text is bytes, in a folder."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = transformers.LlamaConfig(
        vocab_size=256, bos_token_id=None, architectures=["LlamaForCausalLM"], **changes)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    torch.manual_seed(0)
    weights = transformers.LlamaForCausalLM(config).state_dict()
    for name in weights:
        if name.endswith("bias"):
            weights[name].normal_(0, 0.2)
    save_file({name: t.clone() for name, t in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of a random model with a chat template and a context of 64; its text is bytes."""
    folder = write_llama(
        tmp_path_factory.mktemp("tiny"), hidden_size=32, intermediate_size=48, eos_token_id=255,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


# ---- scripts -----------------------------------------------------------------------------------

class Letters:
    """A tokenizer of single letters."""

    eos_ids, bos_id, has_chat_template = frozenset({0}), None, False

    def encode(self, text, bos=True):
        return [ord(letter) % CONFIG.vocab_size for letter in text]


Ended = collections.namedtuple("Ended", "code out err")


@pytest.fixture
def run(monkeypatch, capfd):
    """A function that runs a script's main() in this process as if it were started with these
    words and this standard input -> Ended: exit code, standard output, standard error."""
    def run(main, *words, stdin="", name=None):
        name = name or Path(main.__code__.co_filename).name
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        stdin = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        n_threads, code = torch.get_num_threads(), 0
        try:
            run_script(main)
        except SystemExit as exit:
            code = exit.code
        finally:
            torch.set_num_threads(n_threads)
        return Ended(code, *capfd.readouterr())

    return run


# Processes of scripts are forked from one that has imported all: an import takes seconds.
SERVER = multiprocessing.get_context("forkserver" if DEVICE == "cpu" else "spawn")
SERVER.set_forkserver_preload(["benchmark", "generate", "conftest"])


def start(main, *words, streams, **environment):
    """A process that runs a script's main(), as from a shell.

    streams: paths of standard input, output and error; None for one that is closed
    """
    words = [Path(main.__code__.co_filename).name, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    process = SERVER.Process(target=in_process, daemon=True, args=(
        main, words, [path and str(path) for path in streams], dict(environment)))
    process.start()
    return process


def in_process(main, words, streams, environment):
    """What a process of `start` does."""
    os.environ.update(environment)
    if str(streams[0]).startswith("/dev/pts/"):
        os.setsid()  # so that the terminal becomes its own
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for i, path in enumerate(streams):
        os.close(i)
        if path is not None:
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT if i else os.O_RDONLY), i)
    sys.argv = words
    for i, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        setattr(sys, name, None if streams[i] is None else open(i, mode, closefd=False))
    torch.set_num_threads(1)
    run_script(main)


PROMPTS = [
    "Explain in one sentence why the sky is blue.",
    "Write a haiku about rivers.",
    "What is 17 plus 25?",
    "def fibonacci(n):",
    "Übersetze ins Englische: Der Hund schläft. 🐕",
]


def ask(tokenizer, question):
    return tokenizer.chat([{"role": "user", "content": question}])
