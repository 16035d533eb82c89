"""Thousands of damaged checkpoints: each is refused in one sentence, or read exactly as it was.

Small real checkpoints of every form are damaged at random, from a fixed seed: cut off, bytes
turned, headers and settings rewritten with hostile values. No case may raise anything but the one
error meant for it, take 5 seconds or 1 GiB, or load numbers other than those in the file.

    pytest test_fuzz.py --fuzz 20000        more cases than in CI
"""

import collections
import copy
import json
import random
import resource
import shutil
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

import generate
from calibrations.thresholds import FORMAT, GRID, Calibration, CalibrationError, fingerprint
from checkpoint import CheckpointError, load, open_checkpoint
from checkpoint.config import parse_config
from checkpoint.conftest import CASES, CONFIG, ROPE, SMALL, weights, write_folder, write_gguf
from checkpoint.gguf_file import hf_name
from checkpoint.tensors import put
from checkpoint.tokenizer import TextStream, Tokenizer, TokenizerError
from cli import quantize_folder
from model import Linear, Model
from quantize import Int8Linear, int4_linear

SECONDS, MEMORY = 5, 1 << 30
TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}"
            "{% endfor %}")
SETTINGS = {"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"},
                                 "chat_template": TEMPLATE},
            "generation_config": {"eos_token_id": [2, 7]}}
NUMBERS = (0, 1, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
           2**64 - 1)
NESTED = json.loads("[" * 90 + "]" * 90)
VALUES = (None, True, False, -1, -2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan"),
          float("inf"), "", "9", "false",
          "\u0000",
          "x" * 5000, "../../etc/passwd", "/dev/zero", [], {}, [0] * 1000, [None], {"": {}},
          NESTED, *NUMBERS)
HOSTILE_TEMPLATES = (
    "{% for i in range(10**9) %}{% endfor %}", "{{ 'x' * 10**10 }}", "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ self._TemplateReference__context }}", "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ lipsum(n=9999999) }}", "{% for",
                     "{{ messages.clear() }}")


# ---- the sound checkpoints ---------------------------------------------------------------------

