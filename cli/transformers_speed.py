"""The speed of transformers with a model's own weights, for benchmark.py to compare with."""

import time

import torch

from model import SITES


def to_transformers(model):
    """The same weights as a LlamaForCausalLM, without biases and sliding windows."""
    import transformers

    config = model.config
    theirs = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
        max_position_embeddings=config.context, tie_word_embeddings=config.tie_embeddings)
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(theirs).to(model.dtype)
    llama = llama.to_empty(device=model.device).eval()
    for layer, block in zip(llama.model.layers, model.blocks):
        for site, names in SITES.items():
            linear = getattr(block, site)
            module = layer.self_attn if site in ("qkv", "o") else layer.mlp
            for name, first, end in zip(names, linear.starts, linear.ends):
                weight = getattr(module, name + "_proj").weight
                weight.data.copy_(linear.weight(first, end).T)
        layer.input_layernorm.weight.data.copy_(block.attn_norm)
        layer.post_attention_layernorm.weight.data.copy_(block.mlp_norm)
    llama.model.norm.weight.data.copy_(model.norm)
    head = model.lm_head.weight(0, config.vocab_size).T
    llama.lm_head.weight.data.copy_(head)
    llama.model.embed_tokens.weight.data.copy_(
        head if model.embedding is None else model.embedding)
    llama.tie_weights()
    # to_empty lost the frequencies of RoPE.
    llama.model.rotary_emb = type(llama.model.rotary_emb)(theirs).to(model.device)
    llama.generation_config.eos_token_id = None
    return llama


def transformers_speed(model, context, n_tokens, runs=3):
    """Tokens a second of transformers' greedy generate; a GPU's has a static cache, compiled."""
    llama, first = to_transformers(model), max(1, context - n_tokens // 2)
    prompt = torch.ones(1, first, dtype=torch.int64, device=model.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    if model.device.type == "cuda":
        options["cache_implementation"] = "static"

    def run(n):
        start = time.perf_counter()
        ids = llama.generate(prompt, max_new_tokens=n, min_new_tokens=n, **options)
        ids.cpu()  # waits for the device
        return time.perf_counter() - start

    run(n_tokens), run(n_tokens)  # compiles
    whole, prefill = (sorted(run(n) for _ in range(runs))[runs // 2] for n in (n_tokens, 1))
    return (n_tokens - 1) / (whole - prefill)
