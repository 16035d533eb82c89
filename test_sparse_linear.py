"""SparseLinear and calibrate_module, alone and in transformers' models. Run on a GPU if there is
one."""

import copy
import runpy

import pytest
import torch
import transformers
from torch import nn

from calibrate import CalibrationError, calibrate_module
from conftest import HERE
from sparse_linear import SparseLinear, replace_linears

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = torch.float32, torch.float16, torch.bfloat16


def linear(k=96, n=160, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(k, n, bias, device=DEVICE, dtype=dtype).requires_grad_(False)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(y, expected, dtype):
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]
    assert y.dtype == dtype and y.shape == expected.shape
    assert (y.double() - expected).norm() <= tolerance * expected.norm()


# ---- SparseLinear ------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n, bias", [(96, 160, True), (577, 33, False), (1, 1, True)])
def test_one_token_is_sparse_and_more_are_dense(k, n, bias, dtype):
    old = linear(k, n, bias, dtype)
    new, double = SparseLinear.from_linear(old, 0.6), copy.deepcopy(old).double()
    stored = sum(t.numel() for t in (*new.parameters(), *new.buffers()))
    assert stored == k * n + n * bias + 1  # the weight once
    for shape in ((k,), (1, k), (1, 1, k)):
        x = tokens(*shape, dtype=dtype)
        close(new(x), double(torch.where(x.float().abs() <= 0.6, 0, x).double()), dtype)
    x = tokens(2, 3, k, dtype=dtype)
    close(new(x), double(x.double()), dtype)
    new.threshold.fill_(-1)
    close(new(x[:1, :1]), double(x[:1, :1].double()), dtype)
    new.threshold.fill_(1e9)
    assert torch.equal(new(x[0, 0]), old.bias if bias else torch.zeros_like(new(x[0, 0])))


def test_state_dicts_and_other_dtypes():
    old, new = SparseLinear.from_linear(linear(), 0.3), SparseLinear(96, 160, device=DEVICE)
    new.load_state_dict(old.state_dict())
    x = tokens(1, 96)
    assert torch.equal(new(x), old(x)) and new.threshold.item() == old.threshold.item()
    new.load_state_dict(linear().state_dict(), strict=False)  # an nn.Linear's, too
    assert {*old.state_dict()} == {"weight", "bias", "threshold"}
    assert torch.equal(new.w_t, linear().weight.T) and torch.equal(new.bias, linear().bias)
    assert new.bfloat16().w_t.dtype == torch.bfloat16 and torch.equal(
        new.threshold, torch.tensor([0.3], device=DEVICE))  # not rounded


def test_compiled_whole_and_thresholds_change():
    model = nn.Sequential(SparseLinear.from_linear(linear(96, 160), 0.5), nn.SiLU(),
                          SparseLinear.from_linear(linear(160, 96), 0.05))
    how = {"mode": "reduce-overhead"} if DEVICE == "cuda" else {"backend": "aot_eager"}  # is fast
    compiled = torch.compile(model, fullgraph=True, **how)
    with torch.no_grad():
        for threshold in (0.5, -1.0, 0.9, 1e9):
            model[0].threshold.fill_(threshold)
            for _ in range(3):  # warm-up, capture, replay
                x = tokens(1, 1, 96)
                torch.testing.assert_close(compiled(x), model(x))
        x = tokens(1, 5, 96)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def with_weight(change):
    layer = linear()
    layer.weight = nn.Parameter(change(layer.weight), requires_grad=False)
    return layer


@pytest.mark.parametrize("make, threshold, message", [
    (lambda: nn.Linear(4, 5, device="meta"), -1, "on meta; load"),
    (lambda: with_weight(torch.Tensor.char), -1, "int8"),
    (lambda: with_weight(lambda w: w[:, :95]), -1, r"\(160, 95\) .* \(160, 96\)"),
    (lambda: linear(0), -1, r"\(160, 0\)"), (linear, float("nan"), "NaN")])