def byte_level():
    """A tokenizer whose text is bytes, with a few merges."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("a", "n")]
    tokens = alphabet + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer, tokens, merges


def make_folder(path):
    """Every float type there is."""
    tensors = weights()
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64) * 9
    for (name, tensor), dtype in zip(tensors.items(), dtypes):
        tensors[name] = tensor.to(dtype)
    return write_folder(path, tensors=tensors, **SETTINGS)


def make_shards(path):
    """Three files and an index; Qwen2, with biases; a tied head; the other kind of tokenizer."""
    config = {"num_hidden_layers": 3, "tie_word_embeddings": True, "model_type": "qwen2",
              "architectures": ["Qwen2ForCausalLM"]}
    config = CONFIG | config | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    tensors, index = list(weights(config).items()), {}
    write_folder(path, config, dict(tensors), byte_level()[0], **SETTINGS)
    (path / "model.safetensors").unlink()
    for i in range(3):
        file = f"model-0000{i + 1}-of-00003.safetensors"
        save_file(dict(tensors[i::3]), path / file)
        index |= {name: file for name, _ in tensors[i::3]}
    index = {"metadata": {"total_size": 1}, "weight_map": index}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def make_int8(path):
    """A folder that quantize.py wrote."""
    quantize_folder.write_folder(open_checkpoint(make_folder(path.with_name("floats"))), path)
    return path


def make_int4(path):
    source = open_checkpoint(make_folder(path.with_name("floats")))
    quantize_folder.write_folder(source, path, "int4")
    return path


def make_gguf(path):
    """Floats, and a SentencePiece vocabulary."""
    path.mkdir()
    write_gguf(path / "m.gguf", **{"tokenizer.chat_template": TEMPLATE})
    return path / "m.gguf"


def make_gguf_q8(path):
    """Qwen2, quantized, with a byte-level vocabulary."""
    path.mkdir()
    _, tokens, merges = byte_level()
    config = CONFIG | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    write_gguf(path / "m.gguf", weights(config), "qwen2", gguf.GGMLQuantizationType.Q8_0, **{
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": None,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [" ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.chat_template": TEMPLATE})
    return path / "m.gguf"


def make_calibration(path):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(CONFIG["num_hidden_layers"], 7, len(GRID), generator=generator).cumsum(-1)
    metadata = {"format": FORMAT, "fingerprint": fingerprint(parse_config(CONFIG)),
                "allocation": "fisher"}
    Calibration(table, table / 100, metadata).save(path / "calibration.safetensors")
    return path / "calibration.safetensors"


MAKERS = {"folder": make_folder, "shards": make_shards, "int8": make_int8,
          "int4": make_int4, "gguf": make_gguf,
          "gguf q8": make_gguf_q8,
          "calibration": make_calibration}


def numbers(network):
    """Every weight of a model, or the tables of a calibration, as a list of tensors."""
    if isinstance(network, Calibration):
        return [network.table, network.sparsities]
    owners = [(network, ("embedding", "norm")), (network.lm_head, ("w_t", "scale"))]
    owners += [(block, ("attn_norm", "mlp_norm")) for block in network.blocks]
    owners += [(linear, ("w_t", "scale", "bias")) for linear in network.linears()]
    return [tensor for owner, names in owners for name in names
            if (tensor := getattr(owner, name)) is not None]


class Victim:
    """A sound checkpoint or calibration: its files in memory, and a folder for damaged copies."""

    def __init__(self, make, folder):
        self.path = make(folder)
        self.folder = folder
        self.files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self.headers = {name: header_end(folder / name) for name in self.files
                        if name.endswith((".safetensors", ".gguf"))}
        self.network = None if make is make_calibration else load(self.path)[0]
        self.numbers = self.read()

    def read(self):
        """The numbers in the folder as it is, every weight or threshold, each once put to use."""
        return numbers(use_calibration(self.path) if self.network is None
                       else use_checkpoint(self.path))

    def damage(self, changes):
        """Write {file name: bytes, or None for no such file}."""
        for name, data in changes.items():
            if data is None:
                (self.folder / name).unlink()
            else:
                (self.folder / name).write_bytes(data)

    def repair(self, changes):
        for name in changes:
            if name in self.files:
                (self.folder / name).write_bytes(self.files[name])
            else:
                (self.folder / name).unlink(missing_ok=True)


def header_end(file):
    """Where the weights begin in a safetensors or GGUF file."""
    if file.suffix == ".gguf":
        return gguf.GGUFReader(file).data_offset
    return 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    return {name: Victim(make, tmp_path_factory.mktemp("fuzz") / "m")
            for name, make in MAKERS.items()}


# ---- damage: (victim, rng) -> {file name: bytes or None} ---------------------------------------

def weight_file(victim, rng):
    name = rng.choice(sorted(victim.headers))
    return name, bytearray(victim.files[name]), victim.headers[name]


def cut(victim, rng):
    """A file that ends early: in its header, at a border, among the weights, near its end."""
    name, data, header = weight_file(victim, rng)
    region = rng.choice([(0, 40), (0, header), (header - 8, header + 8), (header, len(data)),
                         (len(data) - 40, len(data))])
    return {name: data[:rng.randrange(*region)]}


def lengthen(victim, rng):
    name, data, _ = weight_file(victim, rng)
    return {name: data + rng.randbytes(rng.choice([1, 32, 1000]))}


def turn_header_bytes(victim, rng):
    name, data, header = weight_file(victim, rng)
    regions = [(0, 24), (0, 600), (header - 1500, header)]
    for _ in range(rng.randrange(1, 4)):
        at = min(max(0, rng.randrange(*rng.choice(regions))), header - 1)
        data[at] = rng.choice([0, 1, data[at] ^ 1 << rng.randrange(8), 0x7F, 0xFF,
                               rng.randrange(256)])
    return {name: data}


def hostile_header_sizes(victim, rng):
    """Some eight or four bytes of the header become a size nobody has."""
    name, data, header = weight_file(victim, rng)
    at = rng.choice([0, 8, 16, rng.randrange(24, 700), max(0, header - rng.randrange(8, 1500))])
    size = rng.choice([4, 8])
    at = min(at, header - size)
    data[at:at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    return {name: data}


def turn_weight_bytes(victim, rng):
    name, data, header = weight_file(victim, rng)
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(header, len(data))] = rng.randrange(256)
    return {name: data}


def edit_safetensors(victim, rng):
    """A header rewritten: tensors missing, extra, of another name, type, shape or place."""
    name, data, start = weight_file(victim, rng)
    header = json.loads(data[8:start])
    one, other = rng.sample(sorted(key for key in header if key != "__metadata__"), 2)
    action = rng.randrange(9)
    if action == 0:
        del header[one]
    elif action == 1:
        header[one + rng.choice(["", ".x", "\u0000", "x" * 3000])] = header.pop(one)
        header[rng.choice(["x", "model.layers.7.mlp.up_proj.weight",
                           other + "_scale"])] = header[other]
    elif action == 2:
        header[one] = header[other]
    elif action == 3:
        dtypes = ("F64", "F32", "F8_E4M3", "I8", "U8", "I16", "I64", "BOOL", "F4", "x", None, 3)
        header[one]["dtype"] = rng.choice(dtypes)
    elif action == 4:
        header[one]["shape"] = rng.choice([[], [0], [2**32, 2**32], [-1, -32],
                                           header[one]["shape"][::-1] + [1],
                                           [1] * 2000, *VALUES])
    elif action == 5:
        header[one]["data_offsets"] = rng.choice([header[other]["data_offsets"], [0, 0],
                                                  [2**63, 2**63 + 4], [-4, 0],
                                                  [10**30, 0], *VALUES])
    elif action == 6:
        begin, end = header[one]["data_offsets"]
        header[one]["data_offsets"] = [begin + rng.choice([-4, 0, 4]),
                                       end + rng.choice([-4, 0, 4])]
    elif action == 7:
        header[rng.choice([one, "__metadata__"])] = rng.choice(VALUES)
    else:
        header |= {f"extra{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                   for i in range(rng.choice([1, 5000]))}
    text = json.dumps(header).encode()
    if rng.random() < 0.2:  # a length that lies
        return {name: struct.pack("<Q", rng.choice([*NUMBERS, len(text) - 1, len(text) + 1]))
                + text + data[start:]}
    return {name: struct.pack("<Q", len(text)) + text + data[start:]}


def edit_json(value, rng):
    """Something in a JSON value, at any depth, is replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return value
        key = rng.choice(keys)
        if not isinstance(node[key], (dict, list)) or rng.random() < 0.3:
            break
        node = node[key]
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(["", "type", "x" * 1000, "hidden_size"])] = node.pop(key)
    elif action == 2 and isinstance(node, list):
        node += [node[key]] * rng.choice([1, 1000])
    elif action == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = rng.choice([-node[key], node[key] + 1, node[key] * 2, node[key] / 2,
                                node[key] * 10**9])
    else:
        node[key] = rng.choice(VALUES)
    return value


