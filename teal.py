"""The thresholds published with TEAL, converted to calibrations of this project.

Liu et al. (arXiv:2408.14690) released, for six models, what they had counted: the quantiles of |x| at the four sites of
every block, and the sparsities their greedy search gave each projection at block sparsities of 0.05, 0.1 ... 0.9. Read
together, these tables are thresholds. Tables: arrays magnitude_quantiles [n_layers, 4, 96] on the grid 0, 0.01 ... 0.95
and greedy_sparsity [n_layers, 18, 7], as an .npz named after its model.

    python teal.py Llama-3-8B.npz --allocation greedy --out calibrations/llama-3-8b.greedy.safetensors
"""

import sys
from pathlib import Path

import numpy as np
import torch

from calibrate import SITE_OF, byte_shares, interpolate
from calibration import FORMAT, GRID, Calibration, CalibrationError, fingerprint
from generate import make_parser
from model import PROJECTIONS, Config

# vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads of the models they are for
MODELS = {
    "Llama-2-7B": (32000, 4096, 11008, 32, 32, 32),
    "Llama-2-13B": (32000, 5120, 13824, 40, 40, 40),
    "Llama-2-70B": (32000, 8192, 28672, 80, 64, 8),
    "Llama-3-8B": (128256, 4096, 14336, 32, 32, 8),
    "Llama-3-70B": (128256, 8192, 28672, 80, 64, 8),
    "Mistral-7B": (32000, 4096, 14336, 32, 32, 8),
}
NOTES = (
    "Tables made with Llama-3 serve Llama-3.1 too, whose weights have the same shapes. The release's "
    "default-path histograms of Llama-3-8B are copies of Llama-2-7B's; these thresholds come from the folder beside "
    "them, whose counts fit Llama-3-8B. The release's greedy search weighed k and v at 1/8 of q for every model, and "
    "could raise them beyond 1; its sparsities are cut at 0.95 and taken at the block sparsity they truly reach.")


def config_of(name):
    """The config of one of MODELS."""
    vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads = MODELS[name]
    head_dim = hidden_size // n_heads
    return Config("llama", vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim)


def convert(path, allocation):
    """The tables in one .npz -> Calibration, "uniform" or "greedy"."""
    name = Path(path).stem
    if name not in MODELS:
        raise CalibrationError(f"{path} is named after no model TEAL published; expected one of {', '.join(MODELS)}")
    config = config_of(name)
    with np.load(path, allow_pickle=False) as file:
        quantiles = torch.from_numpy(file["magnitude_quantiles"])[:, SITE_OF]  # [n_layers, 7, 96]
        published = torch.from_numpy(file["greedy_sparsity"]).double().clamp(0, 0.95)  # [n_layers, 18, 7]
    if allocation == "uniform":
        sparsities = GRID.expand(config.n_layers, len(PROJECTIONS), -1)
    else:
        ends = torch.zeros_like(published[:, :1]), torch.full_like(published[:, :1], 0.95)
        paths = torch.cat((ends[0], published, ends[1]), 1)  # [n_layers, 20, 7]
        sparsities = torch.stack([interpolate(path, byte_shares(config)) for path in paths])
    position = sparsities.double() * 100
    i = position.long().clamp(max=len(GRID) - 2)
    thresholds = torch.lerp(quantiles.gather(-1, i), quantiles.gather(-1, i + 1), (position - i).float())
    return Calibration(thresholds, sparsities.float(), {
        "format": FORMAT, "fingerprint": fingerprint(config), "allocation": allocation, "tokens": "unknown",
        "source": f"{name}: the tables released with TEAL's code, github.com/FasterDecoding/TEAL",
        "licence": "MIT License, Copyright (c) 2024 FasterDecoding", "notes": NOTES})


def main():
    parser = make_parser(__doc__)
    parser.add_argument("file", metavar="FILE.npz", help="tables named after their model: " + ", ".join(MODELS))
    parser.add_argument("--allocation", choices=("greedy", "uniform"), default="greedy", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE", required=True, help="file to write")
    args = parser.parse_args()
    try:
        convert(args.file, args.allocation).save(args.out)
    except (OSError, ValueError) as error:
        print(f"teal.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
