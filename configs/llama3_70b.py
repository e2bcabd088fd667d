"""Llama 3 70B (arXiv 2407.21783), 4,096 tokens an example, to be planned and compiled for chips that are not here.

A step of 256 examples is 1.05 M tokens. One file for many plans: --mesh data=256 --zero 3 is FSDP; --mesh
data=64,tensor=4 --zero 3 has tensor parallelism inside it; --mesh data=64,stage=4 --zero 3 --batch-size 512
--microbatches 8 a pipeline.

shardlab plan configs/llama3_70b.py --target tpu:v5p:4x8x8 --mesh data=256 --zero 3
shardlab train configs/llama3_70b.py
"""

from jax.sharding import PartitionSpec as P

from shardlab.mesh.spec import MeshSpec
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss
from shardlab.module.pipeline import Pipeline
from shardlab.run.config import AdamW, Config
from shardlab.run.data import RandomTokens


def config() -> Config:
    return Config(
        model=DecoderConfig(
            vocab_size=128_256,
            num_layers=80,
            model_dim=8192,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=28_672,
            rope_base=500_000.0,
            norm_epsilon=1e-5,
            query_chunk=512,
            splash=True,
            heads_axis="tensor",
        ),
        pipeline=Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        loss=next_byte_loss,
        optimizer=AdamW(learning_rate=1.5e-4, warmup=2000, weight_decay=0.1),
        data=RandomTokens(seq_len=4096, vocab_size=128_256),
        mesh=MeshSpec({"data": 256, "stage": 1, "tensor": 1}, batch="data", stage="stage", target="tpu:v5p:4x8x8"),
        rules=decoder_rules("tensor"),
        # Between blocks each tensor device holds its part of the tokens (arXiv 2205.05198).
        activation=P("data", "tensor", None),
        batch_size=256,
        zero=3,
        remat="full",
        dtype="bfloat16",
        reduce_dtype="bfloat16",
        gather="auto",
        accumulate="auto",
        steps=20,
        eval_every=10,
        unit="nats per token",
    )