def json_file(victim, rng, *names):
    name = rng.choice([name for name in names if name in victim.files])
    data = bytearray(victim.files[name])
    action = rng.randrange(8)
    if action == 0:
        return {name: data[:rng.randrange(len(data))]}
    if action == 1:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return {name: data}
    if action == 2:
        return {name: rng.choice([None, b"", b"null", b"[]", b"{}", b"[" * 10**5,
                                  b'{"a":' * 10**5, b"\xff\xfe",
                                  b"1" * 10**5, b"NaN"])}
    return {name: json.dumps(edit_json(json.loads(data), rng)).encode()}


def edit_config(victim, rng):
    return json_file(victim, rng, "config.json")


def edit_tokenizer(victim, rng):
    return json_file(victim, rng, "tokenizer.json")


def edit_settings(victim, rng):
    return json_file(victim, rng, "tokenizer_config.json", "generation_config.json")


def edit_index(victim, rng):
    """An index that names files elsewhere, that are missing, or of another kind."""
    name = "model.safetensors.index.json"
    if rng.random() < 0.5:
        return json_file(victim, rng, name)
    index = json.loads(victim.files[name])
    index["weight_map"][rng.choice(sorted(index["weight_map"]))] = rng.choice([
        "../m/model.safetensors", "/etc/passwd", "x/../model.safetensors", "model.bin",
        "config.json", "..", "",
        ".safetensors",
        "nowhere.safetensors", "\u0000.safetensors", "C:\\x.safetensors",
        "x" * 5000 + ".safetensors", *VALUES])
    return {name: json.dumps(index).encode()}


