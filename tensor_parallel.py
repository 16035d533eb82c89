"""One model on several GPUs or processes: every rank holds a slice of every large matrix.

q, k, v, gate and up are split by output: a rank computes its own heads and MLP channels from the
whole x. o and down are split by input: a rank multiplies with the rows of its own heads or
channels, and one all-reduce after each of them adds up the ranks' results. That makes two
all-reduces of one hidden state per layer, and nothing else is exchanged. Embedding and LM head are
whole on every rank. The head is 1.5% of a 70B model's weights, and this way all ranks choose the
same token by themselves.

A rank's model is an ordinary `Model` of a slimmer Config, so sparsity, int8, the KV cache and the
CUDA graph work as they are. q ... up drop the same x everywhere; o and down choose from their
slices. The command line makes the `Ranks`, `checkpoint.load` reads their slices, and `Model.ranks`
tells a decoder whether there is anything to add up.

    torchrun --nproc-per-node 2 generate.py --model M --sparsity 0.5 --prompt "Name three rivers."

Source: Shoeybi et al., "Megatron-LM" (arXiv:1909.08053), section 3. Needs only torch.
"""

import dataclasses
import datetime
import os
import sys

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

SECONDS = 600  # a rank that waits longer for the others gives up; a rank that dies is seen at once


def rank():
    """This process's number among those that torchrun started, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Meet the other ranks: NCCL between GPUs, gloo between CPUs. Returns this rank's device.

    Does nothing without torchrun. Raises ValueError if there are fewer GPUs than ranks.
    """
    if world_size() == 1 or dist.is_initialized():
        return device
    backend, options = "gloo", {}
    if device.startswith("cuda"):
        local, held = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= held:
            raise ValueError(f"there are {held} GPUs for rank {local} of this machine; start at "
                             "most one process for each GPU, or use --device cpu")
        device, backend = f"cuda:{local}", "nccl"
        torch.cuda.set_device(local)
        options["device_id"] = torch.device(device)
    if rank() > 0:  # only the first rank prints
        sys.stdout = sys.stderr = open(os.devnull, "w")
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=SECONDS), **options)
    return device


def stop():
    """Wait for the other ranks and part from them; the last thing that a rank does."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def require_one_process(what):
    """Raise ValueError under torchrun, for what only one process can make."""
    if world_size() > 1:
        raise ValueError(f"{what} takes one process; run it without torchrun first")


def from_first(value):
    """The first rank's value on every rank: a prompt, a seed, a line of a conversation."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def mean(value):
    """The mean of a float over all ranks. Every rank must call it."""
    return total(torch.tensor(value, dtype=torch.float64)).item() / world_size()


def total(x):
    """The sum of a tensor on the CPU over all ranks. Every rank must call it."""
    if not dist.is_initialized():
        return x
    return all_reduce(x.to("cuda" if dist.get_backend() == "nccl" else "cpu")).cpu()


def all_reduce(x):
    """Add up a tensor over all ranks, in place; returns it."""
    if getattr(x, "is_shared_by_gpus", False):
        torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", dist.group.WORLD.group_name)
    else:
        dist.all_reduce(x)
    return x


# ---- a rank's slice ----------------------------------------------------------------------------

class Ranks:
    """The processes that share one model, as one of them sees it: the slices that it holds."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def slim(self, config):
        """The Config of a rank. Raises ValueError if heads or channels do not divide."""
        if config.qk_norm == "all" or config.norms_after:
            raise ValueError("ranks cannot share a model with norms over all heads or after the "
                             "block (OLMo); run it in one process")
        names = ("n_kv_heads", "n_heads", "intermediate_size")
        for name in names:
            if getattr(config, name) % self.size:
                raise ValueError(f"{self.size} ranks cannot share the model's "
                                 f"{getattr(config, name)} {name}; start a number of processes "
                                 "that divides it")
        slim = {name: getattr(config, name) // self.size for name in names}
        return dataclasses.replace(config, **slim)

    def cut(self, name, shape):
        """What this rank keeps of the tensor of this Hugging Face name and shape, [out_features,
        in_features] or [out_features], as slices."""
        module, _, kind = name.rpartition(".")
        part, slices = module.rpartition(".")[2], [slice(None)] * len(shape)
        by_output = part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        if by_output or part in ("o_proj", "down_proj") and kind == "weight":
            dim = 0 if by_output else 1
            width = shape[dim] // self.size
            slices[dim] = slice(self.rank * width, (self.rank + 1) * width)
        return tuple(slices)

    def connect(self, model):
        """Let a rank's Model add up o and down over all ranks."""
        model.ranks = self
        for block in model.blocks:
            for name in ("attention", "mlp"):
                part = getattr(block, name)
                setattr(block, name, lambda *inputs, part=part: all_reduce(part(*inputs)))
            for linear in (block.o, block.down):
                if linear.bias is not None and self.rank > 0:
                    linear.bias.zero_()  # the first rank adds it

    total, all_reduce = staticmethod(total), staticmethod(all_reduce)

    @staticmethod
    def empty(size, dtype, device):
        """A tensor for `all_reduce`. One that all GPUs of this machine can read needs one kernel,
        no NCCL."""
        if torch.device(device).type == "cpu":
            return torch.empty(size, dtype=dtype)
        x = symm_mem.empty(size, dtype=dtype, device=device)
        symm_mem.rendezvous(x, dist.group.WORLD)
        x.is_shared_by_gpus = True  # `all_reduce` takes the short way for it
        return x


def ranks():
    """The Ranks that torchrun started; None without torchrun."""
    return Ranks(rank(), world_size()) if world_size() > 1 else None
