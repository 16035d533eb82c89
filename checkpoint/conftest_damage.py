"""The ways in which test_fuzz.py damages a checkpoint: (victim, rng) -> {file name: bytes, or None
for no such file}."""



import copy
import json
import struct

NUMBERS = (0, 1, 3, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
           2**64 - 1)
NESTED = json.loads("[" * 90 + "]" * 90)
VALUES = (None, True, False, -1, -2**63, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan"),
          float("inf"), "", "9", "false",
          "\u0000",
          "x" * 5000, "../../etc/passwd", "/dev/zero", [], {}, [0] * 1000, [None], {"": {}},
          NESTED, *NUMBERS)


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
