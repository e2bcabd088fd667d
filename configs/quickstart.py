"""Quickstart: a Llama-style decoder learns to write Python, byte by byte, on data x stage x tensor.

Reaches under 2.5 nats a byte on held-out text, from 5.6, in its 160 steps.

shardlab train configs/quickstart.py
"""

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.module.pipeline import Pipeline
from shardlab.run.config import AdamW, Config
from shardlab.run.data import ByteText


def config() -> Config:
    return Config(
        model=DecoderConfig(num_layers=8, model_dim=64, num_heads=8, num_kv_heads=8, head_dim=8, mlp_dim=192),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        loss=next_byte_loss,
        optimizer=AdamW(learning_rate=1e-2, warmup=16, decay=160, weight_decay=0.1),
        data=ByteText(seq_len=64),
        mesh=MeshSpec({"data": 2, "stage": 2, "tensor": 2}, batch="data", stage="stage", target="cpu:8"),
        rules=decoder_rules("tensor"),
        batch_size=64,
        microbatches=8,
        schedule="1f1b",
        steps=160,
        eval_every=40,
        eval_batches=4,
        unit="nats per byte",
    )
