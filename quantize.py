"""int8 weights: half the bytes of bfloat16, and at 50% sparsity a quarter.

Decoding waits for weights to arrive from memory, so a weight stored in fewer bits is read sooner, and sparsity then
leaves half of those unread: the two gains multiply. The arithmetic, for one output channel w (a row of W [N, K]):

    scale = max(|w|) / 127                one float32 for the whole row
    q     = round(w / scale)              integers from -127 to 127, one byte each
    w     ~ q * scale                     off by at most scale / 2, for q is off by at most 1/2
    y     = sum of x[k] * w[k]  ~  scale * (sum of x[k] * q[k])

The scale does not depend on k, so it is applied once, to the finished sum: whatever sums up rows of numbers (the
sparse kernel, embedding_bag) sums up rows of integers just as well, and knows nothing of quantization but a factor at
the end. Zero maps to zero; activations stay as they are, and so do the thresholds on them. Quantized are the seven
projections of every block and the LM head. Norms, biases and the embedding's look-up table keep their precision.

A smaller scale would clip the largest weights and round the others more finely. Chosen for each row by squared error,
plain or weighted by the inputs' mean squares, it moved the predictions no less: KL divergence from the unquantized
SmolLM2-135M 0.0039 and 0.0040 against 0.0037 as above (WikiText-2). So the largest weight sets the scale.

    python quantize.py --out /tmp/smollm2-int8
    python quantize.py --model meta-llama/Llama-3.2-1B-Instruct --out llama-3.2-1b-int8
"""

import argparse
import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

METHOD = "nanoteal-int8"  # marks config.json
PIECE = 1 << 20  # weights turned to float32 at a time
SHARD = 1 << 30  # bytes of weights in one file


