"""Audits to report on, as `shardlab compile --json` prints them: one that fits, a pipeline, one that does not fit.

Their figures are of the size that such steps have; they were not measured.
"""

from __future__ import annotations

from typing import Any

GIB, MIB = 2**30, 2**20
_LAYERS = 80
_KERNELS = {
    "attention/query/kernel": ([8192, 8192], "gradient"),
    "attention/key/kernel": ([8192, 1024], "gradient"),
    "attention/value/kernel": ([8192, 1024], "gradient"),
    "attention/out/kernel": ([8192, 8192], "gradient"),
    "mlp/gate/kernel": ([8192, 28672], "gradient"),
    "mlp/up/kernel": ([8192, 28672], "gradient"),
    "mlp/down/kernel": ([28672, 8192], "gradient"),
}


def _collective(kind: str, axes: list[str], count: int, wire: int, cause: str, **other: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "axes": axes,
        "count": count,
        "payload_bytes": wire,
        "wire_bytes": wire,
        "async": True,
        "cause": cause,
        "path": cause.rpartition(" ")[2],
        "source": "decoder.py:141",
        "loop": "blocks",
        "in_loop": True,
        "exact": True,
        "in_branch": False,
        "seconds": wire / 540e9,
        "exposed_seconds": 0.0,
        **other,
    }


def _parameters(spec: str, shards: int) -> list[dict[str, Any]]:
    rows = [("embed/table", 1, [128256, 8192]), ("head/kernel", 1, [8192, 128256]), ("norm/scale", 1, [8192])]
    rows += [(f"blocks/*/{name}", _LAYERS, shape) for name, (shape, _) in _KERNELS.items()]
    rows += [("blocks/*/attention_norm/scale", _LAYERS, [8192]), ("blocks/*/mlp_norm/scale", _LAYERS, [8192])]
    found = []
    for path, count, shape in rows:
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        wide = len(shape) > 1
        found.append(
            {
                "path": path,
                "count": count,
                "shape": shape,
                "dtype": "float32",
                "spec": spec if wide else "P()",
                "storage": "P('data')" if wide else "P()",
                "source": 'rule 2, "**/kernel"' if wide else "no rule: replicated",
                "bytes_per_device": size // shards if wide else size,
            }
        )
    return found


def _plan(**other: Any) -> dict[str, Any]:
    return {
        "num_parameters": 70_553_706_496,
        "dtype": "bfloat16",
        "zero": 3,
        "remat": "full",
        "batch_size": 256,
        "microbatches": 1,
        "stages": 1,
        "virtual": 1,
        "layers": [80],
        "head": "examples",
        "schedule": "1f1b",
        "table_csv": None,
        "sends": "direct",
        "bubble_fraction": 0.0,
        "peak_in_flight": [1],
        "bytes_per_device": {"parameters": 1102 * MIB, "optimizer_state": 2204 * MIB, "activations": 9 * GIB},
        "notes": [],
        **other,
    }


