"""The thresholds of one model: a table by layer, projection and sparsity, its file, and where to
look for it.

`calibrate.py` makes such a table from text; decoding needs only its file, in safetensors format.
The tensors `thresholds` and `sparsities` (the share that each threshold drops) are float32
[n_layers, 7, 96]: layer; q, k, v, o, gate, up, down; the sparsities of `sparsity_grid`, float32
[96], 0 to 0.95 in steps of 0.01. The metadata are strings: `format` ("1"), `fingerprint` (the
model's sizes, JSON), `weights` (16 hex digits that identify the model's weights), `allocation`,
`tokens`, `window` and `source`. A file may come from anyone, so loading checks everything in it.
To read one without this module:

    from safetensors import safe_open

    with safe_open("calibrations/llama-2-13b.greedy.safetensors", "pt") as file:
        metadata, thresholds = file.metadata(), file.get_tensor("thresholds")
    q_at_half = thresholds[:, 0, 50]    # q's threshold in every layer, at 50%
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from checkpoint.digest import weights_digest
from checkpoint.files import one_line, write_whole
from cpu.compiler import cache_folder
from model import PROJECTIONS

FORMAT = "1"
ALLOCATIONS = ("fisher", "greedy", "uniform")  # best first, see allocations.py
GRID = torch.arange(96) / 100  # the sparsities in a calibration's tables: 0, 0.01, ... 0.95
SINKS = 8  # a window's first tokens draw attention and have huge activations: they do not count


class CalibrationError(ValueError):
    """A calibration cannot be made or used; the message is one sentence for the user."""


# ---- which model a calibration belongs to ------------------------------------------------------

def fingerprint(config):
    """What a calibration must share with a model: the numbers that fix the shapes of its weights,
    as a JSON string.

    The context and RoPE's settings do not count: a release with a longer context may use the
    calibration of the model that it was made from.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads",
             "n_kv_heads", "head_dim", "qkv_bias")
    return json.dumps({name: getattr(config, name) for name in names})


def own_config(model):
    """The Config of a Model's checkpoint: whole where several GPUs hold a slice each, and with the
    context that the model was made for."""
    return getattr(model, "own_config", model.config)


def cache_path(model):
    """Where this machine keeps the model's own calibration."""
    return cache_folder() / f"calibration-{weights_digest(model)}.safetensors"


# ---- the table and its file --------------------------------------------------------------------

