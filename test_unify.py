"""Families that are brought into Llama's form while reading: what transformers saved loads, as
float, as int8 and in slices; what does not fit is refused."""

import pytest
import torch
import transformers

import checkpoint
from checkpoint import open_checkpoint
from checkpoint.config import parse_config
from checkpoint.unify import unify
from quantize import write_folder
from tensor_parallel import cut
from test_checkpoint import spm_tokenizer
from test_config import LLAMA
from test_model import CASES, ROPE, SMALL

NAMES = ["granite", "granite, odd heads, tied, biases", "granite 4", "phi-3",
         "phi-3, odd heads, tied", "phi-4-mini, short text"]


@pytest.fixture(params=NAMES)
def saved(request, tmp_path):
    """(A folder that transformers wrote, its model)."""
    torch.manual_seed(0)
    stem, changes, rope = CASES[request.param]
    config = getattr(transformers, f"{stem}Config")(
        **SMALL | changes | {"vocab_size": 320}, rope_parameters=ROPE[rope])
    theirs = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path / "m")
    spm_tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    return tmp_path / "m", theirs


@torch.inference_mode()
def test_folders(saved, tmp_path):
    """A folder loads, and so does the int8 folder that quantize.py makes of it."""
    folder, theirs = saved
    model, tokenizer = checkpoint.load(folder)
    ids = torch.tensor(tokenizer.encode("the wor and in"))
    logits = model.logits(model.forward(ids))
    assert (logits - theirs(ids[None]).logits[0]).abs().max() <= 1e-4
    write_folder(open_checkpoint(folder), tmp_path / "int8")
    ours, expected = checkpoint.load(tmp_path / "int8")[0], checkpoint.load(
        folder, quantize="int8")[0]
    assert torch.equal(ours.logits(ours.forward(ids)), expected.logits(expected.forward(ids)))


def test_a_rank_reads_its_slices(saved, monkeypatch):
    """The parts of a fused matrix, cut for two ranks as if they had been stored apart."""
    opened = open_checkpoint(saved[0])
    whole = dict(opened.tensors)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        for name, tensor in opened.tensors:
            assert torch.equal(tensor, whole[name][cut(name, tuple(whole[name].shape))])


PHI = LLAMA | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
NAME = "model.layers.0.self_attn.qkv_proj.weight"


def test_no_row_of_another_part_is_read():
    config = parse_config(PHI)  # 4 heads of 8 channels
    asked = []
    shapes, read = unify(PHI, config, {NAME: (96, 32)},
                         lambda name, part: asked.append((name, part)) or torch.zeros(8, 32))
    k = NAME.replace("qkv", "k")
    assert shapes == {NAME.replace("qkv", part): (32, 32) for part in "qkv"}
    read(k)
    read(k, (slice(16, 24), slice(None)))
    assert asked == [(NAME, (slice(32, 64),)), (NAME, (slice(48, 56), slice(None)))]


@pytest.mark.parametrize("stored, words", [
    ({NAME: (97, 32)}, "qkv_proj.weight has shape .97, 32.; the config asks for 96 rows"),
    ({NAME: ()}, "qkv_proj.weight has shape ..; the config asks for 96 rows"),
    ({NAME: (96, 32), NAME.replace("qkv", "v"): (32, 32)}, "v_proj.weight is there twice"),
    ({NAME.replace("qkv", "v"): (32, 32), NAME: (96, 32)}, "v_proj.weight is there twice")])
def test_fused_matrices_that_do_not_fit(stored, words):
    with pytest.raises(ValueError, match=words):
        unify(PHI, parse_config(PHI), stored, None)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("change, words", [
    ({"partial_rotary_factor": 0.4}, "3 of a head's 8 channels turn"),
    ({"partial_rotary_factor": 0.0}, "0 of a head's 8 channels turn"),
    ({"rope_scaling": LONGROPE}, "original_max_position_embeddings is None"),
    ({"rope_scaling": LONGROPE, "original_max_position_embeddings": 1},
     "original_max_position_embeddings is 1"),
    ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 3},
      "original_max_position_embeddings": 16}, "short_factor is .*a list of 4"),
    ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 3 + ["a"]},
      "original_max_position_embeddings": 16}, "short_factor is 'a'")])
def test_phi_config_errors(change, words):
    parse_config(PHI)
    with pytest.raises(ValueError, match=words):
        parse_config(PHI | change)


def test_context_of_longrope():
    """Within the original context the short list holds, for all who do not ask for more."""
    config = PHI | {"rope_scaling": LONGROPE | {"type": "su"}, "max_position_embeddings": 64,
                    "original_max_position_embeddings": 16}
    del config["rope_scaling"]["rope_type"]  # as in old configs
    found = {context: parse_config(config, context) for context in (None, 5, 16, 17, 64)}
    assert [c.context for c in found.values()] == [16, 5, 16, 17, 64]
    assert [c.rope_divisors[0] for c in found.values()] == [1.0, 1.0, 1.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="context 65 is outside 1 to 64"):
        parse_config(config, 65)


def test_only_dense_granites():
    config = LLAMA | {"model_type": "granitemoehybrid", "shared_intermediate_size": 44,
                      "architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0,
                      "layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
    assert parse_config(config).intermediate_size == 44
    for change in ({"num_local_experts": 8}, {"layer_types": ["attention", "mamba", "mamba"]},
                   {"layer_types": None}, {"position_embedding_type": "nope"}):
        with pytest.raises(ValueError, match="experts, Mamba layers or no RoPE"):
            parse_config(config | change)
