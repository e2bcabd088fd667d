"""Action texts and what an action needs."""

import pytest

from shardlab.pipeline.actions import Action, Kind, ScheduleError, needs, parse_action


@pytest.mark.parametrize("kind", ["F", "B", "I", "W"])
@pytest.mark.parametrize(("stage", "microbatch"), [(0, 0), (2, 0), (11, 137)])
def test_text_and_back(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage, kind, microbatch)
    assert str(action) == f"{stage}{kind}{microbatch}"
    assert parse_action(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0 ", "-1F0", "2f0", "2F0B1"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        parse_action(text)
    assert str(error.value) == (
        f"action {text!r}: not a stage, a kind (F, B, I, W) and a microbatch; write it as '2F0'"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0F3", []),
        ("2F3", ["1F3"]),
        ("0B3", ["0F3", "1B3|1I3"]),
        ("1I3", ["1F3", "2B3|2I3"]),
        ("2B3", ["2F3"]),
        ("2I3", ["2F3"]),
        ("1W3", ["1I3"]),
    ],
)
def test_needs_on_three_stages(text: str, expected: list[str]) -> None:
    assert ["|".join(map(str, need)) for need in needs(parse_action(text), num_stages=3)] == expected
