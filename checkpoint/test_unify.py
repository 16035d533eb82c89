"""Families that are brought into Llama's form while reading: what transformers saved loads, as
float, as int8 and in slices; what does not fit is refused."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import open_checkpoint
from checkpoint.config import parse_config
from checkpoint.conftest import CASES, LLAMA, ROPE, SMALL, spm_tokenizer
from checkpoint.unify import unify
from cli.quantize_folder import write_folder
from tensor_parallel import Ranks


@pytest.mark.parametrize("name", [
    "llama-3.2, tied", "qwen2", "mistral", "granite, odd heads, tied, biases", "granite 4",
    "phi-3, odd heads, tied", "phi-4-mini, short text"])
@torch.inference_mode()
def test_folders(name, tmp_path):
    """What transformers wrote in shards loads, and so does the int8 folder that quantize.py makes
    of it. Of a fused matrix, a rank reads the parts as if they had been stored apart."""
    torch.manual_seed(0)
    stem, changes, rope = CASES[name]
    config = getattr(transformers, f"{stem}Config")(
        **SMALL | changes | {"vocab_size": 320}, rope_parameters=copy.deepcopy(ROPE[rope]))
    theirs = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    folder = tmp_path / "m"
    theirs.save_pretrained(folder, max_shard_size="20KB")
    spm_tokenizer().save(str(folder / "tokenizer.json"))
    model, tokenizer = checkpoint.load(folder)
    ids = torch.tensor(tokenizer.encode("the wor and in"))
    logits = model.logits(model.forward(ids))
    assert (logits - theirs(ids[None]).logits[0]).abs().max() <= 1e-4
    opened = open_checkpoint(folder)
    write_folder(opened, tmp_path / "int8")
    ours, expected = checkpoint.load(tmp_path / "int8")[0], checkpoint.load(
        folder, quantize="int8")[0]
    assert torch.equal(ours.logits(ours.forward(ids)), expected.logits(expected.forward(ids)))
    whole = dict(opened.tensors)
    for rank in range(2):
        for name, shape in opened.shapes.items():
            part = Ranks(rank, 2).cut(name, shape)
            assert torch.equal(opened.read(name, part), whole[name][part])


PHI = LLAMA | {"model_type": "phi3", "architectures": None}
NAME = "model.layers.0.self_attn.qkv_proj.weight"


def test_no_row_of_another_part_is_read():
    config = parse_config(PHI)  # 4 heads of 8 channels
    asked = []
    shapes, read, origins = unify(
        PHI, config, {NAME: (96, 32)},
        lambda name, part: asked.append((name, part)) or torch.zeros(8, 32))
    k = NAME.replace("qkv", "k")
    assert shapes == {NAME.replace("qkv", part): (32, 32) for part in "qkv"}
    assert {*origins.values()} == {NAME}
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


EYES = {"hidden_size": 16, "patch_size": 8}
LINES = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [2, 2, 2],
         "mrope_interleaved": True}  # RoPE over three axes is the ordinary one without an image


@pytest.mark.parametrize("family, rope, eyes, tied", [
    ("Mistral3", ROPE["ministral"], {"intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
                                     "num_attention_heads": 2, "image_size": 16,
                                     "model_type": "pixtral"}, False),
    ("Qwen3VL", LINES, {"depth": 1, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
                        "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, True)])
@torch.inference_mode()
def test_the_text_model_of_one_that_reads_images(tmp_path, family, rope, eyes, tied):
    torch.manual_seed(0)
    text = SMALL | {"vocab_size": 320, "head_dim": 12, "num_key_value_heads": 2,
                    "rope_parameters": copy.deepcopy(rope), "pad_token_id": None}
    if family == "Mistral3":
        text["model_type"] = "ministral3"
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=EYES | eyes, tie_word_embeddings=tied)
    theirs = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    theirs.save_pretrained(tmp_path / "m")
    spm_tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    model, ids = checkpoint.load(tmp_path / "m")[0], torch.randint(320, (80,))
    assert model.config.tie_embeddings == tied
    logits = model.logits(model.forward(ids))
    assert (logits - theirs(ids[None]).logits[0]).abs().max() <= 1e-4
    # The other order of the words in a tensor's name, which files of other dates have.
    file, old, new = tmp_path / "m" / "model.safetensors", "language_model.model.", (
        "model.language_model.")
    tensors = load_file(file)
    assert any(name.startswith((old, new)) for name in tensors)
    save_file({name.replace(old, "*").replace(new, old).replace("*", new): tensor
               for name, tensor in tensors.items()}, file)
    assert torch.equal(checkpoint.load(tmp_path / "m")[0].forward(ids), model.forward(ids))
