"""HLO text as data: shapes, instructions, computations, where they came from, and how fast."""

import time

import jax
import jax.numpy as jnp
import pytest

from shardlab.hlo import parse
from shardlab.hlo.parse import shapes

SHAPES = {
    "f32[2,3]{1,0}": [24],
    "f32[2,3]{1,0:T(8,128)}": [24],
    "bf16[16,1024,2048]{2,1,0:T(8,128)(2,1)S(1)}": [16 * 1024 * 2048 * 2],
    "f32[]": [4],
    "pred[7]{0}": [7],
    "s4[5]{0}": [5],  # a byte an element unless the layout packs them
    "s4[5]{0:E(4)}": [3],
    "u32[2]{0:S(4)}": [8],
    "c64[3]{0}": [24],
    "c128[3]{0}": [48],
    "f64[3]": [24],
    "f8e4m3fn[10]{0}": [10],
    "f8e8m0fnu[10]{0}": [10],
    "s32[<=8,4]{1,0}": [128],
    "f32[0,4]{1,0}": [0],
    "token[]": [],
    "(f32[2]{0}, (s8[3]{0}, token[]), /*index=5*/u32[]{:S(2)})": [8, 3, 4],
    "((f32[512,512]{1,0}), f32[512,512]{1,0}, u32[])": [1 << 20, 1 << 20, 4],
}


@pytest.mark.parametrize("text", SHAPES)
def test_bytes_of_a_type(text: str) -> None:
    assert [shape.bytes for shape in shapes(text)] == SHAPES[text]


def test_a_dim_without_a_bound_has_no_size() -> None:
    with pytest.raises(ValueError, match=r"f32\[\?,4\]: a dim without a bound has no size"):
        shapes("f32[?,4]{1,0}")


ODD_TEXT = r"""
HloModule odd, is_scheduled=true, num_partitions=4, replica_count=2

FileNames
1 "/home/user/model (1).py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=52 end_line=52 column=0 end_column=0}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%branch (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  ROOT %copy.1 = (s32[], f32[4]{0}) copy(%p)
}, execution_thread="host"

// a remark between computations
ENTRY %main.7_spmd (x.1: s32[], y: f32[4], /*index=2*/z: c64[2]) -> (s32[], f32[4]) {
  %x.1 = s32[] parameter(0), metadata={op_name="x[\"a, b\"]" stack_frame_id=1}
  %y = f32[4]{0} parameter(1), sharding={devices=[2,1,4]<=[4,2]T(1,0) last_tile_dim_replicate}
  %literal = f32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %text = u8[3]{0} constant("),(")
  %t = (s32[], f32[4]{0}) tuple(s32[] %x.1, f32[4]{0:T(128)} %y), metadata={source_file="a.py" source_line=7}
  %call = f32[4]{0} custom-call(%y,
      /*index=1*/%x.1), custom_call_target="f(x, y)",
      backend_config="{\"a\": \"},{\", \"calls=%no\": 1}", called_computations={%branch, %branch}
  ROOT %pick = (s32[], f32[4]{0}) conditional(%x.1, %t, %t), branch_computations={%branch, %branch}
}
"""


def test_odd_text() -> None:
    module = parse(ODD_TEXT)
    assert (module.name, module.num_partitions, module.replica_count) == ("odd", 4, 2)
    assert module.entry == "main.7_spmd"
    main = module.computations[module.entry].instructions
    assert list(main) == ["x.1", "y", "literal", "text", "t", "call", "pick"]
    assert main["x.1"].op_name == r"x[\"a, b\"]"
    assert module.source(main["x.1"]) == "/home/user/model (1).py:52"
    assert module.source(main["t"]) == "a.py:7"
    assert module.source(main["y"]) == ""
    assert main["literal"].operands == ()
    assert main["text"].operand_text == '"),("'
    assert main["t"].operands == ("x.1", "y")
    assert main["call"].operands == ("y", "x.1")
    assert main["call"].callees("called_computations") == ("branch", "branch")
    assert main["call"].callees("calls") == ()
    assert main["pick"].callees("branch_computations") == ("branch", "branch")
    assert module.computations[module.entry].root is main["pick"]
    assert [user.name for user in module.computations[module.entry].users["x.1"]] == ["t", "call", "pick"]


def test_names_without_percent_signs() -> None:
    module = parse("HloModule m\nENTRY e {\n  a = f32[3]{0} parameter(0)\n  ROOT b = f32[3]{0} add(a, a)\n}\n")
    assert module.computations["e"].root.operands == ("a", "a")


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "empty": ("", "no ENTRY computation: give the text of a compiled program"),
        "stablehlo": ("module @jit_f {\n}\n", "not HLO text: 'module @jit_f {'"),
        "prose": ("hello world", "not HLO text: 'hello world'"),
        "cut": (ODD_TEXT[: ODD_TEXT.index("  ROOT %pick")], "ends inside a computation: it was cut"),
        "parenthesis": (ODD_TEXT.replace("tuple(s32[] %x.1", "tuple((s32[] %x.1"), "unbalanced parentheses"),
        "no opcode": (
            ODD_TEXT.replace("parameter(0), metadata", "[]"),
            "not an HLO instruction: '%x.1 = s32",
        ),
    }.values(),
)
def test_what_is_not_hlo(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_source_of_a_compiled_program() -> None:
    line = test_source_of_a_compiled_program.__code__.co_firstlineno + 2
    compiled = jax.jit(lambda x: jnp.cumsum(jnp.sort(x))).lower(jnp.zeros(8)).compile()
    module = parse(compiled.as_text() or "")
    sorts = [i for c in module.computations.values() for i in c.instructions.values() if i.opcode == "sort"]
    assert [module.source(i).rpartition("/")[2] for i in sorts] == [f"test_parse.py:{line}"]


def test_five_megabytes_take_seconds() -> None:
    config = '{"flag_configs":[],"window_config":{"bounds":["8","4"]},"text":"' + r"\n(}\"" * 20 + '"}'
    row = (
        "  %fusion.{0} = (bf16[16,1024,2048]{{2,1,0:T(8,128)(2,1)}}, /*index=1*/f32[]) fusion(%p.{0}, %p), "
        'kind=kLoop, calls=%c, metadata={{op_name="jit(f)/while/body/add"}}, backend_config='
    )
    body = "".join(row.format(k) + config + "\n" for k in range(15_000))
    text = "HloModule big\n\nENTRY %main (p: f32[]) -> f32[] {\n" + body + "}\n"
    assert len(text) > 5_000_000
    start = time.perf_counter()
    module = parse(text)
    for instruction in module.computations["main"].instructions.values():
        assert instruction.callees("calls") == ("c",)
    assert time.perf_counter() - start < 10  # 0.5 s where this was written: room for a busy machine
