"""Named sizes of one shape family, from under a million parameters (CPU) to the paper's dense models."""

from __future__ import annotations

from models.config import ModelConfig

PRESETS: dict[str, ModelConfig] = {
    "cpu-tiny": ModelConfig(num_layers=2, hidden_size=64, num_query_heads=4, num_kv_heads=2, head_dim=16, ffn_size=192),
    "cpu-1m": ModelConfig(num_layers=4, hidden_size=128, num_query_heads=4, num_kv_heads=2, head_dim=32, ffn_size=384),
    "cpu-4m": ModelConfig(num_layers=6, hidden_size=256, num_query_heads=8, num_kv_heads=4, head_dim=32, ffn_size=768),
    "dense-1.7b-28l": ModelConfig(
        num_layers=28, hidden_size=2048, num_query_heads=16, num_kv_heads=8, head_dim=128, ffn_size=6144
    ),
    "dense-1.7b-48l": ModelConfig(
        num_layers=48, hidden_size=1536, num_query_heads=16, num_kv_heads=8, head_dim=128, ffn_size=4608
    ),
}
