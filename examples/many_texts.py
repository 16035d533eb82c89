"""Many texts written side by side, to measure quality: hundreds take little longer than one.

Every product is computed for the newest tokens of all texts at once, with each one's input masked.
That is what the decoder computes for one text, because a token's mask depends only on that
token. The weights are read whole, so this says nothing about speed. On a GPU a step is captured as
a CUDA graph. The likeliest token is always taken.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from cli.accounting import block_bytes
from model import PROJECTIONS, Block, apply_rope, causal_mask, dense, masked, rms_norm

CHECK = 32  # after so many tokens, texts that have ended are looked for and left out
PART = 96  # prompts that go through the model at once


@dataclass
class ManyTexts:
    """B prompts that the model has read."""

    k: torch.Tensor  # keys and values, [n_layers, B, n_kv_heads, S, head_dim]
    v: torch.Tensor
    position: torch.Tensor  # of the newest token, int64 [B]
    token: torch.Tensor  # the one that follows, int64 [B]

    def select(self, rows):
        """A copy of some of them."""
        return ManyTexts(self.k[:, rows], self.v[:, rows], self.position[rows], self.token[rows])


class BlockOfMany(Block):
    """A `Block` for T tokens of each of B texts, x [B, T, hidden_size].

    Its cache is ManyTexts. T > 1 are prompts from their first token on; what stands after a
    shorter one's end is written over later.
    """

    def attention(self, x, ropes, texts, project):
        config, n_tokens = self.config, x.shape[1]
        q, k, v = project(x, self.qkv).split(self.qkv.widths, dim=-1)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm, config.norm_eps)
            k = rms_norm(k, self.k_norm, config.norm_eps)
        q, k, v = (y.unflatten(-1, (-1, config.head_dim)) for y in (q, k, v))  # [B, T, heads, ...]
        cos, sin, growth = ropes[config.rope_kind(self.i)]  # [T or B, 1, ...]
        if n_tokens == 1:
            cos, sin, growth = (y[texts.position][:, None] for y in (cos, sin, growth))
        q, k = apply_rope(q, cos * growth, sin * growth), apply_rope(k, cos, sin)
        keys, values = texts.k[self.i], texts.v[self.i]  # [B, n_kv_heads, S, head_dim]
        if n_tokens > 1:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            keys[:, :, :n_tokens], values[:, :, :n_tokens] = k, v
            mask = causal_mask(n_tokens, n_tokens, config.window(self.i), x.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                               enable_gqa=True).transpose(1, 2)
        else:
            rows = torch.arange(len(x), device=x.device)
            keys[rows, :, texts.position], values[rows, :, texts.position] = k[:, 0], v[:, 0]
            distance = texts.position[:, None] - torch.arange(keys.shape[2], device=x.device)
            seen = (distance >= 0) & (distance < (config.window(self.i) or keys.shape[2]))
            q = q[:, 0].unflatten(1, (config.n_kv_heads, -1))  # the queries of each key head
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
        return project(y.reshape(len(x), n_tokens, -1), self.o)


def many_blocks(model):
    """The model's blocks, as blocks of many texts with the same weights."""
    blocks = []
    for block in model.blocks:  # the order of norms stays that of the block's own class
        kind = type("BlockOfMany", (BlockOfMany, type(block)), {})
        blocks.append(kind.__new__(kind))
        blocks[-1].__dict__ = block.__dict__
    return blocks


