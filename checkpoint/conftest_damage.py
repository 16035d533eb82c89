"""The ways in which test_fuzz.py damages a checkpoint: (victim, rng) -> {file name: bytes, or None
for no such file}."""

import copy
import json
import struct

NUMBERS = (0, 1, 3, 255, 2**31 - 1, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
NESTED = json.loads("[" * 90 + "]" * 90)
PATHS = ("/etc/passwd", "../m/model.safetensors", "x/../model.safetensors", "config.json", "..",
         ".safetensors", "nowhere.safetensors", "\u0000.safetensors", "x" * 5000 + ".safetensors")
VALUES = (None, True, False, -1, -2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan"),
          float("inf"), "", "9", "false", "F64", "F8_E4M3", "I8", "U8", "x" * 5000, *PATHS, [], {},
          [0], [0] * 1000, [1] * 2000, [2**32, 2**32], [None], {"": {}}, NESTED, *NUMBERS)


def weight_file(victim, rng):
    name = rng.choice(sorted(victim.headers))
    return name, bytearray(victim.files[name]), victim.headers[name]


def change_length(victim, rng):
    """A file that ends early (in its header, at a border, near its end), or too late."""
    name, data, header = weight_file(victim, rng)
    if rng.random() < 0.1:
        return {name: data + rng.randbytes(rng.choice([1, 32, 1000]))}
    region = rng.choice([(0, 40), (0, header), (header - 8, header + 8), (header, len(data)),
                         (len(data) - 40, len(data))])
    return {name: data[:rng.randrange(*region)]}


def turn_header_bytes(victim, rng):
    name, data, header = weight_file(victim, rng)
    regions = [(0, 24), (0, 600), (header - 1500, header)]
    for _ in range(rng.randrange(1, 4)):
        at = min(max(0, rng.randrange(*rng.choice(regions))), header - 1)
        data[at] = rng.choice([0, 1, data[at] ^ 1 << rng.randrange(8), 0xFF, rng.randrange(256)])
    return {name: data}


def hostile_header_sizes(victim, rng):
    """Some eight or four bytes of the header become a size nobody has."""
    name, data, header = weight_file(victim, rng)
    at = rng.choice([0, 8, 16, rng.randrange(24, 700), max(0, header - rng.randrange(8, 1500))])
    return {name: put_number(data, min(at, header - 8), rng)}


def put_number(data, at, rng):
    size = rng.choice([4, 8])
    data[at:at + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "little")
    return data


def turn_weight_bytes(victim, rng):
    name, data, header = weight_file(victim, rng)
    for _ in range(rng.randrange(1, 20)):
        data[rng.randrange(header, len(data))] = rng.randrange(256)
    return {name: data}


def edit_json(value, rng):
    """Something in a JSON value, at any depth, is replaced, removed, renamed or doubled."""
    value = copy.deepcopy(value)
    node, beside = value, value
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        if not keys:
            return value
        key = rng.choice(keys)
        if not isinstance(node[key], (dict, list)) or rng.random() < 0.3:
            break
        node, beside = node[key], node[rng.choice(keys)]
    action = rng.randrange(7)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        names = ["", "type", "x" * 1000, "hidden_size", f"{key}.x", f"{key}_scale"]
        node[rng.choice(names)] = node.pop(key)
    elif action == 2 and isinstance(node, list):
        node += [node[key]] * rng.choice([1, 1000])
    elif action == 3 and type(node[key]) in (int, float):
        node[key] = rng.choice([-node[key], node[key] + 1, node[key] - 4, node[key] * 2,
                                node[key] / 2, node[key] * 10**9])
    elif action == 4 and isinstance(beside, dict) and key in beside:
        node[key] = beside[key]  # another tensor's shape, type or place
    else:
        node[key] = rng.choice(VALUES)
    return value


def edit_safetensors(victim, rng):
    name, data, start = weight_file(victim, rng)
    text = json.dumps(edit_json(json.loads(data[8:start]), rng)).encode()
    length = rng.choice([*NUMBERS, len(text) - 1]) if rng.random() < 0.1 else len(text)
    return {name: struct.pack("<Q", length) + text + data[start:]}


def edit_file(*names):
    """A damage to one of these JSON files."""
    def edit(victim, rng):
        name = rng.choice([name for name in names if name in victim.files])
        data = bytearray(victim.files[name])
        action = rng.randrange(8)
        if action == 0:
            return {name: data[:rng.randrange(len(data))]}
        if action == 1:
            data[rng.randrange(len(data))] = rng.randrange(256)
            return {name: data}
        if action == 2:
            return {name: rng.choice([None, b"", b"null", b"[]", b"{}", b"[" * 10**5,
                                      b'{"a":' * 10**5, b"\xff\xfe", b"1" * 10**5, b"NaN"])}
        return {name: json.dumps(edit_json(json.loads(data), rng)).encode()}

    edit.__name__ = f"edit_{names[0]}"
    return edit


def edit_gguf(victim, rng):
    """A metadata value, or a tensor's sizes, type or place, becomes something else; or a name."""
    data = bytearray(victim.files["m.gguf"])
    at = data.find(name := rng.choice([
        b".context_length", b".embedding_length", b".block_count", b".feed_forward_length",
        b".head_count", b".head_count_kv", b"_rms_epsilon", b".ggml.model", b".ggml.tokens",
        b"bos_token_id", b"eos_token_id", b"unknown_token_id", b".token_type", b".architecture",
        b".chat_template", b".scores", b".merges", b".pre", b"token_embd.weight",
        b"output_norm.weight", b"blk.0.attn_q.weight", b"blk.1.ffn_down.weight",
        b"blk.1.attn_norm.weight"])) + len(name)
    if rng.random() < 0.2:
        data[at - rng.randrange(1, len(name))] ^= 1 << rng.randrange(8)
    elif rng.random() < 0.5:
        data = put_number(data, at + 4 * rng.randrange(8), rng)
    else:
        data[at + 4 * rng.randrange(8)] = rng.randrange(45)
    return {"m.gguf": data}


FOLDERS, GGUFS = ("folder", "shards", "int8", "int4"), ("gguf", "gguf q8")
EVERYTHING = (*FOLDERS, *GGUFS, "calibration")
DAMAGES = {  # what is damaged how -> (on which files, its share of all cases)
    change_length: (EVERYTHING, 20), turn_header_bytes: (EVERYTHING, 24),
    hostile_header_sizes: (EVERYTHING, 18), turn_weight_bytes: (EVERYTHING, 10),
    edit_safetensors: ((*FOLDERS, "calibration"), 20), edit_file("config.json"): (FOLDERS, 15),
    edit_file("tokenizer.json"): (("folder", "shards"), 15),
    edit_file("tokenizer_config.json", "generation_config.json"): (("folder", "shards"), 5),
    edit_file("model.safetensors.index.json"): (("shards",), 5), edit_gguf: (GGUFS, 20)}
SHARES = sum(share for _, share in DAMAGES.values())