class Calibration:
    """Two tables, float32 [n_layers, 7, 96]: thresholds, and the sparsities that they reach.

    The axes are the layer, the projection (in the order of PROJECTIONS) and GRID. The metadata,
    a dict of strings, say how the tables were made. `path` is the file they are from, if any.
    """

    def __init__(self, thresholds, sparsities, metadata, path=None):
        self.table, self.sparsities, self.metadata = thresholds, sparsities, metadata
        self.path = path

    def is_own(self, model):
        """Whether the thresholds were found on exactly this model's weights."""
        return self.metadata.get("weights") == weights_digest(model)

    def origin(self):
        """One line for people: the file, and what its thresholds were made from."""
        source = self.metadata.get("source") or "an unnamed text"
        return f"{self.path} ({self.metadata['allocation']}, from {source})"

    def thresholds(self, sparsity):
        """Thresholds float32 [n_layers, 7] for a sparsity of the whole model.

        For 0 they are all -1, which is exactly dense. Raises CalibrationError outside [0, 0.95].
        """
        if sparsity == 0:
            return torch.full(self.table.shape[:-1], -1.0)
        return self.at(self.table, sparsity)

    def expected(self, sparsity):
        """About the share of its inputs that each projection drops at `thresholds(sparsity)`,
        float32 [n_layers, 7]."""
        return self.at(self.sparsities, sparsity)

    @staticmethod
    def at(table, sparsity):
        """A table [n_layers, 7, 96] at one sparsity, linearly interpolated -> [n_layers, 7]."""
        if not 0 <= sparsity <= 0.95:
            raise CalibrationError(
                f"sparsity {sparsity} is out of range; choose a value from 0 to 0.95")
        position = sparsity * 100
        i = min(int(position), len(GRID) - 2)
        return torch.lerp(table[..., i], table[..., i + 1], position - i)

    def save(self, path):
        """Write the file, whole or not at all. Raises CalibrationError if that is impossible."""
        tensors = {"sparsity_grid": GRID, "thresholds": self.table, "sparsities": self.sparsities}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            with write_whole(path) as temporary:
                temporary.write_bytes(save(tensors, self.metadata))
        except OSError as error:
            raise CalibrationError(
                f"cannot write the calibration {path} ({one_line(error)})") from None

    @classmethod
    def load(cls, path, config):
        """Read a calibration of this config's model. Raises CalibrationError for anything else."""
        again = "make the file anew with calibrate.py"
        shape = [config.n_layers, len(PROJECTIONS), len(GRID)]
        shapes = {"sparsity_grid": shape[2:], "thresholds": shape, "sparsities": shape}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                complaint = misfit(metadata, config)
                if complaint:
                    raise CalibrationError(f"{path} {complaint}; {again}")
                for name, shape in shapes.items():
                    header = file.get_slice(name)
                    dtype, found = header.get_dtype(), header.get_shape()
                    if (dtype, found) != ("F32", shape):
                        raise CalibrationError(f"{path}: tensor {name} is {dtype} {found}, "
                                               f"expected F32 {shape}; {again}")
                # copies, so that a later change of the file does not change them
                grid, table, sparsities = (file.get_tensor(name).clone() for name in shapes)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"cannot read calibration {path} ({one_line(error)}); {again}") from None
        rising = (table.diff(dim=-1) >= 0).all()
        if not (table.isfinite().all() and (table >= 0).all() and rising):
            raise CalibrationError(f"{path}: thresholds must be finite, not negative and not "
                                   f"fall as sparsity grows; {again}")
        if not (torch.equal(grid, GRID) and ((sparsities >= 0) & (sparsities <= 1)).all()):
            raise CalibrationError(f"{path}: sparsities must lie in [0, 1], on a grid of 0, "
                                   f"0.01 ... 0.95; {again}")
        return cls(table, sparsities, metadata, path)


def misfit(metadata, config):
    """Why a file's metadata do not fit this program or this config; None if they do."""
    if metadata.get("format") != FORMAT:
        return f"is not a calibration of format {FORMAT}"
    if metadata.get("fingerprint") != fingerprint(config):
        return f"belongs to another model ({str(metadata.get('fingerprint'))[:300]!r})"
    if metadata.get("allocation") not in ALLOCATIONS:
        return (f"names {str(metadata.get('allocation'))[:300]!r} as its allocation, expected one "
                f"of {', '.join(ALLOCATIONS)}")
    return None


# ---- look-up -----------------------------------------------------------------------------------

def candidates(model):
    """Yield the calibrations for this model, best first.

    Those found on exactly its weights precede those found on others of the same shapes. Of each
    kind, calibration.safetensors in the model's folder comes first, then the one in the user's
    cache, then those under calibrations/. Raises CalibrationError if one of them is unfit for
    use.
    """
    config, folder = own_config(model), getattr(model, "folder", None)
    own = [] if folder is None else [folder / "calibration.safetensors"]  # None if made in memory
    paths = [*filter(Path.is_file, [*own, cache_path(model)])]
    for path in sorted(Path(__file__).parent.glob("*.safetensors")):  # the best allocation first
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") == fingerprint(config):
                paths.append(path)
    others = []
    for path in paths:
        calibration = Calibration.load(path, config)
        if calibration.is_own(model):
            yield calibration
        else:
            others.append(calibration)
    yield from others


def find(model, path=None):
    """The Calibration at `path`; without a path the best there is (see `candidates`), or None.

    Raises CalibrationError if a file is unfit for use with this model.
    """
    if path is not None:
        return Calibration.load(path, own_config(model))
    return next(candidates(model), None)
