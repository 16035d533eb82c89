"""Writes a model with int8 or int4 weights into a new folder, for generate.py --model.

`quantize.py` explains the rounding and runs this. The weights of every block's seven projections
become int8 or int4, those of the LM head int8. Everything else is copied. The model passes through
tensor by tensor, so it may be larger than the memory.

    python quantize.py --out /tmp/smollm2-int8
    python quantize.py --quantize int4 --out /tmp/smollm2-int4
    python quantize.py --model meta-llama/Llama-3.2-1B-Instruct --out llama-3.2-1b-int8
"""

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoint import open_checkpoint
from checkpoint.files import write_whole
from checkpoint.tensors import METHODS, VERSION, is_quantized, tensor_shapes
from cli.command_line import add_model_flag, make_parser, run_script, tell_int8
from cli.progress import progress
from quantize import quantize_int4, quantize_tensor

SHARD = 1 << 30  # bytes of weights in one file


def write_folder(checkpoint, out, kind="int8"):
    """Quantize an open `Checkpoint` into the new folder `out` (a Path), which `load` can read.

    kind: "int8" or "int4"
    The folder appears under its name when it is complete. Raises ValueError if it exists and is
    not empty, if it cannot be written, or if a weight is infinite or NaN.
    """
    method = next(method for method, name in METHODS.items() if name == kind)
    try:
        with write_whole(out) as folder:
            folder.mkdir()
            write_json(folder / "config.json", checkpoint.config_json | {
                "quantization_config": {"quant_method": method, "version": VERSION}})
            write_weights(checkpoint, folder, kind)
            write_tokenizer(checkpoint.tokenizer, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot write {out} ({reason}); make room on the disk or name another "
                         "folder with --out") from None


def write_weights(checkpoint, folder, kind):
    """Write the tensors in files of about SHARD bytes, and an index: which is in which file."""
    places, shard = {}, {}  # tensor name -> file name; the tensors of the next file
    shapes = tensor_shapes(checkpoint.config, kind)

    def flush():
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        # save_file makes its file unreadable for others: give it the folder's usual permissions.
        shutil.copymode(folder / "config.json", folder / file)
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in progress("quantizing", len(checkpoint.shapes), of=checkpoint.tensors):
        with checkpoint.blame_for(name):  # weights may be NaN
            if len(shapes[name]) == 3:
                shard[name] = quantize_int4(tensor, name)
            elif is_quantized(name):
                shard[name], shard[f"{name}_scale"] = quantize_tensor(tensor, name)
            else:
                shard[name] = tensor.clone()  # a copy, so that the file it came from can be closed
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD:
            flush()
    if shard:
        flush()
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def write_tokenizer(tokenizer, folder):
    """Write the tokenizer, its special tokens and its chat template."""
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", tokenizer.special)
    write_json(folder / "generation_config.json",
               {"eos_token_id": sorted(tokenizer.eos_ids), **tokenizer.sampling})
    if tokenizer.has_chat_template:
        (folder / "chat_template.jinja").write_text(
            tokenizer.template, encoding="utf-8", errors="replace")


def write_json(file, value):
    file.write_text(json.dumps(value, indent=1) + "\n")


# ---- command line ------------------------------------------------------------------------------

def parse_args():
    parser = make_parser(__doc__)
    add_model_flag(parser)
    add = parser.add_argument_group("output").add_argument
    add("--quantize", choices=METHODS.values(), default="int8",
        help="bits of a weight (default: %(default)s)")
    add("--out", metavar="DIR", required=True, help="folder to write; it must be new or empty")
    return parser.parse_args()


def main():
    args = parse_args()
    out = Path(args.out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{args.out} exists already; name a new or an empty folder with --out")
    checkpoint = open_checkpoint(args.model)
    if checkpoint.quantized:
        raise ValueError(
            f"{args.model} is quantized already; quantize the model that it was made from")
    write_folder(checkpoint, out, args.quantize)
    if args.quantize == "int4":
        tell_int8(checkpoint.config)
    before, after = (sum(file.stat().st_size for file in files) / 1e6
                     for files in (checkpoint.files, out.iterdir()))
    print(f"{args.out}: {after:.1f} MB, made from {before:.1f} MB")


if __name__ == "__main__":
    run_script(main)
