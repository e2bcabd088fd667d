"""Data parallelism: every device holds the whole model and learns from its own eighth of each batch.

Reaches 2.73 nats a byte on held-out text, from 5.6, in its 60 steps.

shardlab train configs/data_parallel.py
"""

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.run.config import AdamW, Config
from shardlab.run.data import ByteText


def config() -> Config:
    return Config(
        model=DecoderConfig(num_layers=4, model_dim=64, num_heads=8, num_kv_heads=8, head_dim=8, mlp_dim=192),
        loss=next_byte_loss,
        optimizer=AdamW(learning_rate=1e-2, warmup=6, decay=60, weight_decay=0.1),
        data=ByteText(seq_len=64),
        mesh=MeshSpec({"data": 8}, batch="data", target="cpu:8"),
        rules=decoder_rules(None),
        batch_size=64,
        steps=60,
        eval_every=30,
        unit="nats per byte",
    )
