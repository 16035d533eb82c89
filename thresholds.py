"""The thresholds of one model: a table by layer, projection and sparsity, its file, and where to
look for it.

`calibrate.py` makes such a table from text; decoding needs only this file. A calibration is a
small safetensors file: thresholds and the sparsities that they reach, float32 [n_layers, 7, 96],
for every layer, every projection and the sparsities 0, 0.01, ... 0.95. The file may be anybody's,
so loading checks everything in it.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from files import cache_folder, one_line, write_whole
from model import PROJECTIONS

FORMAT = "1"
ALLOCATIONS = ("fisher", "greedy", "uniform")  # best first, see calibrate.py
GRID = torch.arange(96) / 100  # the sparsities in a calibration's tables: 0, 0.01, ... 0.95


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


def weights_digest(model):
    """16 hex digits of the final norm's weights in bfloat16. They tell fine-tunes of one
    architecture apart."""
    norm = model.norm.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy()
    digest = hashlib.sha256(fingerprint(model.whole_config).encode() + norm.tobytes())
    return digest.hexdigest()[:16]


def cache_path(model):
    """Where this machine keeps the model's own calibration."""
    return cache_folder() / f"calibration-{weights_digest(model)}.safetensors"


# ---- the table and its file --------------------------------------------------------------------

class Calibration:
    """Two tables, float32 [n_layers, 7, 96]: thresholds, and the sparsities that they reach.

    The axes are the layer, the projection (in the order of PROJECTIONS) and GRID. The metadata,
    a dict of strings, say how the tables were made.
    """

    def __init__(self, thresholds, sparsities, metadata):
        self.table, self.sparsities, self.metadata = thresholds, sparsities, metadata

    def thresholds(self, sparsity):
        """Thresholds float32 [n_layers, 7] for a sparsity of the whole model.

        For 0 they are all -1, which is exactly dense. Raises CalibrationError outside [0, 0.95].
        """
        if sparsity == 0:
            return torch.full(self.table.shape[:2], -1.0)
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
        """Read a calibration of the model with this config. Raises CalibrationError for anything
        else."""
        again = "make the file anew with calibrate.py"
        shape = [config.n_layers, len(PROJECTIONS), len(GRID)]
        shapes = {"sparsity_grid": shape[2:], "thresholds": shape, "sparsities": shape}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                check_metadata(path, metadata, config)
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
                f"cannot read calibration {path}: {one_line(error)}") from None
        rising = (table.diff(dim=-1) >= 0).all()
        if not (table.isfinite().all() and (table >= 0).all() and rising):
            raise CalibrationError(f"{path}: thresholds must be finite, not negative and not "
                                   f"fall as sparsity grows; {again}")
        if not (torch.equal(grid, GRID) and ((sparsities >= 0) & (sparsities <= 1)).all()):
            raise CalibrationError(f"{path}: sparsities must lie in [0, 1], on a grid of 0, "
                                   f"0.01 ... 0.95; {again}")
        return cls(table, sparsities, metadata)


def check_metadata(path, metadata, config):
    """Raise CalibrationError unless a file's metadata fit this program and this config."""
    if metadata.get("format") != FORMAT:
        raise CalibrationError(
            f"{path} is no calibration of format {FORMAT}; make one with calibrate.py")
    if metadata.get("fingerprint") != fingerprint(config):
        other = str(metadata.get("fingerprint"))[:300]
        raise CalibrationError(f"{path} belongs to another model ({other!r}); make one for this "
                               "model with calibrate.py")
    if metadata.get("allocation") not in ALLOCATIONS:
        other = str(metadata.get("allocation"))[:300]
        raise CalibrationError(f"{path} names {other!r} as its allocation, expected one of "
                               f"{', '.join(ALLOCATIONS)}; make the file anew with calibrate.py")


# ---- look-up -----------------------------------------------------------------------------------

def candidates(model, folder=None):
    """Yield the calibrations for this model, best first.

    Its own come first: `folder`/calibration.safetensors, then the one in the user's cache. Those
    under calibrations/ follow, if they were made for a model with the same fingerprint. Raises
    CalibrationError if one of them is unfit for use.
    """
    beside = [Path(folder) / "calibration.safetensors"] if folder else []
    for path in (*beside, cache_path(model)):
        if path.is_file():
            yield Calibration.load(path, model.whole_config)
    shipped = []
    for path in sorted((Path(__file__).parent / "calibrations").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("fingerprint") == fingerprint(model.whole_config):
            shipped.append(Calibration.load(path, model.whole_config))
    yield from sorted(shipped, key=lambda c: ALLOCATIONS.index(c.metadata["allocation"]))


def find(model, path=None, folder=None):
    """The Calibration at `path`; without a path the best there is (see `candidates`), or None.

    Raises CalibrationError if that file is unfit for use with this model.
    """
    if path is not None:
        return Calibration.load(path, model.whole_config)
    return next(candidates(model, folder), None)
