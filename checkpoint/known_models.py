"""The sizes of well-known models, for use without their weights."""

from checkpoint.rope import parse_rope
from model import Config

LLAMA_3_2_ROPE = parse_rope({"rope_theta": 5e5, "max_position_embeddings": 131072, "rope_scaling": {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192}}, head_dim=64)


def sizes(vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, **others):
    return Config(vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads,
                  hidden_size // n_heads, **others)


KNOWN_MODELS = {
    "llama-2-7b": sizes(32000, 4096, 11008, 32, 32, 32, context=4096),
    "llama-2-13b": sizes(32000, 5120, 13824, 40, 40, 40, context=4096),
    "llama-2-70b": sizes(32000, 8192, 28672, 80, 64, 8, context=4096),
    # released with a context of 8192; benchmark.py measures longer texts, too
    "llama-3-8b": sizes(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, context=32768),
    "llama-3-70b": sizes(128256, 8192, 28672, 80, 64, 8, rope_theta=5e5, context=32768),
    "llama-3.2-1b": sizes(128256, 2048, 8192, 16, 32, 8, tie_embeddings=True,
                          **LLAMA_3_2_ROPE),
    "mistral-7b": sizes(32000, 4096, 14336, 32, 32, 8, context=32768, sliding_window=4096),
    "qwen2.5-0.5b": sizes(151936, 896, 4864, 24, 14, 2, norm_eps=1e-6, rope_theta=1e6,
                          context=32768, qkv_bias=True, tie_embeddings=True),
    "qwen2.5-1.5b": sizes(151936, 1536, 8960, 28, 12, 2, norm_eps=1e-6, rope_theta=1e6,
                          context=32768, qkv_bias=True, tie_embeddings=True),
}