def is_quantized(name):
    """Whether the tensor of this Hugging Face name is one that becomes int8; NAME_scale is its partner then."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def quantize_tensor(weight, name="weight"):
    """A float matrix [N, K] -> (int8 [N, K], its scales float32 [N]), round-to-nearest.

    Raises ValueError, naming the tensor, if a weight is infinite or NaN.
    """
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], device=weight.device)
    rows = max(1, PIECE // weight.shape[1])
    for w, q_rows, scale_rows in zip(weight.split(rows), q.split(rows), scale.split(rows)):
        w = w.float()
        torch.div(w.abs().amax(1), 127, out=scale_rows)
        scale_rows.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros: 0 / tiny is 0
        q_rows.copy_((w / scale_rows[:, None]).round_())
    if not scale.isfinite().all():  # the largest of numbers with a NaN is NaN
        raise ValueError(f"tensor {name} holds infinite or NaN weights, which cannot be quantized; "
                         "get a sound checkpoint")
    return q, scale


# ---------------------------------------------------------------- packed for the CPU

# PyTorch's quantized embedding_bag sums up rows of uint8, each followed by its own float32 scale and bias. Ours are 1
# and -128, so that a byte q + 128 counts as q. Columns are cut into equal blocks, each a table [K, width + 8] of its
# own: uint8 [n_blocks, K, width + 8] (`CpuGemv` in sparse_gemv.py multiplies with it).

def empty_packed(k, ends, narrow=False):
    """Room for int8 [k, ends[-1]], matrices side by side that end at the columns `ends`; no two of them share a block.

    There is a block for every thread, as wide as that allows: memory likes long rows best when they are scattered. If
    `narrow`, blocks have 256 columns, or hardly more, which is faster where all rows are read, one after the other.
    """
    whole = math.gcd(*ends)
    least = max(1, min(whole, 256 if narrow else ends[-1] // torch.get_num_threads()))
    width = next(width for width in range(least, whole + 1) if whole % width == 0)
    packed = torch.empty(ends[-1] // width, k, width + 8, dtype=torch.uint8)
    packed[:, :, width:] = torch.tensor([1.0, -128.0]).view(torch.uint8)
    return packed


def pack(packed, start, q):
    """Write int8 q [n, K] as the columns from `start` on."""
    width = packed.shape[2] - 8
    blocks = packed[start // width:(start + len(q)) // width, :, :width]
    blocks.copy_(q.view(torch.uint8).view(-1, width, q.shape[1]).transpose(1, 2))
    blocks ^= 128  # the two's complement of q as a byte, its highest bit turned: q + 128


def unpack(packed, start, end):
    """The columns start ... end - 1 as int8 [K, end - start]."""
    width = packed.shape[2] - 8
    blocks = packed[start // width:end // width, :, :width] ^ 128  # [blocks, K, width]
    return blocks.view(torch.int8).transpose(0, 1).flatten(1)


# ---------------------------------------------------------------- a folder of its own

def write_folder(checkpoint, out):
    """Quantize an open `checkpoint.Checkpoint` into the new folder `out`, in the form that `checkpoint.load` reads.

    Tensor by tensor, in files of about SHARD bytes, so that no model is ever too large for the memory. The folder
    appears under its name when it is complete. Raises ValueError if it exists and is not empty, cannot be written, or
    if a weight is not finite.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        weight_map, shard = {}, {}  # tensor name -> file name; the tensors of the file that comes next

        def write_json(name, value):
            (temporary / name).write_text(json.dumps(value, indent=1) + "\n")

        def flush():
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, temporary / file, {"format": "pt"})
            shutil.copymode(temporary / "config.json", temporary / file)  # save_file makes it unreadable for others
            weight_map.update(dict.fromkeys(shard, file))
            shard.clear()

        write_json("config.json", checkpoint.config_json | {"quantization_config": {"quant_method": METHOD}})
        for name, tensor in tqdm(checkpoint.tensors, "quantizing", len(checkpoint.shapes), unit="tensor", leave=False,
                                 disable=None):
            if is_quantized(name):
                shard[name], shard[f"{name}_scale"] = quantize_tensor(tensor, name)
            else:
                shard[name] = tensor.clone()  # as read, it may keep pages of its file in memory
            if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
                flush()
        if shard:
            flush()
        write_json("model.safetensors.index.json", {"weight_map": weight_map})

        tokenizer = checkpoint.tokenizer
        tokenizer.tokenizer.save(str(temporary / "tokenizer.json"), pretty=False)
        write_json("tokenizer_config.json", tokenizer.special)
        write_json("generation_config.json", {"eos_token_id": sorted(tokenizer.eos_ids)})
        if tokenizer.has_chat_template:
            (temporary / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8", errors="replace")
        os.replace(temporary, out)  # over an empty folder, if there is one
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot write {out} ({getattr(error, 'strerror', None) or error}); make room on the disk or "
                         "name another folder with --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def parse_args():
    parser = argparse.ArgumentParser(
        description="Write a model with int8 weights into a new folder, for generate.py --model.",
        epilog="examples:\n" + __doc__.rpartition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="M", help="Hugging Face folder, hub id or .gguf file (default: SmolLM2-135M-Instruct)")
    add = parser.add_argument_group("output").add_argument
    add("--out", metavar="DIR", required=True, help="the folder to write, which must be new or empty")
    return parser.parse_args()


def main():
    args = parse_args()
    from checkpoint import open_checkpoint

    try:
        out = Path(args.out).resolve()
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise ValueError(f"{args.out} exists already; name a new or an empty folder with --out")
        checkpoint = open_checkpoint(args.model)
        if checkpoint.quantized:
            raise ValueError(f"{args.model} is quantized already; quantize the model it was made from")
        write_folder(checkpoint, out)
    except (OSError, ValueError) as error:
        print(f"quantize.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sizes = [sum(file.stat().st_size for file in files) / 1e6 for files in (checkpoint.files, out.iterdir())]
    print(f"{args.out}: {sizes[1]:.1f} MB, made from {sizes[0]:.1f} MB")


if __name__ == "__main__":
    main()
