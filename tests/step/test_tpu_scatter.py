"""What XLA:TPU makes of gradients that are scattered over an axis which covers three dims of the torus.

Needs libtpu, and no TPU:

    pip install 'shardlab[tpu]' && python -m pytest -m tpu
"""

from __future__ import annotations

import math
import re

import pytest

from tests.tpu import printed_by

pytestmark = pytest.mark.tpu
PROGRAM = """
import jax, jax.numpy as jnp, optax
from jax.experimental import topologies
import shardlab
from shardlab.models.decoder import DecoderConfig, decoder_rules, next_byte_loss

model = DecoderConfig(num_layers=2, model_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_dim=2048,
                      vocab_size=1024, splash=True, heads_axis="tensor")
batch = {name: jax.ShapeDtypeStruct((32, 512), jnp.int32) for name in ("tokens", "targets")}
devices = topologies.get_topology_desc(
    topology_name="v5:2x4x4", platform="tpu", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1),
    num_slices=1, wrap=(False, True, True),
).devices
for scatter in ("whole", "auto"):
    plan = shardlab.make_plan(
        model,
        mesh=shardlab.MeshSpec({"data": 32, "tensor": 1}, batch="data", target="tpu:v5p:2x4x4"),
        rules=decoder_rules("tensor"),
        pipeline=shardlab.Pipeline(before="embed", blocks="blocks", after="head", context="context"),
        optimizer=optax.adamw(1e-3), batch=batch, zero=3, dtype="bfloat16", reduce_dtype="bfloat16", remat="full",
        gather="auto", accumulate="auto", scatter=scatter,
    )
    step = shardlab.compile_train_step(model, next_byte_loss, optax.adamw(1e-3), plan, batch, devices=devices)
    print("=====", scatter, *step.scatters)
    print(step.compiled.as_text())
"""


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    """The compiled programs, by what was asked for."""
    printed = printed_by(PROGRAM, seconds=500)
    _, *texts = printed.split("===== ")
    return {text.split(" ", 1)[0]: text for text in texts}


def large(text: str, kind: str) -> list[str]:
    """The arrays that a kind of collective is of, of a quarter of a million numbers or more; several may be one."""
    types = re.findall(rf"= (\(.*?\)|\S+) {kind}(?:-start)?\(", text)
    found = [dims for one in types for dims in re.findall(r"\w\[([\d,]+)\]", one)]
    return [dims for dims in found if math.prod(map(int, dims.split(","))) >= 2**18]


def test_in_one_it_is_an_all_reduce_and_in_parts_it_is_not(programs: dict[str, str]) -> None:
    assert len(large(programs["whole"], "all-reduce")) >= 7  # of every kernel of a block
    assert large(programs["auto"], "all-reduce") == []
    assert programs["auto"].count(" reduce-scatter(") >= 14
    assert re.match(
        r"auto data \d+x\d+: reduce-scatters over dims \w and \w and then dim \w of the torus", programs["auto"]
    )


def test_attention_is_a_kernel_that_runs_forward_twice(programs: dict[str, str]) -> None:
    """For the forward pass and, rematerialised, for the backward."""
    kernels = re.findall(r"%(splash_mha_\w+?)(?:_residuals|_no_residuals)[.\d]* = ", programs["auto"])
    assert sorted(kernels) == ["splash_mha_dkv", "splash_mha_dq", "splash_mha_fwd", "splash_mha_fwd"]


ALONE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, PartitionSpec as P
import shardlab.step.scatter as scatter
from shardlab.step.region import Region

devices = topologies.get_topology_desc(
    topology_name="v5:4x4x4", platform="tpu", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1),
    num_slices=1, wrap=(True, True, True),
).devices
mesh = Mesh(np.array(sorted(devices, key=lambda one: one.coords)).reshape(16, 4), ("data", "stage"),
            axis_types=(AxisType.Auto,) * 2)
region = Region(mesh, ("data",), "stage", 4, 16, "bfloat16")

def compiled(name, shape, axes, state):
    def inside(value):
        given = {"w": value.reshape(shape)}
        return region.reduced(given, {"w": axes}, {"w": P()}, {"w": state})["w"]
    run = jax.jit(region.run(inside, P(), state))
    with jax.set_mesh(mesh):
        print("=====", name)
        print(run.lower(jax.ShapeDtypeStruct(shape, jnp.bfloat16)).compile().as_text())

compiled("padded", (8192, 128256), ("data",), P("data"))
compiled("two dims", (128256, 8192), ("data", "stage"), P("stage", "data"))
compiled("few layers", (4, 2048, 8192), ("stage",), P(None, None, "stage"))
scatter.wider = lambda size: size
compiled("not padded", (8192, 128256), ("data",), P("data"))
"""


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """Sums of one array each, data over two dims of the torus and stage over the third."""
    _, *texts = printed_by(ALONE, seconds=500).split("===== ")
    return {text.partition("\n")[0]: text for text in texts}


def test_an_awkward_number_of_tiles_is_reduce_scattered_where_it_is_padded(alone: dict[str, str]) -> None:
    """128,256 lanes are 1,002 tiles, 6 x 167; where the second program is a reduce-scatter too, `wider` may go."""
    assert large(alone["padded"], "all-reduce") == []
    assert len(large(alone["padded"], "reduce-scatter")) == 1
    assert large(alone["not padded"], "reduce-scatter") == []
    assert len(large(alone["not padded"], "all-reduce")) == 1


def test_stacks_of_fewer_layers_than_a_tile_has_rows_are_reduce_scattered(alone: dict[str, str]) -> None:
    """XLA:TPU writes it as a fusion of that name, in which an all-reduce stands."""
    text = alone["few layers"]
    assert len(re.findall(r"calls=%all-reduce-scatter", text)) + len(large(text, "reduce-scatter")) == 1
    assert len(large(text.partition("ENTRY")[2], "all-reduce")) == 0


def test_of_two_axes_on_two_dims_the_larger_is_a_reduce_scatter(alone: dict[str, str]) -> None:
    """As of an embedding: features over 16 of data, then classes over the stages: an all-reduce, of a sixteenth."""
    assert len(large(alone["two dims"], "reduce-scatter")) == 1
    (left,) = large(alone["two dims"], "all-reduce")
    assert math.prod(map(int, left.split(","))) < 128256 * 8192 / 15