def fsdp() -> dict[str, Any]:
    """70 B over 256 chips, all of them data: it fits."""
    collectives = [
        _collective("all-gather", ["data"], 160, 2 * 56 * 10**8 * 8, "weights of blocks/*/mlp/gate/kernel"),
        _collective("all-gather", ["data"], 160, 2 * 56 * 10**8 * 8, "weights of blocks/*/mlp/up/kernel"),
        _collective("all-gather", ["data"], 160, 2 * 56 * 10**8 * 8, "weights of blocks/*/mlp/down/kernel"),
        _collective("reduce-scatter", ["data"], 80, 376 * 10**8, "gradient of blocks/*/mlp/gate/kernel"),
        _collective("reduce-scatter", ["data"], 80, 376 * 10**8, "gradient of blocks/*/mlp/up/kernel"),
        _collective("reduce-scatter", ["data"], 80, 376 * 10**8, "gradient of blocks/*/mlp/down/kernel"),
        _collective("all-gather", ["data"], 160, 214 * 10**8, "weights of blocks/*/attention/query/kernel"),
        _collective("all-gather", ["data"], 160, 214 * 10**8, "weights of blocks/*/attention/out/kernel"),
        _collective("reduce-scatter", ["data"], 80, 107 * 10**8, "gradient of blocks/*/attention/query/kernel"),
        _collective("reduce-scatter", ["data"], 80, 107 * 10**8, "gradient of blocks/*/attention/out/kernel"),
        _collective("all-gather", ["data"], 160, 27 * 10**8, "weights of blocks/*/attention/key/kernel"),
        _collective("all-gather", ["data"], 160, 27 * 10**8, "weights of blocks/*/attention/value/kernel"),
        _collective(
            "all-gather",
            ["data"],
            2,
            42 * 10**8,
            "weights of head/kernel",
            **{"async": False, "exposed_seconds": 0.0117, "loop": None, "in_loop": False, "source": "decoder.py:208"},
        ),
        _collective("all-reduce", ["data"], 1, 64 * 1024, "the gradients' norm", **{"async": False}, loop=None),
    ]
    collectives.sort(key=lambda row: -row["wire_bytes"])
    wire = sum(row["wire_bytes"] for row in collectives)
    return {
        "config": "configs/llama3_70b.py",
        "overrides": {"mesh": "data=256", "zero": 3},
        "target": "tpu:v5p:4x8x8",
        "num_devices": 256,
        "mesh": {"data": 256},
        "versions": {"jax": "0.10.2", "compiler": "libtpu 0.0.42.1"},
        "plan": _plan(),
        "parameters": _parameters("P()", 256),
        "memory": {
            "argument_bytes": 3308 * MIB,
            "output_bytes": 3307 * MIB,
            "alias_bytes": 3306 * MIB,
            "temp_bytes": 15 * GIB,
            "code_bytes": 41 * MIB,
            "total_bytes": 18710 * MIB,
        },
        "hbm_bytes": 18710 * MIB,
        "hbm_capacity_bytes": 98_020 * MIB,
        "fits": True,
        "categories": {
            "parameters": 1102 * MIB,
            "optimizer state": 2204 * MIB,
            "batch": 1 * MIB,
            "gradients": 1102 * MIB,
            "activations": 10100 * MIB,
            "gathered weights": 2520 * MIB,
            "communication": 640 * MIB,
            "other temporaries": 1000 * MIB,
            "code": 41 * MIB,
        },
        "largest": [
            _buffer(10 * 1024 * MIB - 140 * MIB, "inputs of blocks/*", "bf16[80,1,4096,8192]", "activations"),
            _buffer(896 * MIB, "weights of blocks/*/mlp/gate/kernel", "bf16[8192,28672]", "gathered weights"),
            _buffer(896 * MIB, "weights of blocks/*/mlp/up/kernel", "bf16[8192,28672]", "gathered weights"),
            _buffer(448 * MIB, "adam mu of blocks/*/mlp/up/kernel", "f32[80,32,28672]", "optimizer state"),
            _buffer(448 * MIB, "weights of blocks/*/mlp/down/kernel", "bf16[28672,8192]", "gathered weights"),
            *(_buffer((200 - k) * MIB, f"logits, chunk {k}", "f32[512,128256]", "other temporaries") for k in range(8)),
        ],
        "collectives": collectives,
        "wire_bytes": wire,
        "wire_bytes_by_axis": {"data": wire},
        "layout": {
            "words": "data=256 covers the whole torus 4 x 8 x 8: rings on all three dims, 6 links of a chip in use",
            "drawing": "tpu:v5p:4x8x8, one layer of 4 (z = 0)\n" + "\n".join(" ".join(["o--" * 7 + "o"]) for _ in "ab"),
            "axes": [{"axis": "data", "size": 256, "tier": "ici", "bandwidth": 540e9, "words": "ICI, all 3 dims"}],
        },
        "estimate_seconds": 6.02,
        "mfu": 0.652,
        "bound_by": "compute",
        "estimate": {
            "seconds": 6.02,
            "parts": [
                {"name": "matrix products", "seconds": 5.31},
                {"name": "memory-bound operations", "seconds": 0.52},
                {"name": "all-gather over data, exposed", "seconds": 0.14},
                {"name": "reduce-scatter over data, exposed", "seconds": 0.05},
            ],
            "model_flops": 461_000_000_000_000_000_000,
            "compute_seconds": 5.83,
            "exposed_seconds": 0.19,
            "overlapped_seconds": 0.61,
            "basis": "the compiler's cycle estimates",
            "left_out": [
                "input data and host work between steps",
                "a kernel, tpu_custom_call: bytes alone (paged_attention)",
            ],
        },
        "lints": [
            {
                "code": "SL002",
                "message": "weights gathered 3 times a step, which has 2 passes over them",
                "path": "head/kernel",
                "bytes": 2_101_346_304,
                "seconds": 0.0039,
                "fix": "keep the gathered head from the forward to the backward: gather='step'",
            },
        ],
        "remedies": [],
        "plan_seconds": 1.4,
        "trace_seconds": 3.2,
        "compile_seconds": 41.8,
        "audit_seconds": 4.6,
    }


