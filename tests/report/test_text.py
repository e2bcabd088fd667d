"""The report as text, from the plain data of a `report.json`."""

import json
from typing import Any

import pytest

from shardlab.report.text import bytes_table, report_text, result_text, schedule_text

REPORT: dict[str, Any] = {
    "mesh": {"data": 2, "stage": 2},
    "target": "cpu:4",
    "num_parameters": 1234567,
    "dtype": "float32",
    "zero": 1,
    "bytes_per_device": {"parameters": 2 * 1024**2, "optimizer_state": 1536, "padding": 0, "activations": 512},
    "memory": {"argument_bytes": 3 * 1024**2, "temp_bytes": 0, "total_bytes": 3 * 1024**2 + 512},
    "collectives": [
        {
            "kind": "all-reduce",
            "axes": ["data"],
            "count": 3,
            "payload_bytes": 4096,
            "wire_bytes": 4096,
            "exact": True,
            "in_branch": False,
        }
    ],
    "stages": 2,
    "microbatches": 3,
    "schedule": "1f1b",
    "virtual": 1,
    "table_csv": None,
    "peak_in_flight": [3, 1],
    "bubble_fraction": 0.25,
    "steps_done": 4,
    "steps": 4,
    "interrupted": False,
    "unit": "nats",
    "final_loss": 2.0,
    "initial_eval_loss": 5.5,
    "eval_loss": 2.25,
    "seconds_per_step": 0.5,
    "tokens_per_second": 8192.0,
}
TEXT = """\
1,234,567 parameters on mesh data=2 x stage=2 (cpu:4), computed in float32, ZeRO 1

per device
  planned   parameters                  2.0 MiB
  planned   optimizer state             1.5 KiB
  planned   activations, at most          512 B
  compiled  arguments: state and batch  3.0 MiB
  compiled  total                       3.0 MiB

collectives per device and step, from the compiled program
  collective  axes  count  payload     wire
  all-reduce  data      3  4.0 KiB  4.0 KiB
  total                 3  4.0 KiB  4.0 KiB

schedule
  1f1b: 2 devices, 3 microbatches, 8 ticks
  F0 forward of microbatch 0, B0 backward, . idle
  tick       0  1  2  3  4  5  6  7
  device 0  F0 F1  . F2 B0  . B1 B2
  device 1   . F0 B0 F1 B1 F2 B2  .
  bubble 25.0%; microbatches in flight at most, by device: 3, 1

result
  4 of 4 steps, 0.500 s a step (median), 8,192 tokens/s
  training loss 2.000 nats at the last step
  held-out loss 5.500 -> 2.250 nats"""


def test_a_whole_report_as_json_gives_it_back() -> None:
    assert report_text(json.loads(json.dumps(REPORT))) == TEXT


@pytest.mark.parametrize(
    ("microbatches", "text"),
    [
        (1, "one stage, one microbatch: no bubble"),
        (4, "one stage: 4 microbatches accumulate their gradients, no bubble"),
    ],
)
def test_one_stage_has_a_line(microbatches: int, text: str) -> None:
    assert schedule_text({"stages": 1, "microbatches": microbatches}) == text


def test_what_takes_no_bytes_is_left_out_and_a_plan_alone_is_enough() -> None:
    assert bytes_table({"bytes_per_device": {"parameters": 7, "gradients": 0}}) == "planned   parameters  7 B"


def test_activations_of_a_model_taken_whole_are_not_said_to_be_none() -> None:
    held = {"parameters": 7, "activations": None, "padding": 0}
    assert bytes_table({"bytes_per_device": held, "memory": {"temp_bytes": 512}}).splitlines() == [
        "planned   parameters     7 B",
        "planned   activations not estimated: the model is taken whole",
        "compiled  temporaries  512 B",
    ]


def test_a_result_without_an_evaluation_or_a_finite_loss() -> None:
    (first,) = result_text({**REPORT, "final_loss": None, "eval_loss": None}).splitlines()
    assert first == "4 of 4 steps, 0.500 s a step (median), 8,192 tokens/s"
    assert "held-out" not in result_text({**REPORT, "initial_eval_loss": None})


def test_a_result_of_examples_and_of_one_step() -> None:
    for batch_size, name in ((16, "tokens"), (4096, "examples")):
        text = result_text({**REPORT, "steps": 1, "steps_done": 1, "batch_size": batch_size})
        assert text.startswith(f"1 of 1 step, 0.500 s a step (median), 8,192 {name}/s\n")


def test_a_result_that_was_stopped_says_so() -> None:
    text = result_text({**REPORT, "steps_done": 3, "interrupted": True})
    assert text.startswith("3 of 4 steps, stopped by Ctrl-C, 0.500 s a step")
