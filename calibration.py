"""The thresholds of one model, as a function of the sparsity asked for: a table, its file, and where to look for it.

`calibrate.py` makes such a table from text; decoding needs no more than this. The file is a small safetensors:
thresholds and the sparsities they reach, float32 [n_layers, 7, 96], for every layer, projection and sparsity 0, 0.01,
... 0.95. Whatever is loaded is checked against the model's shapes first, for it may be anybody's file.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint import one_line
from model import PROJECTIONS

FORMAT = "1"
ALLOCATIONS = ("fisher", "greedy", "uniform")  # best first, see calibrate.py
GRID = torch.arange(96) / 100  # the sparsities a calibration tabulates: 0, 0.01, ... 0.95


class CalibrationError(ValueError):
    """A calibration cannot be made or used; the message is one sentence for the user."""


def fingerprint(config):
    """What a calibration must share with a model: the numbers that fix its weights' shapes, as a JSON string.

    Not the context or the rotary settings (a longer-context release may use its parent's calibration), nor the
    architecture's name (GGUF files call a Mistral a Llama).
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads", "head_dim",
             "qkv_bias")
    return json.dumps({name: getattr(config, name) for name in names})


def weights_digest(model):
    """16 hex digits that tell fine-tunes of one architecture apart, of the final norm's weights in bfloat16."""
    norm = model.norm.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy()
    return hashlib.sha256(fingerprint(model.config).encode() + norm.tobytes()).hexdigest()[:16]


def cache_path(model):
    """Where this model's own calibration is kept on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nanoteal" / f"calibration-{weights_digest(model)}.safetensors"


class Calibration:
    """Thresholds and expected sparsities, float32 [n_layers, 7, 96]: layer, projection (order PROJECTIONS), GRID."""

    def __init__(self, thresholds, sparsities, metadata):
        self.table, self.sparsities, self.metadata = thresholds, sparsities, metadata

    def thresholds(self, sparsity):
        """Thresholds float32 [n_layers, 7] for a model-wide sparsity; -1 everywhere, exactly dense, for 0.

        Raises ValueError outside [0, 0.95].
        """
        return self.at(self.table, sparsity) if sparsity else torch.full(self.table.shape[:2], -1.0)

    def expected(self, sparsity):
        """About the share of each projection's inputs that `thresholds(sparsity)` drops, float32 [n_layers, 7]."""
        return self.at(self.sparsities, sparsity)

    def at(self, table, sparsity):
        """A table [n_layers, 7, 96] at one sparsity, linearly interpolated -> [n_layers, 7]."""
        if not 0 <= sparsity <= 0.95:
            raise CalibrationError(f"sparsity {sparsity} is out of range; choose a value from 0 to 0.95")
        position = sparsity * 100
        i = min(int(position), len(GRID) - 2)
        return torch.lerp(table[..., i], table[..., i + 1], position - i)

    def save(self, path):
        """Write the file whole or not at all; raises CalibrationError if that is not possible."""
        path = Path(path)
        tensors = {"sparsity_grid": GRID, "thresholds": self.table, "sparsities": self.sparsities}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                temporary = Path(folder) / path.name
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, self.metadata)
                os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot write the calibration {path} ({one_line(error)})") from None

    @classmethod
    def load(cls, path, config):
        """Read a calibration of the model with this config; raises CalibrationError for anything else."""
        shape, again = [config.n_layers, len(PROJECTIONS), len(GRID)], "make the file anew with calibrate.py"
        shapes = {"sparsity_grid": shape[2:], "thresholds": shape, "sparsities": shape}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise CalibrationError(f"{path} is no calibration of format {FORMAT}; make one with calibrate.py")
                if metadata.get("fingerprint") != fingerprint(config):
                    other = str(metadata.get("fingerprint"))[:300]
                    raise CalibrationError(f"{path} belongs to another model ({other!r}); make one for this model with "
                                           "calibrate.py")
                for name, shape in shapes.items():
                    header = file.get_slice(name)
                    if (header.get_dtype(), header.get_shape()) != ("F32", shape):
                        raise CalibrationError(f"{path}: tensor {name} is {header.get_dtype()} {header.get_shape()}, "
                                               f"expected F32 {shape}; {again}")
                grid, table, sparsities = (file.get_tensor(name).clone() for name in shapes)  # copies, not the file
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"cannot read calibration {path}: {one_line(error)}") from None
        if not (table.isfinite().all() and (table >= 0).all() and (table.diff(dim=-1) >= 0).all()):
            raise CalibrationError(f"{path}: thresholds must be finite, not negative and not fall as sparsity grows; "
                                   + again)
        if not (torch.equal(grid, GRID) and ((sparsities >= 0) & (sparsities <= 1)).all()):
            raise CalibrationError(f"{path}: sparsities must lie in [0, 1], on a grid of 0, 0.01 ... 0.95; {again}")
        return cls(table, sparsities, metadata)


def candidates(model, folder=None):
    """Yield the calibrations at hand for this model, best first, each loaded when asked for.

    Its own come first, from `folder`/calibration.safetensors and from the user's cache; then those under calibrations/
    made for the same architecture numbers. Raises CalibrationError when one of them is not fit for use.
    """
    beside = [Path(folder) / "calibration.safetensors"] if folder else []
    for path in (*beside, cache_path(model)):
        if path.is_file():
            yield Calibration.load(path, model.config)
    shipped = []
    for path in sorted((Path(__file__).parent / "calibrations").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if metadata["fingerprint"] == fingerprint(model.config):
            shipped.append((ALLOCATIONS.index(metadata["allocation"]), path))
    for _, path in sorted(shipped):
        yield Calibration.load(path, model.config)


def find(model, path=None, folder=None):
    """The Calibration at `path`, else the best at hand (see `candidates`), else None.

    Raises CalibrationError if that file is not fit for use with this model.
    """
    return next(candidates(model, folder), None) if path is None else Calibration.load(path, model.config)
