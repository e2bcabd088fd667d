"""Schedules through CSV and back, and the messages of a CSV that is no schedule."""

from pathlib import Path

import pytest

from shardlab.pipeline.actions import ScheduleError
from shardlab.pipeline.schedules import SCHEDULES, make_schedule
from shardlab.pipeline.table_csv import from_csv, read_csv, to_csv


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 3), (3, 2), (4, 8)])
def test_there_and_back(name: str, stages: int, microbatches: int) -> None:
    schedule = make_schedule(name, stages=stages, microbatches=microbatches)
    again = from_csv(to_csv(schedule), name)
    assert again.ticks == schedule.ticks
    assert (again.num_virtual, again.num_microbatches) == (schedule.num_virtual, microbatches)
    assert [again.device_of(s) for s in range(again.num_stages)] == [
        schedule.device_of(s) for s in range(schedule.num_stages)
    ]


def test_rows_may_be_of_different_length_and_have_spaces() -> None:
    schedule = from_csv("0F0, 0F1 ,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n\n")
    assert schedule.row(1) == make_schedule("1f1b", stages=2, microbatches=2).row(1)


REFUSED = {
    "no rows": ("\n\n", "schedule 'mine': the CSV has no rows; write one for each device"),
    "no actions": (",,\n,,\n", "schedule 'mine': the CSV has no actions; give it at least an F and a B"),
    "no action": (
        "0F0,0B0\n1F0,1X0\n",
        "schedule 'mine': row 2, column 2: action '1X0': not a stage, a kind (F, B, I, W) and a microbatch; write it "
        "as '2F0'",
    ),
    "an odd stage": (
        "0F0,,2F0,2B0,,0B0\n,1F0,,,1B0,\n",
        "schedule 'mine': 3 stages on 2 devices; every device holds the same number of stages, so use 2 or 4",
    ),
    "no train step": (
        "0F0,0B0\n,1F0,1B0\n",
        "schedule 'mine': 2 stages on 2 devices, 1 microbatch: 1 fault\n"
        "tick  device 0 device 1\n"
        "   0  0F0      .\n"
        "   1  [0B0]    1F0       <-- 0B0 needs 1B0, which runs in tick 2 on device 1\n"
        "   2  .        1B0\n"
        "as orders, each device waiting for its data, the rows do compute one: read them with in_order=True "
        "(--in-order)",
    ),
    "no train step in any way": (
        "0F0,0B0\n,1B0,1F0\n",
        "schedule 'mine': 2 stages on 2 devices, 1 microbatch: 2 faults\n"
        "tick  device 0 device 1\n"
        "   0  0F0      .\n"
        "   1  [0B0]    [1B0]     <-- 0B0 needs 1B0, which runs in the same tick on device 1; device 0 waits here for "
        "ever; 1B0 needs 1F0, which runs in tick 2; device 1 waits here for ever\n"
        "   2  .        1F0",
    ),
    "two actions in a tick": (
        "0F0,0F1,(1F0;1B0)OVERLAP_F_B\n",
        "schedule 'mine': row 1, column 3: '(1F0;1B0)OVERLAP_F_B' is two actions in one tick; read the rows with "
        "in_order=True (--in-order)",
    ),
    "numbers that nothing has": (
        "0F0,0B0,0F900000000\n",
        "schedule 'mine': has 3 actions, and they speak of 1 stages and 900000001 microbatches; every stage has an F "
        "and a B of every microbatch: write them all, counting from 0",
    ),
    "numbers of thousands of digits": (
        "0F" + "9" * 5000,
        f"schedule 'mine': row 1, column 1: action '0F{'9' * 38}': not a stage, a kind (F, B, I, W) and a microbatch; "
        "write it as '2F0'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with(case: str) -> None:
    text, message = REFUSED[case]
    with pytest.raises(ScheduleError) as error:
        from_csv(text, "mine")
    assert str(error.value) == message


def test_rows_in_order() -> None:
    """Each action as early as its data allows, idle cells or not; what overlaps runs one after the other."""
    rows = "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0,,(1F1;1B1)OVERLAP_F_B\n"
    assert from_csv(rows, "mine", in_order=True).table() == [
        ["0F0", None],
        ["0F1", "1F0"],
        [None, "1B0"],
        ["0B0", "1F1"],
        [None, "1B1"],
        ["0B1", None],
    ]


def test_rows_that_wait_for_ever_are_printed_as_they_stand() -> None:
    with pytest.raises(ScheduleError) as error:
        from_csv("0F0,0B0\n1B0,1F0\n", "mine", in_order=True)
    assert str(error.value) == (
        "schedule 'mine': 2 stages on 2 devices, 1 microbatch: 1 fault\n"
        "tick  device 0 device 1\n"
        "   0  0F0      [1B0]     <-- 1B0 needs 1F0, which runs in tick 1; device 1 waits here for ever\n"
        "   1  0B0      1F0"
    )


@pytest.mark.parametrize("data", [b"\xff\xfe0F0", b"x" * 200_000], ids=["not UTF-8", "a cell without end"])
def test_a_file_that_is_no_table(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(data)
    with pytest.raises(ScheduleError) as error:
        read_csv(file)
    assert str(error.value).startswith(f"schedule {str(file)!r}: cannot be read (")
    assert str(error.value).endswith("); give a CSV with a row for each device")