def test_bad_linears_are_named(make, threshold, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_linear(make(), threshold)


def test_thresholds_of_another_model_are_refused_whole():
    model = nn.Sequential(linear(), nn.ReLU())
    for other in ("1", "2", "layers.0.q_proj"):
        with pytest.raises(ValueError, match=f"'{other}' is not a Linear of this module"):
            replace_linears(model, {"0": 0.5, other: 0.5})
        assert isinstance(model[0], nn.Linear)
    replace_linears(model, {"0": 0.5})
    replace_linears(model, {"0": 0.7})
    assert abs(model[0].threshold.item() - 0.7) < 1e-6


# ---- transformers' models ----------------------------------------------------------------------

FAMILIES = {"Llama": {}, "Qwen3": {"head_dim": 32}, "Phi": {}}


def random_model(family, **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4} | FAMILIES[family] | sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(DEVICE).eval()


def text(*shape):
    return torch.randint(512, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_models(family, tmp_path):
    """Dense at threshold -1 as before; at others the sparsity asked for, token by token. A saved
    model is the dense one again, without SparseLinear."""
    model = random_model(family)
    # Texts as long as the one decoded: later tokens attend to more, and their inputs shrink.
    calibration = calibrate_module(model, text(64, 48).split(16))
    names, ids = calibration.names, text(1, 48)
    linears = 6 if family == "Phi" else 7
    assert len(names) == 2 * linears and not any("lm_head" in name for name in names)

    def decode():
        cache, logits = transformers.DynamicCache(config=model.config), []
        model(ids[:, :16], past_key_values=cache)
        for token in ids[0, 16:]:
            logits.append(model(token.view(1, 1), past_key_values=cache).logits)
        return torch.cat(logits)

    before, whole = decode(), model(ids).logits
    replace_linears(model, calibration.thresholds(0))
    torch.testing.assert_close(decode(), before, rtol=1e-5, atol=1e-5)

    for sparsity in (0.3, 0.5):
        replace_linears(model, calibration.thresholds(sparsity))
        dropped, weights = 0, 0

        def count(linear, args):
            nonlocal dropped, weights
            if args[0].numel() == linear.in_features:
                drop = args[0].abs() <= linear.threshold
                dropped += drop.sum().item() * linear.out_features
                weights += linear.w_t.numel()

        hooks = [model.get_submodule(name).register_forward_pre_hook(count) for name in names]
        decode()
        for hook in hooks:
            hook.remove()
        assert abs(dropped / weights - sparsity) <= 0.02
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).to(DEVICE).eval()
    assert torch.equal(again(ids).logits, whole)


def test_bad_calibrations_are_named():
    model = random_model("Llama", num_hidden_layers=1)
    with pytest.raises(CalibrationError, match="'model.norm' is no Linear"):
        calibrate_module(model, [text(1, 16)], ["model.norm"])
    with pytest.raises(CalibrationError, match="saw nothing after the first"):
        calibrate_module(model, [text(1, 4)])
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="q_proj is not finite"):
        calibrate_module(model, [text(1, 16)])


@pytest.fixture
def run_example(run, monkeypatch):
    """Runs python -m NAME in this process -> its output."""
    monkeypatch.chdir(HERE)

    def run_example(name, *words):
        code, out, err = run(lambda: runpy.run_module(name, run_name="__main__"), *words)
        assert code == 0, err
        return out

    return run_example


def test_the_transformers_example(run_example, tiny):
    printed = run_example("examples.transformers_model", tiny, "README.md")
    assert "sparsity 0: " in printed and "sparsity 0.5: " in printed


def test_the_idea_example(run_example, smollm, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoint.load", lambda: smollm)
    short = tmp_path / "text"
    short.write_text((HERE / "README.md").read_text()[:200])
    lines = run_example("examples.idea", short).splitlines()
    perplexities = [float(line.split()[1]) for line in lines[1:]]
    assert len(perplexities) == 7 and perplexities[-1] > 1.5 * perplexities[0] > 1
