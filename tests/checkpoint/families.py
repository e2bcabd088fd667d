"""Families of decoders as transformers knows them, each tiny: our config, our table of names, and theirs.

Run, it writes the golden weights and logits, made by transformers 5.24 and torch 2.14:

    pip install -e '.[test,transformers]' && python -m tests.checkpoint.families
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardlab.checkpoint.names import LLAMA, MIXTRAL, QWEN, Names
from shardlab.checkpoint.safetensors import Entry, write_folder
from shardlab.models.decoder import DecoderConfig, decoder_rules
from shardlab.sharding.rules import Rules

GOLDEN = Path(__file__).parent.parent / "golden" / "weights"
LOGITS = "logits"

SIZES = DecoderConfig(
    vocab_size=48, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=20, norm_epsilon=1e-5
)
_THEIRS = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@dataclass(frozen=True)
class Family:
    """A model of ours and one of transformers that are the same.

    Attributes:
      config, rules, names: ours.
      theirs: name of the config class in transformers, and what it is given.
      file_size: of the files of the golden weights; small ones are several.
    """

    config: DecoderConfig
    rules: Rules
    names: Names
    theirs: tuple[str, dict[str, Any]]
    file_size: str = "50GB"


def _config(**changes: Any) -> DecoderConfig:
    return DecoderConfig(**{**vars(SIZES), **changes})


FAMILIES = {
    "llama": Family(
        _config(rope_base=1000.0, rope_stretch=8.0, rope_trained=128),
        decoder_rules(),
        LLAMA,
        ("LlamaConfig", {"rope_parameters": _ROPE, "head_dim": 6}),
    ),
    "qwen2": Family(
        _config(qkv_bias=True, tied=True, head_dim=4),
        decoder_rules(tied=True, qkv_bias=True),
        QWEN,
        ("Qwen2Config", {"tie_word_embeddings": True}),
    ),
    "qwen3": Family(_config(qk_norm=True), decoder_rules(), QWEN, ("Qwen3Config", {"head_dim": 6})),
    "mixtral": Family(
        _config(num_experts=3, rope_base=1e6),
        decoder_rules(experts=True),
        MIXTRAL,
        ("MixtralConfig", {"head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 2}),
        "25KB",
    ),
}


def tokens() -> np.ndarray:
    """Two examples of nine tokens."""
    return np.random.default_rng(0).integers(0, SIZES.vocab_size, (2, 9)).astype(np.int32)


def their_model(family: Family) -> Any:
    """The model in transformers, every parameter of it random: at their own start biases are 0 and norms 1."""
    import torch
    import transformers

    name, given = family.theirs
    torch.manual_seed(0)
    config = getattr(transformers, name)(**_THEIRS, **given)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in path else 0.0, 0.3)
    return model


def their_logits(model: Any) -> np.ndarray:
    """Logits of `tokens`."""
    import torch

    with torch.no_grad():
        logits: np.ndarray = model(torch.asarray(tokens())).logits.numpy()
    return logits


def main() -> None:
    for name, family in FAMILIES.items():
        folder, model = GOLDEN / name, their_model(family)
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder, max_shard_size=family.file_size)
        for other in ("config.json", "generation_config.json"):
            (folder / other).unlink()
        logits = their_logits(model)
        write_folder(folder / LOGITS, [Entry("logits", "float32", logits.shape)], iter([logits]), 10**6)


if __name__ == "__main__":
    main()
