"""Annotations of NNX and Linen modules: read out of the installed Flax, and given one meaning."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.core import meta
from flax.linen.spmd import logical_to_mesh_axes
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardlab.sharding.annotations import Annotation, from_linen, from_nnx, to_spec
from shardlab.sharding.rules import canonical

AXES = ("data", "model")


def nnx_kernel(**metadata: Any) -> Any:
    """The kernel of an NNX layer, traced, with this metadata."""

    def make() -> nnx.Linear:
        with nnx.use_eager_sharding(False):
            init = nnx.with_metadata(nnx.initializers.lecun_normal(), **metadata)
            return nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(0))

    return nnx.eval_shape(make).kernel


def linen_kernel(wrap: Callable[..., Any], *names: Any, **options: Any) -> Any:
    """The boxed kernel of a Linen layer, traced, annotated with `wrap`."""
    layer = nn.Dense(8, kernel_init=wrap(nn.initializers.lecun_normal(), *names, **options))
    boxed = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 4)))
    return boxed["params"]["kernel"]


def test_nnx_names() -> None:
    assert from_nnx(nnx_kernel(out_sharding=("embed", None))) == Annotation(("embed", None), "logical")
    assert from_nnx(nnx_kernel(out_sharding=P(("a", "b")))) == Annotation((("a", "b"),), "logical")
    assert from_nnx(nnx_kernel()) is None
    assert from_nnx(nnx_kernel(out_sharding=None)) is None
    assert from_nnx(nnx_kernel(out_sharding=())) == Annotation((), "logical")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["sharding", "sharding_names"])
def test_nnx_older_spellings(name: str) -> None:
    assert from_nnx(nnx_kernel(**{name: ("embed", "mlp")})) == Annotation(("embed", "mlp"), "logical")


def test_nnx_rules_of_the_variable() -> None:
    found = from_nnx(nnx_kernel(out_sharding=("embed", "mlp"), sharding_rules=[("embed", "data"), ("mlp", None)]))
    assert found == Annotation(("embed", "mlp"), "logical", (("embed", "data"), ("mlp", None)))


def test_nnx_named_sharding() -> None:
    mesh = AbstractMesh((2, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    found = from_nnx(nnx_kernel(out_sharding=NamedSharding(mesh, P(None, "model"))))
    assert found == Annotation((None, "model"), "mesh")


def test_linen_mesh_axes() -> None:
    boxed = linen_kernel(nn.with_partitioning, (None, "model"))
    assert from_linen(boxed) == Annotation((None, "model"), "mesh")


def test_linen_logical_names() -> None:
    boxed = linen_kernel(nn.with_logical_partitioning, ("embed", "mlp"), rules=(("mlp", "model"),))
    assert from_linen(boxed) == Annotation(("embed", "mlp"), "logical", (("mlp", "model"),))
    assert from_linen(linen_kernel(nn.with_logical_partitioning, ("embed",))) == Annotation(("embed",), "logical")


def test_linen_without_a_box() -> None:
    assert from_linen(linen_kernel(lambda init: init)) is None
    assert from_linen(meta.unbox(linen_kernel(nn.with_partitioning, (None, "model")))) is None


def both(names: tuple[Any, ...]) -> list[Annotation]:
    """The same names as the two libraries carry them."""
    found = [
        from_nnx(nnx_kernel(out_sharding=names)),
        from_linen(linen_kernel(nn.with_logical_partitioning, names)),
    ]
    return [each for each in found if each is not None]


@pytest.mark.parametrize(
    ("names", "logical", "expected"),
    [
        (("embed", "mlp"), (("embed", "data"), ("mlp", "model")), P("data", "model")),
        # The order of the rules decides, not that of the dims; a later rule is a fallback.
        (("mlp", "embed"), (("embed", "model"), ("mlp", "model"), ("mlp", "data")), P("data", "model")),
        (("embed",), (("embed", "model"), ("embed", "data")), P("model")),
        (("embed", "mlp"), (("embed", None), ("mlp", "model")), P(None, "model")),
        # A last rule with None says that replicating the dim is meant.
        (("embed", "mlp"), (("mlp", "model"), ("embed", "model"), ("embed", None)), P(None, "model")),
        (("embed", None), (("embed", ("data", "model")),), P(("data", "model"))),
        # One of a rule's axes being taken is enough to pass it by.
        (
            ("mlp", "embed"),
            (("mlp", "data"), ("embed", ("data", "model")), ("embed", "model")),
            P("data", "model"),
        ),
        # A mesh axis needs no rule; one with a rule is read through it.
        (("data", "model"), (), P("data", "model")),
        (("data", "mlp"), (("data", None), ("mlp", "model")), P(None, "model")),
        ((("embed", "mlp"), None), (("embed", "data"), ("mlp", "model")), P(("data", "model"))),
        (("embed", "embed"), (("embed", None),), P()),
    ],
)
def test_one_meaning_for_both_libraries(names: tuple[Any, ...], logical: Any, expected: P) -> None:
    for annotation in both(names):
        assert to_spec(annotation, logical=logical, axes=AXES) == (expected, [])


def test_where_linen_is_unambiguous_it_means_the_same() -> None:
    rules = (("embed", "model"), ("mlp", "model"), ("mlp", "data"), ("heads", None))
    for names in (("mlp", "embed"), ("embed", "heads"), ("heads",), (None, "mlp")):
        mine, problems = to_spec(Annotation(names, "logical"), logical=rules, axes=AXES)
        theirs = logical_to_mesh_axes(names, rules)
        assert theirs is not None
        assert not problems
        assert canonical(theirs) == mine


PURPOSE = "('mlp', None) to replicate it on purpose"
BAD: dict[str, tuple[tuple[Any, ...], Any, str, str]] = {
    "an axis would be used twice": (
        ("mlp", "embed"),
        (("embed", "model"), ("mlp", "model"), ("embed", "data")),
        "logical name 'mlp' (dim 0) may only be 'model'; taken: 'model' by 'embed' (dim 1)",
        f"add a later logical rule ('mlp', another axis), or {PURPOSE}",
    ),
    "every fallback is taken": (
        ("embed", "vocab", "mlp"),
        (("embed", "model"), ("vocab", "data"), ("mlp", "model"), ("mlp", "data")),
        "logical name 'mlp' (dim 2) may only be 'model' or 'data'; taken: 'model' by 'embed' (dim 0) and "
        "'data' by 'vocab' (dim 1)",
        f"add a later logical rule ('mlp', another axis), or {PURPOSE}",
    ),
    "no rule": (
        ("embd", None),
        (("embed", "model"),),
        "logical name 'embd' has no rule and is not a mesh axis",
        "did you mean 'embed'? add a logical rule ('embd', axis), or ('embd', None) to replicate it on purpose",
    ),
    "one name on two dims, one axis": (
        ("embed", "embed"),
        (("embed", "model"),),
        "logical name 'embed' names dims 0 and 1",
        "name each dim differently",
    ),
    "one name on two dims": (
        ("embed", "embed"),
        (("embed", "model"), ("embed", "data")),
        "logical name 'embed' names dims 0 and 1",
        "name each dim differently",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_faults_are_the_same_for_both_libraries(name: str) -> None:
    names, logical, problem, way_out = BAD[name]
    for annotation in both(names):
        _, problems = to_spec(annotation, logical=logical, axes=AXES)
        assert [(each.problem, each.way_out) for each in problems] == [(problem, way_out)]


def test_own_rules_come_first_and_must_agree_with_the_declared() -> None:
    own = Annotation(("embed", "mlp"), "logical", (("embed", "data"),))
    logical = (("embed", "data"), ("mlp", "model"))
    assert to_spec(own, logical=logical, axes=AXES) == (P("data", "model"), [])
    spec, problems = to_spec(own, logical=(("embed", "model"), ("mlp", None)), axes=AXES)
    assert spec == P("data")
    assert [(each.problem, each.way_out) for each in problems] == [
        ("logical name 'embed' is 'data' in its own rules, 'model' in the declared", "keep one of them")
    ]


def test_mesh_annotations_name_mesh_axes() -> None:
    found = to_spec(Annotation((None, "model"), "mesh"), logical=(("model", "data"),), axes=AXES)
    assert found == (P(None, "model"), [])
    _, problems = to_spec(Annotation(("modl", "embed"), "mesh"), logical=(("embed", "data"),), axes=AXES)
    assert [(each.problem, each.way_out) for each in problems] == [
        ("axis 'modl' is not in the mesh (data, model)", "did you mean 'model'? name a mesh axis, or None"),
        (
            "'embed' is a logical name, annotated as a mesh axis",
            "annotate it with nn.with_logical_partitioning",
        ),
    ]