def edit_gguf_metadata(victim, rng):
    """A metadata value, found by its key, becomes something else, or the key becomes another."""
    data = bytearray(victim.files["m.gguf"])
    key = rng.choice([b".context_length", b".embedding_length", b".block_count",
                      b".feed_forward_length",
                      b".head_count", b".head_count_kv", b"_rms_epsilon", b".ggml.model",
                      b".ggml.tokens",
                      b"bos_token_id", b"eos_token_id", b"unknown_token_id", b".token_type",
                      b".architecture",
                      b".chat_template", b".scores", b".merges", b".pre"])
    at = data.find(key) + len(key)  # the value's type, uint32, then the value
    action = rng.randrange(4)
    if action == 0:
        data[at:at + 4] = struct.pack("<I", rng.randrange(14))
    elif action == 1:
        data[at + 4:at + 8] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    elif action == 2:
        data[at + 8:at + 16] = struct.pack("<Q", rng.choice(NUMBERS))
    else:
        data[at - 1] ^= 1 << rng.randrange(8)
    return {"m.gguf": data}


def edit_gguf_tensors(victim, rng):
    """A tensor's name, number of dimensions, sizes, type or offset changes."""
    data = bytearray(victim.files["m.gguf"])
    names = [b"token_embd.weight", b"output_norm.weight", b"blk.0.attn_q.weight",
             b"blk.1.ffn_down.weight",
             b"blk.1.attn_norm.weight"]
    name = rng.choice(names)
    at = data.index(name) + len(name)
    n_dims = data[at]
    kind = at + 4 + 8 * n_dims
    action = rng.randrange(6)
    if action == 0:
        data[at - rng.randrange(1, len(name))] ^= 1 << rng.randrange(8)
    elif action == 1:
        data[at:at + 4] = struct.pack("<I", rng.choice([0, 1, 2, 3, 5, 2**32 - 1]))
    elif action == 2:
        data[at + 4:at + 12] = struct.pack("<Q", rng.choice([16, 32, 64, 320, *NUMBERS]))
    elif action == 3:
        data[kind:kind + 4] = struct.pack("<I", rng.choice([*range(45), 2**32 - 1]))
    elif action == 4:
        data[kind + 4:kind + 12] = struct.pack("<Q", rng.choice([*NUMBERS, *range(0, 9000, 32)]))
    else:
        other = data.index(rng.choice(names))
        data[other] ^= 1
        data[kind + 4:kind + 12] = struct.pack("<Q", rng.randrange(0, len(data), 32))
    return {"m.gguf": data}


FOLDERS, GGUFS = ("folder", "shards", "int8", "int4"), ("gguf", "gguf q8")
CALIBRATIONS = ("calibration",)
EVERYTHING = FOLDERS + GGUFS + CALIBRATIONS
DAMAGES = {  # what is damaged how -> (on which files, its share of all cases)
    cut: (EVERYTHING, 18), lengthen: (EVERYTHING, 2), turn_header_bytes: (EVERYTHING, 24),
    hostile_header_sizes: (EVERYTHING, 18),
    turn_weight_bytes: (EVERYTHING, 10), edit_safetensors: (FOLDERS + CALIBRATIONS, 20),
    edit_config: (FOLDERS, 15), edit_tokenizer: (("folder", "shards"), 15),
    edit_settings: (("folder", "shards"), 5),
    edit_index: (("shards",), 5), edit_gguf_metadata: (GGUFS, 10), edit_gguf_tensors: (GGUFS, 10)}
SHARES = sum(share for _, share in DAMAGES.values())


# ---- how a case must end -----------------------------------------------------------------------

def read_by_other_means(victim):
    """{Hugging Face name: tensor} as a damaged copy's bytes have it, its headers being sound."""
    tensors = {}
    for name, start in victim.headers.items():
        if name.endswith(".gguf"):
            reader = gguf.GGUFReader(victim.path)
            for tensor in reader.tensors:
                with np.errstate(invalid="ignore", over="ignore"):
                    array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2])
                if heads and "llama.block_count" in reader.fields:
                    array = array.reshape(heads, 4, 2, -1).swapaxes(1, 2).reshape(array.shape)
                tensors[hf_name(tensor.name, "llama")] = torch.from_numpy(array.copy())
        else:
            data = bytearray((victim.folder / name).read_bytes())
            dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
                      "BF16": torch.bfloat16,
                      "I8": torch.int8, "U8": torch.uint8}
            for tensor, entry in json.loads(data[8:start]).items():
                if tensor != "__metadata__":
                    begin, end = entry["data_offsets"]
                    part = torch.frombuffer(data[start + begin:start + end],
                                            dtype=dtypes[entry["dtype"]])
                    tensors[tensor] = part.view(entry["shape"])
    return tensors


