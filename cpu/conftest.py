"""A model with random weights to test the step in C with."""

import torch


def fill(model, scale=1.0):
    """Random weights, biases and norms, the same for equal configs."""
    draw = torch.Generator().manual_seed(0)
    for linear in [*model.linears(), model.lm_head]:
        for i, width in enumerate(linear.widths):
            weight = torch.randn(width, linear.in_features, generator=draw)
            linear.load_weight(i, (weight * scale / linear.in_features ** 0.5).to(model.dtype))
        if linear.bias is not None:
            linear.bias.copy_(torch.randn(linear.bias.shape, generator=draw) / 4)
    for block in model.blocks:
        for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm"):
            if hasattr(block, name):
                norm = getattr(block, name)
                norm.copy_(1 + torch.rand(norm.shape, generator=draw) / 4)
    model.norm.fill_(1)
    if model.embedding is not None:
        model.embedding.copy_(torch.randn(model.embedding.shape, generator=draw))
    return model