def _buffer(size: int, what: str, shape: str, category: str) -> dict[str, Any]:
    path = what.rpartition(" ")[2] if "blocks" in what else None
    return {
        "bytes": size,
        "what": what,
        "path": path,
        "shape": shape,
        "category": category,
        "source": "decoder.py:123" if path else "",
    }


def pipeline() -> dict[str, Any]:
    """The same model in 4 stages on 64 data shards, 32 microbatches."""
    facts = fsdp()
    collectives = [
        _collective("permute", ["stage"], 35, 23 * 10**8, "activations between stages", loop="ticks", source=""),
        _collective("permute", ["stage"], 35, 23 * 10**8, "cotangents between stages", loop="ticks", source=""),
        *(
            _collective("all-gather", ["data"], 35, 9 * 10**8 - k * 10**7, f"weights of blocks/*/{name}")
            for k, name in enumerate(_KERNELS)
        ),
        *(
            _collective(
                "reduce-scatter",
                ["data"],
                20,
                4 * 10**8 - k * 10**7,
                f"gradient of blocks/*/{name}",
                **{"async": k % 2 == 0, "exposed_seconds": 0.0 if k % 2 == 0 else 0.0011},
            )
            for k, name in enumerate(_KERNELS)
        ),
        _collective("all-reduce", ["data", "stage"], 1, 131072, "the gradients' norm", exposed_seconds=0.00002),
        *(
            _collective("all-gather", ["data"], 1, 90_000 - k, f"scale {k} of blocks/*/mlp_norm/scale", exact=k > 2)
            for k in range(30)
        ),
    ]
    collectives.sort(key=lambda row: -row["wire_bytes"])
    by_axis: dict[str, int] = {}
    for row in collectives:
        name = " x ".join(row["axes"])
        by_axis[name] = by_axis.get(name, 0) + row["wire_bytes"]
    grid = "\n".join(f"  y={y}  " + "  ".join("0123"[z // 2] for z in range(8)) for y in range(8))
    return {
        **facts,
        "overrides": {"mesh": "data=64,stage=4", "zero": 1, "microbatches": 32},
        "mesh": {"data": 64, "stage": 4},
        "plan": _plan(
            zero=1,
            batch_size=2048,
            microbatches=32,
            stages=4,
            layers=[20, 20, 20, 20],
            bubble_fraction=3 / 35,
            peak_in_flight=[7, 5, 3, 1],
            notes=["the head is scattered by example over the 4 stages"],
        ),
        "parameters": _parameters("P()", 4),
        "hbm_bytes": 71_680 * MIB,
        "categories": {
            "parameters": 33_640 * MIB,
            "optimizer state": 3154 * MIB,
            "batch": 1 * MIB,
            "gradients": 16_820 * MIB,
            "activations": 12_800 * MIB,
            "gathered weights": 0,
            "communication": 2100 * MIB,
            "other temporaries": 3105 * MIB,
            "code": 60 * MIB,
        },
        "collectives": collectives,
        "wire_bytes": sum(by_axis.values()),
        "wire_bytes_by_axis": by_axis,
        "layout": {
            "words": "stage=4 lies on pairs of columns of the last torus dim, next to each other; "
            "data=64 covers dims 4 x 8 and the pair.",
            "drawing": f"tpu:v5p:4x8x8, x = 0; the number is the stage\n{grid}",
            "axes": [
                {"axis": "data", "size": 64, "tier": "ici", "bandwidth": 360e9, "words": "rings on dims 4 and 8"},
                {"axis": "stage", "size": 4, "tier": "ici", "bandwidth": 90e9, "words": "a line along dim 8"},
            ],
        },
        "estimate_seconds": 48.4,
        "mfu": 0.595,
        "bound_by": "compute",
        "estimate": {
            "seconds": 48.4,
            "parts": [
                {"name": "matrix products", "seconds": 39.2},
                {"name": "memory-bound operations", "seconds": 4.1},
                {"name": "pipeline bubble", "seconds": 4.06},
                {"name": "permute over stage, exposed", "seconds": 0.71},
                {"name": "reduce-scatter over data, exposed", "seconds": 0.33},
            ],
            "model_flops": 3_690_000_000_000_000_000_000,
            "compute_seconds": 43.3,
            "exposed_seconds": 1.04,
            "overlapped_seconds": 0.4,
            "basis": "the compiler's cycle estimates",
            "left_out": ["input data and host work between steps"],
        },
        "lints": [
            {
                "code": "SL003",
                "message": "the gradient is reduced in the microbatch loop, 20 times a step where once would do",
                "path": "blocks/*/mlp/down/kernel",
                "bytes": 3 * 10**8,
                "seconds": 0.0011,
                "fix": "accumulate='full' reduces once a step and holds 16.4 GiB",
            },
            {
                "code": "SL007",
                "message": "a vocabulary of 128256 is padded to 128512 by the layout's tiles",
                "path": "",
                "bytes": None,
                "seconds": None,
                "fix": "pad the vocabulary yourself, or leave it",
            },
        ],
    }


def too_large() -> dict[str, Any]:
    """The same model on as many chips with less memory, its weights over one axis only."""
    facts = fsdp()
    collectives = [
        _collective("all-reduce", ["tensor"], 320, 21 * 10**9, "activations of blocks/*/mlp"),
        _collective("reduce-scatter", ["data"], 80, 4 * 10**9, "gradient of blocks/*/mlp/up/kernel"),
        _collective("all-gather", ["data"], 1, 2 * 10**9, "weights of blocks/*/mlp/up/kernel", **{"async": False}),
    ]
    return {
        **facts,
        "overrides": {"mesh": "data=16,tensor=16", "zero": 1},
        "target": "tpu:v5e:16x16",
        "mesh": {"data": 16, "tensor": 16},
        "plan": _plan(zero=1),
        "memory": None,
        "hbm_bytes": 25_480 * MIB,
        "hbm_capacity_bytes": 16_128 * MIB,
        "fits": False,
        "categories": {
            "parameters": 16_820 * MIB,
            "optimizer state": 2102 * MIB,
            "batch": 1 * MIB,
            "gradients": 4205 * MIB,
            "activations": 1840 * MIB,
            "gathered weights": 0,
            "communication": 320 * MIB,
            "other temporaries": 160 * MIB,
            "code": 32 * MIB,
        },
        "largest": [
            _buffer(2240 * MIB, "parameters of blocks/*/mlp/gate/kernel", "f32[80,8192,1792]{2,1,0}", "parameters"),
            _buffer(2240 * MIB, "parameters of blocks/*/mlp/up/kernel", "f32[80,8192,1792]{2,1,0}", "parameters"),
            _buffer(140 * MIB, "moments of blocks/*/mlp/up/kernel", "f32[80,512,1792]{2,1,0}", "optimizer state"),
            _buffer(140 * MIB, "moments of blocks/*/mlp/up/kernel", "f32[80,512,1792]{2,1,0}", "optimizer state"),
        ],
        "collectives": collectives,
        "wire_bytes": 27 * 10**9,
        "wire_bytes_by_axis": {"tensor": 21 * 10**9, "data": 6 * 10**9},
        "layout": {
            "words": "tpu:v5e:16x16: a torus of 16 x 16 chips.\ndata (16) lies on dim y.\ntensor (16) lies on dim x.",
            "drawing": "\n".join(f"y {y:2} {' '.join(f'{y}.{x}' for x in range(4))} ..." for y in range(4)),
            "axes": [
                {"axis": "data", "size": 16, "tier": "ici", "bandwidth": 90e9, "words": "data (16) lies on dim y."},
                {"axis": "tensor", "size": 16, "tier": "ici", "bandwidth": 90e9, "words": "tensor (16) lies on dim x."},
            ],
        },
        "lints": [],
        "estimate_seconds": None,
        "mfu": None,
        "bound_by": None,
        "estimate": None,
        "remedies": [
            {"change": "--zero 3", "saves_bytes": 15_768 * MIB, "hbm_bytes": 9712 * MIB, "fits": True},
            {
                "change": "--mesh data=8,tensor=32",
                "saves_bytes": 8410 * MIB,
                "hbm_bytes": 17_070 * MIB,
                "fits": False,
                "seconds": 4.56,
            },
            {"change": "--target tpu:v5p:4x8x8", "saves_bytes": 0, "hbm_bytes": 25_480 * MIB, "fits": True},
        ],
        "trace_seconds": None,
    }


def unread() -> dict[str, Any]:
    """One that the compiler refused without leaving its program: all that can be unknown is."""
    return {
        **too_large(),
        "categories": {},
        "largest": [],
        "collectives": [],
        "wire_bytes": None,
        "wire_bytes_by_axis": {},
        "lints": [],
        "remedies": [],
        "layout": None,
    }


def cpu() -> dict[str, Any]:
    """A small step on emulated devices: no capacity, no estimate, no speeds, no config file."""
    wire = 3 * 4096
    row = _collective("all-reduce", ["data"], 3, wire, "gradient of head/kernel", exact=False, in_branch=False)
    return {
        **fsdp(),
        "config": None,
        "overrides": {},
        "target": "cpu:8",
        "num_devices": 8,
        "mesh": {"data": 8},
        "versions": {"jax": "0.12.0", "compiler": "jaxlib 0.12.0"},
        "plan": _plan(num_parameters=1_234_567, zero=0, remat="none", batch_size=64),
        "memory": {
            "argument_bytes": 4 * MIB,
            "output_bytes": 3 * MIB,
            "alias_bytes": 3 * MIB,
            "temp_bytes": 2 * MIB,
            "code_bytes": 0,
            "total_bytes": 6 * MIB,
        },
        "hbm_bytes": 6 * MIB,
        "hbm_capacity_bytes": None,
        "fits": True,
        "categories": {
            "parameters": 1 * MIB,
            "optimizer state": 2 * MIB,
            "batch": 1 * MIB,
            "gradients": 1 * MIB,
            "activations": 1 * MIB,
            "gathered weights": 0,
            "communication": 0,
            "other temporaries": 0,
            "code": 0,
        },
        "largest": [],
        "collectives": [row | {"seconds": None, "exposed_seconds": None, "async": False}],
        "wire_bytes": wire,
        "wire_bytes_by_axis": {"data": wire},
        "layout": {
            "words": "emulated devices of one host",
            "drawing": "",
            "axes": [{"axis": "data", "size": 8, "tier": "host", "bandwidth": None, "words": "one host's memory"}],
        },
        "estimate_seconds": None,
        "mfu": None,
        "bound_by": None,
        "estimate": None,
        "lints": [],
    }