def expected_numbers(victim):
    """What a copy with damaged weights must give: numbers, or None if weights are not finite."""
    tensors = read_by_other_means(victim)
    if victim.network is None:
        return [tensors["thresholds"], tensors["sparsities"]]
    for tensor in tensors.values():
        if tensor.dtype == torch.uint8:
            scale, minimum = tensor[..., 16:].contiguous().view(torch.bfloat16).float().unbind(-1)
            tensor = torch.stack((minimum, minimum + 15 * scale))
        if not tensor.float().isfinite().all():
            return None
    linear = Linear if victim.network.lm_head.scale is None else Int8Linear
    if any(tensor.dtype == torch.uint8 for tensor in tensors.values()):
        linear = int4_linear
    network = Model(victim.network.config, linear=linear)
    for name, tensor in tensors.items():
        put(network, name, tensor)
    return numbers(network)


def refusal(function, *kinds):
    """function() -> (its result, None), or (None, the sentence with which it refused)."""
    start, result, message = time.monotonic(), None, None
    try:
        result = function()
    except (CheckpointError, TokenizerError, CalibrationError) as error:
        assert type(error) in kinds, error
        message = str(error)
        assert message.isprintable() and 20 < len(message) < 1000, message
        assert " ()" not in message, message
        assert "memory" not in message or "chat template" in message, message
    assert time.monotonic() - start < SECONDS
    return result, message


def use_checkpoint(path):
    """Load a checkpoint, turn text into tokens and back; returns its Model."""
    network, tokenizer = load(path)

    def text():
        ids = tokenizer.encode("The wörd and 3 in\n\t 日本 <s>")
        ids += range(network.config.vocab_size + 2)
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
        assert all(0 <= i < network.config.vocab_size for i in tokenizer.eos_ids)

    refusal(text, TokenizerError)
    return network


def use_calibration(path):
    calibration = Calibration.load(path, parse_config(CONFIG))
    assert calibration.thresholds(0.5).isfinite().all()
    assert calibration.expected(0.95).isfinite().all()
    return calibration


