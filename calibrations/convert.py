"""Makes the calibrations of this folder that come from the thresholds published with TEAL.

For six models, Liu et al. (arXiv:2408.14690) released what they had counted: the quantiles of |x|
at the four sites of every block, and the sparsity that their greedy search gave each projection
at block sparsities of 0.05, 0.10, ... 0.90. Read together, these tables are thresholds. They lie
in teal/, one .npz a model (teal/README.md describes them). Run this from the project's folder:

    python -m calibrations.convert
"""

from pathlib import Path

import numpy as np
import torch

from calibrations.allocations import byte_shares, interpolate
from calibrations.thresholds import FORMAT, GRID, Calibration, fingerprint
from checkpoint.known_models import KNOWN_MODELS
from cli.command_line import make_parser, run_script
from model import PROJECTIONS, SITES

FOLDER = Path(__file__).parent
NOTES = (
    "Tables made with Llama-3 serve Llama-3.1 too, whose weights have the same shapes. The "
    "release's default-path histograms of Llama-3-8B are copies of Llama-2-7B's; these "
    "thresholds come from the folder beside them, whose counts fit Llama-3-8B. The release's "
    "greedy search weighed k and v at 1/8 of q for every model, and could raise them beyond "
    "1; its sparsities are cut at 0.95 and taken at the block sparsity they truly reach.")


def convert(path, allocation):
    """The tables in one .npz -> Calibration; the allocation is "greedy" or "uniform"."""
    config = KNOWN_MODELS[path.stem.lower()]
    with np.load(path, allow_pickle=False) as file:
        quantiles = torch.from_numpy(file["magnitude_quantiles"])  # [n_layers, 4 sites, 96]
        published = torch.from_numpy(file["greedy_sparsity"]).double()  # [n_layers, 18, 7]
    per_site = torch.tensor([len(names) for names in SITES.values()])
    quantiles = quantiles.repeat_interleave(per_site, dim=1)  # [n_layers, 7, 96]

    if allocation == "uniform":
        sparsities = GRID.expand(config.n_layers, len(PROJECTIONS), -1)
    else:
        published = published.clamp(0, 0.95)
        none, most = torch.zeros_like(published[:, :1]), torch.full_like(published[:, :1], 0.95)
        paths = torch.cat((none, published, most), dim=1)  # [n_layers, 20, 7]
        sparsities = torch.stack([interpolate(path, byte_shares(config)) for path in paths])

    position = sparsities.double() * 100
    i = position.long().clamp(max=len(GRID) - 2)
    thresholds = torch.lerp(quantiles.gather(-1, i), quantiles.gather(-1, i + 1),
                            (position - i).float())
    return Calibration(thresholds, sparsities.float(), {
        "format": FORMAT, "fingerprint": fingerprint(config), "allocation": allocation,
        "tokens": "unknown", "notes": NOTES,
        "source": f"{path.stem}: the tables released with TEAL's code, "
                  "github.com/FasterDecoding/TEAL",
        "licence": "MIT License, Copyright (c) 2024 FasterDecoding"})


def convert_all(folder):
    """Write every model's two calibrations into a folder, and yield their paths."""
    for table in sorted((FOLDER / "teal").glob("*.npz")):
        name = table.stem.lower().replace("mistral-7b", "mistral-7b-v0.1")
        for allocation in ("greedy", "uniform"):
            path = Path(folder) / f"{name}.{allocation}.safetensors"
            convert(table, allocation).save(path)
            yield path


def main():
    make_parser(__doc__).parse_args()
    for path in convert_all(FOLDER):
        print(path)


if __name__ == "__main__":
    run_script(main)