@torch.inference_mode()
def read(model, prompts, n_tokens):
    """Read prompts, lists of ids, dense -> ManyTexts, with memory for n_tokens more of each."""
    config, longest = model.config, max(map(len, prompts))
    shape = (config.n_layers, len(prompts), config.n_kv_heads, longest + n_tokens, config.head_dim)
    k, v = (torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(2))
    position = torch.tensor([len(ids) - 1 for ids in prompts], device=model.device)
    texts = ManyTexts(k, v, position, torch.zeros_like(position))
    ropes, blocks = model.rope(0, longest), many_blocks(model)
    for start in range(0, len(prompts), PART):
        rows = slice(start, start + PART)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts[rows]])
        x = model.embed(ids.flatten().to(model.device)).unflatten(0, ids.shape)
        part = ManyTexts(k[:, rows], v[:, rows], position[rows], None)
        for block in blocks:
            x = block(x, ropes, part, dense)
        x = x[torch.arange(len(x), device=model.device), part.position]  # each one's last token
        texts.token[rows] = model.logits(rms_norm(x, model.norm, config.norm_eps)).argmax(-1)
    return texts


@torch.inference_mode()
def write(model, texts, thresholds, n_tokens, stop, has_ended):
    """Continue texts, as `read` returns them, by at most n_tokens tokens each.

    thresholds: float32 [n_layers, 7]; None is dense
    stop:       ids that end a text
    has_ended:  a function of a text's number and its new ids, asked now and then: whether it ends
    Returns each text's new ids, and the share of the blocks' weights that need not be read.
    """
    device, n = model.device, len(texts.token)
    rows = torch.arange(n, device=device)
    new = torch.full((n, n_tokens), -1, device=device)  # -1 after a text's end
    kept = torch.zeros(model.config.n_layers, len(PROJECTIONS), dtype=torch.int64, device=device)
    n_steps = torch.zeros((), dtype=torch.int64, device=device)
    stop = torch.tensor(sorted(stop), device=device)
    ropes, blocks = model.rope(0, texts.k.shape[3]), many_blocks(model)
    table = None if thresholds is None else thresholds.to(device)

    def project(x, linear):
        if table is None:
            return dense(x, linear)
        t = table[linear.layer, linear.places]
        keep = ~(x.float().abs() <= t[:, None, None, None])  # [projections, B, 1, K]
        kept[linear.layer, linear.places] += (keep & alive[:, None, None]).sum((1, 2, 3))
        return masked(x, linear, t)

    def step():
        n_steps.add_(alive.sum())
        texts.position.add_(1)
        x = model.embed(texts.token)[:, None]
        for block in blocks:
            x = block(x, ropes, texts, project)
        logits = model.logits(rms_norm(x[:, 0], model.norm, model.config.norm_eps))
        texts.token.copy_(logits.argmax(-1))
        alive.logical_and_((texts.token[:, None] != stop).all(1))

    texts = replace(texts, position=texts.position.clone(), token=texts.token.clone())
    alive = (texts.token[:, None] != stop).all(1)
    new[:, 0] = torch.where(alive, texts.token, -1)
    changed = texts.position, texts.token, alive, kept, n_steps
    advance = capture(step, changed)
    for i in range(1, n_tokens):
        advance()
        new[rows, i] = torch.where(alive, texts.token, -1)
        if i % CHECK == 0:
            alive &= torch.tensor([
                going and not has_ended(row, ids[:i + 1]) for row, going, ids in
                zip(rows.tolist(), alive.tolist(), new[rows].tolist())], device=device)
            if not alive.any():
                break
            if alive.sum() <= len(rows) // 2:
                rows, texts, alive = rows[alive], texts.select(alive), alive[alive]
                advance = capture(step, (texts.position, texts.token, alive, kept, n_steps))
    unread = 0.0
    if table is not None:
        unread = 1 - block_bytes(model, kept) / max(1, n_steps.item()) / block_bytes(model)
    return [[id for id in ids if id >= 0] for ids in new.tolist()], unread


def capture(step, changed):
    """On a GPU, a CUDA graph's replay of step(); else step itself. `changed` are the tensors that
    a trial step must leave as they are."""
    if changed[0].device.type == "cpu":
        return step
    values = [tensor.clone() for tensor in changed]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        with torch.cuda.graph(graph, stream=stream):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip(changed, values):
        tensor.copy_(value)
    return graph.replay
