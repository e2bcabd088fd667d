"""How often computations run: trip counts, loops in loops, computations called twice, branches."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from shardlab.hlo import Instruction, parse, trip_count, visits

COUNTING = """
HloModule count

%body (s: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {{
  %s = (s32[], f32[4]{{0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4]{{0}} get-tuple-element(%s), index=1
  %n = s32[] get-tuple-element(%s), index=2
  %step = s32[] constant({step})
  %next = s32[] {change}(%i, %step)
  ROOT %t = (s32[], f32[4]{{0}}, s32[]) tuple(%next, %x, %n)
}}

%condition (c: (s32[], f32[4], s32[])) -> pred[] {{
  %c = (s32[], f32[4]{{0}}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c), index=0
  %n.1 = s32[] get-tuple-element(%c), index=2
  %bound = s32[] constant({bound})
  ROOT %test = pred[] compare({sides}), direction={direction}
}}

ENTRY %main (y: f32[4], m: s32[]) -> (s32[], f32[4], s32[]) {{
  %y = f32[4]{{0}} parameter(0)
  %m = s32[] parameter(1)
  %first = s32[] constant({start})
  %copy.1 = s32[] copy(%first)
  %last = s32[] constant(9)
  %state = (s32[], f32[4]{{0}}, s32[]) tuple(%copy.1, %y, {carried})
  ROOT %loop = (s32[], f32[4]{{0}}, s32[]) while(%state), condition=%condition, body=%body
}}
"""
PLAIN = {
    "start": 0,
    "step": 1,
    "change": "add",
    "bound": 7,
    "sides": "%i.1, %bound",
    "direction": "LT",
    "carried": "%last",
}

# What a loop written so would do, counted on fingers.
TRIPS: dict[str, tuple[dict[str, object], int | None]] = {
    "0 to 7": ({}, 7),
    "3 to 7": ({"start": 3}, 4),
    "by twos, 0 2 4 6": ({"step": 2}, 4),
    "by threes from 1, 1 4": ({"start": 1, "step": 3}, 2),
    "up to and with 7": ({"direction": "LE"}, 8),
    "until 7": ({"direction": "NE"}, 7),
    "never": ({"start": 7}, 0),
    "bound on the left": ({"sides": "%bound, %i.1", "direction": "GT"}, 7),
    "down from 9 to 1": ({"start": 9, "step": -1, "bound": 0, "direction": "GT"}, 9),
    "down by subtraction": ({"start": 9, "change": "subtract", "bound": 0, "direction": "GE"}, 10),
    "bound in the state": ({"sides": "%i.1, %n.1"}, 9),
    "bound in the state, on the left": ({"sides": "%n.1, %i.1", "direction": "GT"}, 9),
    "bound handed in": ({"sides": "%i.1, %n.1", "carried": "%m"}, None),
    "start handed in": ({"sides": "%n.1, %bound"}, None),
    "multiplies": ({"change": "multiply", "start": 9, "bound": 0, "direction": "GT"}, None),
    "never ends": ({"direction": "GT", "start": 9}, None),
    "jumps over": ({"direction": "NE", "step": 2}, None),
}


@pytest.mark.parametrize("name", TRIPS)
def test_trip_count_from_the_loop_itself(name: str) -> None:
    changes, expected = TRIPS[name]
    module = parse(COUNTING.format(**{**PLAIN, **changes}))
    main = module.computations[module.entry]
    assert trip_count(module, main, main.root) == expected


def test_known_trip_count_comes_first() -> None:
    for known in ('{"known_trip_count":{"n":"5"},"x":{}}', r'"{\"known_trip_count\":{\"n\":\"5\"}}"'):
        text = COUNTING.format(**PLAIN).replace("body=%body", f"body=%body, backend_config={known}")
        module = parse(text)
        main = module.computations[module.entry]
        assert trip_count(module, main, main.root) == 5


def compiled_text(f: Callable[..., Any], *arguments: Any) -> str:
    text: str | None = jax.jit(f).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def nested(x: jax.Array) -> jax.Array:
    def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.sin(c), None

    def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        c, _ = lax.scan(inner, c, None, length=5)
        return jnp.cos(lax.fori_loop(2, 13, lambda i, d: jnp.tanh(d) + i, c)), None

    return lax.scan(outer, x, None, length=7)[0]


def executions_of(text: str, opcode: str) -> set[int]:
    """Executions of the computations in which an opcode stands."""
    module = parse(text)
    found = visits(module, lambda name, instruction: 0.0)
    return {
        found[c.name].executions
        for c in module.computations.values()
        if any(i.opcode == opcode for i in c.instructions.values())
    }


@pytest.mark.parametrize("known", [True, False])
def test_scans_in_a_scan(known: bool) -> None:
    """With XLA's known_trip_count, and without it as XLA:TPU prints loops."""
    text = compiled_text(nested, jnp.zeros(16))
    assert text.count("known_trip_count") == 3
    if not known:
        text = re.sub(r'"known_trip_count":\{[^}]*\}', '"none":{}', text)
    assert executions_of(text, "sine") == {35}
    assert executions_of(text, "tanh") == {77}
    assert executions_of(text, "cosine") == {7}
    loops = {visit.loop for visit in visits(parse(text), lambda name, i: 0.0).values() if visit.executions == 35}
    assert {re.sub(r"while[.\d]*", "while", loop or "") for loop in loops} == {"while*7/while*5"}


def test_unknown_trip_count_is_said() -> None:
    text = compiled_text(lambda x, n: lax.fori_loop(0, n, lambda i, c: jnp.sin(c), x), jnp.zeros(4), 3)
    module = parse(text)
    found = visits(module, lambda name, i: 0.0)
    bodies = [c.name for c in module.computations.values() if any(i.opcode == "sine" for i in c.instructions.values())]
    assert [found[name].executions for name in bodies] == [1]
    assert all((found[name].loop or "").endswith("*?") for name in bodies)


# Wide loops keep what an inner loop starts from in the outer state.
OUTER = """
%outer_body (o: (s32[], f32[4], s32[], s32[])) -> (s32[], f32[4], s32[], s32[]) {
  %o = (s32[], f32[4]{0}, s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%o), index=0
  %z = f32[4]{0} get-tuple-element(%o), index=1
  %from = s32[] get-tuple-element(%o), index=2
  %last = s32[] get-tuple-element(%o), index=3
  %one = s32[] constant(1)
  %j.next = s32[] add(%one, %j)
  %inner = (s32[], f32[4]{0}, s32[]) tuple(%from, %z, %last)
  %loop = (s32[], f32[4]{0}, s32[]) while(%inner), condition=%condition, body=%body
  %z.next = f32[4]{0} get-tuple-element(%loop), index=1
  ROOT %o.next = (s32[], f32[4]{0}, s32[], s32[]) tuple(%j.next, %z.next, %from, KEPT)
}

%outer_condition (k: (s32[], f32[4], s32[], s32[])) -> pred[] {
  %k = (s32[], f32[4]{0}, s32[], s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%k), index=0
  %times = s32[] constant(3)
  ROOT %less = pred[] compare(%j.1, %times), direction=LT
}

ENTRY %main (y: f32[4]) -> (s32[], f32[4], s32[], s32[]) {
  %y = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %nine = s32[] constant(9)
  %start = (s32[], f32[4]{0}, s32[], s32[]) tuple(%zero, %y, %two, %nine)
  ROOT %outer = (s32[], f32[4]{0}, s32[], s32[]) while(%start), condition=%outer_condition, body=%outer_body
}
"""


@pytest.mark.parametrize(
    ("kept", "executions", "loop"), [("%last", 21, "outer*3/loop*7"), ("%j.next", 3, "outer*3/loop*?")]
)
def test_start_and_bound_from_the_state_of_an_outer_loop(kept: str, executions: int, loop: str) -> None:
    text = COUNTING.format(**{**PLAIN, "sides": "%i.1, %n.1"})
    module = parse(text[: text.index("ENTRY")] + OUTER.replace("KEPT", kept))
    visit = visits(module, lambda name, i: 0.0)["body"]
    assert (visit.executions, visit.loop) == (executions, loop)


CALLED = """
%wrapper (w: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %w = (s32[], f32[4]{0}, s32[]) parameter(0)
  ROOT %loop = (s32[], f32[4]{0}, s32[]) while(%w), condition=%condition, body=%body
}

ENTRY %main (y: f32[4]) -> (s32[], f32[4], s32[]) {
  %y = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %four = s32[] constant(4)
  %other = s32[] constant(OTHER)
  %one = (s32[], f32[4]{0}, s32[]) tuple(%zero, %y, %four)
  %two = (s32[], f32[4]{0}, s32[]) tuple(%zero, %y, %other)
  %call.1 = (s32[], f32[4]{0}, s32[]) call(%one), to_apply=%wrapper
  ROOT %call.2 = (s32[], f32[4]{0}, s32[]) call(%two), to_apply=%wrapper
}
"""


@pytest.mark.parametrize(("other", "executions"), [(4, 8), (5, 2)])
def test_bound_from_callers_that_agree(other: int, executions: int) -> None:
    """XLA:CPU wraps small loops in calls.  Two calls with different bounds have no one trip count."""
    text = COUNTING.format(**{**PLAIN, "sides": "%i.1, %n.1"})
    module = parse(text[: text.index("ENTRY")] + CALLED.replace("OTHER", str(other)))
    assert visits(module, lambda name, i: 0.0)["body"].executions == executions


CALLS = """
HloModule calls

%leaf (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%a)
}

%twice (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %first = f32[4]{0} call(%b), to_apply=%leaf
  ROOT %second = f32[4]{0} fusion(%first), kind=kLoop, calls=%leaf
}

%cheap (c: f32[4]) -> f32[4] {
  %c = f32[4]{0} parameter(0)
  ROOT %call.0 = f32[4]{0} call(%c), to_apply=%leaf
}

%dear (d: f32[4]) -> f32[4] {
  %d = f32[4]{0} parameter(0)
  ROOT %call.1 = f32[4]{0} call(%d), to_apply=%twice
}

%sum (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %add = f32[] add(%l, %r)
}

ENTRY %main (y: f32[4], p: pred[]) -> f32[4] {
  %y = f32[4]{0} parameter(0)
  %p = pred[] parameter(1)
  %start = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%y), calls=%twice
  %done = f32[4]{0} async-done(%start), calls=%twice
  %pick = f32[4]{0} conditional(%p, %done, %done), true_computation=%cheap, false_computation=%dear
  ROOT %reduced = f32[4]{0} all-reduce(%pick), to_apply=%sum
}
"""


def negations(name: str, instruction: Instruction) -> float:
    return float(instruction.opcode == "negate")


def test_calls_asynchronous_pairs_and_the_costliest_branch() -> None:
    found = visits(parse(CALLS), negations)
    assert {name: visit.executions for name, visit in found.items()} == {
        "main": 1,
        "cheap": 0,
        "dear": 1,
        "twice": 2,  # the pair once, the dear branch once
        "leaf": 4,
    }
    assert {name for name, visit in found.items() if visit.in_branch} == {"cheap", "dear", "twice", "leaf"}


def test_the_costliest_branch_is_the_callers_choice() -> None:
    found = visits(parse(CALLS), lambda name, instruction: float(name == "cheap"))
    assert (found["cheap"].executions, found["dear"].executions, found["leaf"].executions) == (1, 0, 3)


# A loop of 12 around a conditional that is named, and in its branch another, named or not.
TAKEN = """
HloModule taken

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  ROOT %pick = (s32[], f32[4]{0}) conditional(%s, %s, %s), true_computation=%skip, false_computation=%do, OUTER
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %t = (s32[], f32[4]{0}) parameter(0)
  ROOT %more = pred[] custom-call(%t)
}

%skip (u: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %u = (s32[], f32[4]{0}) parameter(0)
}

%do (v: (s32[], f32[4])) -> (s32[], f32[4]) {
  %v = (s32[], f32[4]{0}) parameter(0)
  %w = (s32[], f32[4]{0}) negate(%v)
  ROOT %inner = (s32[], f32[4]{0}) conditional(%w, %w, %w), branch_computations={%skip, %deep}, INNER
}

%deep (x: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = (s32[], f32[4]{0}) parameter(0)
  ROOT %y = (s32[], f32[4]{0}) negate(%x)
}

ENTRY %main (a: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = (s32[], f32[4]{0}) parameter(0)
  ROOT %while.1 = (s32[], f32[4]{0}) while(%a), condition=%condition, body=%body, TRIPS
}
"""
TWELVE = 'backend_config={"known_trip_count":{"n":"12"}}'


def named(path: str) -> str:
    return f'metadata={{op_name="jit(f)/while/body/{path}"}}'


def branches(text: str, outer: str, inner: str, trips: str = TWELVE) -> list[tuple[int, bool, bool]]:
    text = text.replace("OUTER", named(outer)).replace("INNER", named(inner)).replace("TRIPS", trips)
    found = visits(parse(text), negations)
    return [(found[name].executions, found[name].in_branch, found[name].assumed) for name in ("do", "deep")]


def test_a_named_branch_counts_as_often_as_its_name_says() -> None:
    outer = "head_taken_8_of_12/cond"
    inside = "head_taken_8_of_12/cond/branch_1_fun"
    assert branches(TAKEN, outer, f"{inside}/F_taken_3_of_4/cond") == [(8, True, False), (6, True, False)]
    assert branches(TAKEN, "head_taken_2_of_3/cond", "cond") == [(8, True, False), (8, True, True)]
    # The name of a conditional around it is not its own.
    assert branches(TAKEN, outer, f"{inside}/cond") == [(8, True, False), (8, True, True)]
    # What the name does not say for sure is assumed: a loop that was cut, one of unknown length, a fraction above 1.
    assert branches(TAKEN, "head_taken_3_of_5/cond", "cond") == [(12, True, True), (12, True, True)]
    assert branches(TAKEN, "head_taken_3_of_5/cond", "F_taken_3_of_4/cond") == [(12, True, True), (9, True, True)]
    assert branches(TAKEN, outer, "cond", trips="sharding={replicated}") == [(1, True, True), (1, True, True)]
    assert branches(TAKEN, "head_taken_5_of_4/cond", "cond") == [(12, True, True), (12, True, True)]
    assert branches(TAKEN, "head_taken_0_of_0/cond", "cond") == [(12, True, True), (12, True, True)]


@pytest.mark.parametrize("left", [False, True])
def test_a_loop_that_takes_its_condition_away_is_a_branch(left: bool) -> None:
    """As XLA compiles it: what it runs is counted once, and said to stand in a branch."""

    def step(due: jax.Array, x: jax.Array) -> Any:
        return lax.while_loop(lambda now: now[0], lambda now: (jnp.bool_(left) & due, jnp.sin(now[1]) @ x), (due, x))

    text = jax.jit(step).lower(jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((4, 4), jnp.float32))
    module = parse(text.compile().as_text() or "")
    inside = [
        name for name, c in module.computations.items() if any(i.opcode == "dot" for i in c.instructions.values())
    ]
    found = [visits(module, lambda *_: 1.0)[name] for name in inside]
    assert found
    for visit in found:
        assert (visit.executions, visit.in_branch) == (1, not left)
        assert ("*?" in (visit.loop or "")) is left
