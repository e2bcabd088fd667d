"""The memory record: what the compiler says, its total, JSON and text."""

import json

import jax
import jax.numpy as jnp
import pytest

from shardlab.report.memory import Memory, memory


def test_of_a_compiled_function() -> None:
    """x is donated and comes back; y (100 floats) does not."""
    step = jax.jit(lambda x, y: (x + y.sum(), y * 2), donate_argnums=0)
    compiled = step.lower(jnp.zeros(1000), jnp.zeros(100)).compile()
    found = memory(compiled)
    assert found.argument_bytes == 4400
    assert 4400 <= found.output_bytes <= 4400 + 64  # and the tuple's table of pointers
    assert found.alias_bytes == 4000
    assert found.total_bytes == 4400 + (found.output_bytes - 4000) + found.temp_bytes + found.code_bytes


def test_bytes_are_of_one_device() -> None:
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    step = jax.jit(lambda x: x * 2, in_shardings=sharding, out_shardings=sharding)
    assert memory(step.lower(jnp.zeros(1000)).compile()).argument_bytes == 1000


def test_json_round_trip() -> None:
    one = Memory(argument_bytes=7, output_bytes=5, alias_bytes=3, temp_bytes=11, code_bytes=2)
    fields = json.loads(json.dumps(one.to_json()))
    assert fields["total_bytes"] == 7 + 11 + 5 - 3 + 2
    assert Memory.from_json(fields) == one


def test_a_backend_without_analysis() -> None:
    class Silent:
        def memory_analysis(self) -> None:
            return None

    with pytest.raises(ValueError, match="the backend gives no memory analysis; compile for cpu, tpu or gpu"):
        memory(Silent())
