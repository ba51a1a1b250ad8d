"""Named sizes of one shape family, from under a million parameters (CPU) to the paper's models.

The CPU sizes are two ladders, each rung two to three times the parameters of the one below; ``cpu-1m-deep`` is to
``cpu-1m`` what the paper's 48 layers are to its 28: narrower, deeper, the same heads, about the same parameters.
The MoE ones keep two of the paper's habits: an expert is 3/8 as wide as the model, and embeddings are not tied.
"""

from __future__ import annotations

from models.config import ModelConfig, MoEConfig

PRESETS: dict[str, ModelConfig] = {
    "cpu-tiny": ModelConfig(num_layers=2, hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16, ffn_size=192),
    "cpu-350k": ModelConfig(num_layers=3, hidden_size=96, num_query_heads=4, num_kv_heads=2, head_dim=24, ffn_size=288),
    "cpu-1m": ModelConfig(num_layers=4, hidden_size=128, num_query_heads=4, num_kv_heads=2, head_dim=32, ffn_size=384),
    "cpu-1m-deep": ModelConfig(
        num_layers=7, hidden_size=96, num_query_heads=4, num_kv_heads=2, head_dim=32, ffn_size=288
    ),
    "cpu-2m": ModelConfig(num_layers=5, hidden_size=192, num_query_heads=8, num_kv_heads=4, head_dim=24, ffn_size=576),
    "cpu-4m": ModelConfig(num_layers=6, hidden_size=256, num_query_heads=8, num_kv_heads=4, head_dim=32, ffn_size=768),
    "cpu-10m": ModelConfig(num_layers=8, hidden_size=320, num_query_heads=8, num_kv_heads=4, head_dim=40, ffn_size=960),
    "dense-1.7b-28l": ModelConfig(
        num_layers=28, hidden_size=2048, num_query_heads=16, num_kv_heads=8, head_dim=128, ffn_size=6144
    ),
    "dense-1.7b-48l": ModelConfig(
        num_layers=48, hidden_size=1536, num_query_heads=16, num_kv_heads=8, head_dim=128, ffn_size=4608
    ),
    "cpu-moe-tiny": ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=24,
        moe=MoEConfig(num_experts=8, top_k=2),
        tied_embeddings=False,
    ),
    "cpu-moe-400k": ModelConfig(
        num_layers=3,
        hidden_size=96,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=24,
        ffn_size=36,
        moe=MoEConfig(num_experts=8, top_k=2),
        tied_embeddings=False,
    ),
    "cpu-moe-1m": ModelConfig(
        num_layers=4,
        hidden_size=128,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=48,
        moe=MoEConfig(num_experts=16, top_k=4),
        tied_embeddings=False,
    ),
    "cpu-moe-4m": ModelConfig(
        num_layers=5,
        hidden_size=192,
        num_query_heads=8,
        num_kv_heads=4,
        head_dim=24,
        ffn_size=72,
        moe=MoEConfig(num_experts=16, top_k=4),
        tied_embeddings=False,
    ),
    "cpu-moe-8m": ModelConfig(
        num_layers=6,
        hidden_size=256,
        num_query_heads=8,
        num_kv_heads=4,
        head_dim=32,
        ffn_size=96,
        moe=MoEConfig(num_experts=16, top_k=4),
        tied_embeddings=False,
    ),
    "moe-15a2b": ModelConfig(
        num_layers=24,
        hidden_size=2048,
        num_query_heads=32,
        num_kv_heads=4,
        head_dim=128,
        ffn_size=768,
        moe=MoEConfig(num_experts=128, top_k=8),
        tied_embeddings=False,
    ),
}