@pytest.fixture
def bounded_memory():
    """An allocation of more than MEMORY beyond what is there fails."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints(damage, victims, bounded_memory, request):
    names, share = DAMAGES[damage]
    rng, ends = random.Random(damage.__name__), collections.Counter()
    for i in range(request.config.getoption("fuzz") * share // SHARES):
        victim = victims[names[i % len(names)]]
        changes = damage(victim, rng)
        victim.damage(changes)
        try:
            expected = expected_numbers(victim) if damage is turn_weight_bytes else victim.numbers
            kind = CheckpointError if victim.network else CalibrationError
            found, message = refusal(victim.read, kind)
            if found is None:
                assert str(victim.folder) in message, message
                if damage is turn_weight_bytes and victim.network:
                    assert expected is None, message
            else:
                assert expected is not None, "loaded weights that are infinite or NaN"
                assert len(found) == len(expected), "other numbers than the file's"
                assert all(map(torch.equal, found, expected)), "other numbers than the file's"
        except BaseException:
            (victim.folder.parent / "case").mkdir(exist_ok=True)
            print(f"case {i} of {damage.__name__} on {names[i % len(names)]}; its files are "
                  f"kept in {victim.folder.parent / 'case'}")
            shutil.copytree(victim.folder, victim.folder.parent / "case", dirs_exist_ok=True)
            raise
        finally:
            victim.repair(changes)
        ends["read" if message is None else "refused"] += 1
    print(f"{damage.__name__}: {dict(ends)}")


def test_configs_of_every_family(request):
    """A config.json with something hostile in it is read or refused, whatever the family."""
    rng, ends = random.Random("configs"), collections.Counter()
    for stem, changes, rope in CASES.values():
        config = SMALL | changes | {"model_type": stem.lower(), "rope_parameters": ROPE[rope]}
        parse_config(config)
        for _ in range(request.config.getoption("fuzz") // 50):
            try:
                parse_config(edit_json(config, rng), rng.choice([None, 5, 200]))
                ends["read"] += 1
            except ValueError:
                ends["refused"] += 1
    assert min(ends.values()) > 0
    print(f"configs: {dict(ends)}")


def test_chat_templates(request):
    """Looping, huge, prying and damaged templates end in text or in one sentence, soon."""
    rng, ends = random.Random("templates"), collections.Counter()
    templates = list(HOSTILE_TEMPLATES)
    for _ in range(request.config.getoption("fuzz") // 100):
        at = rng.randrange(len(TEMPLATE))
        templates.append(TEMPLATE[:at]
                         + rng.choice(["", "{", "}}", "{%", "\u0000", "\ud800", "|", "'", ".x",
                                       "()"])
                         + TEMPLATE[at + rng.randrange(3):])
    for template in templates:
        tokenizer = Tokenizer(byte_level()[0], 320, {"bos_token": "<s>"}, [], template)
        said = [{"role": "user", "content": "{{ 7 * 7 }} <s>"}]
        _, message = refusal(lambda: tokenizer.chat(said), TokenizerError)
        assert message is None or "chat template" in message, message
        ends["rendered" if message is None else "refused"] += 1
    print(f"chat templates: {dict(ends)}")


def test_endless_tokenizer(victims, bounded_memory):
    """A regular expression that takes exponential time is given up."""
    victim = victims["folder"]
    content = json.loads(victim.files["tokenizer.json"])
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"},
                                "behavior": "Isolated", "invert": False}
    changes = {"tokenizer.json": json.dumps(content).encode()}
    victim.damage(changes)
    _, message = refusal(lambda: load(victim.path)[1].encode("a banana é " + "x" * 40),
                         CheckpointError, TokenizerError)
    victim.repair(changes)
    assert "tokenizer" in message


def test_large_gguf_header(victims, bounded_memory):
    """A header as long as any may be, full of empty strings."""
    file, key = victims["gguf"].path.with_name("large.gguf"), b"tokenizer.ggml.eos_token_id"
    data = victims["gguf"].files["m.gguf"].replace(
        key + struct.pack("<II", 4, 2), key + struct.pack("<IIQ", 9, 8, 4_000_000)
        + bytes(8 * 4_000_000))
    file.write_bytes(data)
    assert len(data) > 32_000_000 and refusal(lambda: load(file), CheckpointError)[1]
    file.unlink()


@pytest.mark.parametrize("damage",
                         [edit_config, edit_tokenizer, cut, turn_header_bytes, edit_index,
                          edit_gguf_metadata,
                                    "template", "NaN", "panic"],
                         ids=lambda damage: getattr(damage, "__name__", damage))
def test_command(damage, victims, run):
    """As a command: exit code 2 and one sentence. Only Rust may say more, before it panics."""
    victim, rng, changes = victims["folder"], random.Random(1), {}
    if damage == "template":
        changes["chat_template.jinja"] = b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
    elif damage == "panic":
        content = json.loads(victim.files["tokenizer.json"])
        content["post_processor"]["special_tokens"] = {}
        changes["tokenizer.json"] = json.dumps(content).encode()
    elif damage == "NaN":
        victim = victims["gguf"]
        changes["m.gguf"] = victim.files["m.gguf"][:-4] + struct.pack("<f", float("nan"))
    else:
        victim = victims[DAMAGES[damage][0][-1] if damage in (edit_index, edit_gguf_metadata)
                         else "folder"]
        while not changes:  # one that is refused
            changes = damage(victim, rng)
            victim.damage(changes)
            if refusal(victim.read, CheckpointError)[1] is None:
                victim.repair(changes)
                changes = {}
    victim.damage(changes)
    code, out, err = run(generate.main, "--model", victim.path, "--prompt", "the",
                         "--max-new-tokens", 3)
    victim.repair(changes)
    assert code == 2 and out == "", err
    *before, sentence = err.splitlines()
    assert sentence.startswith("generate.py: error: ") and err.endswith("\n")
    assert not before or damage == "panic" and "Traceback" not in err
