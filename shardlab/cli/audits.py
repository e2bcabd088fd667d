"""The verbs on saved audits: `diff`. They start nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from shardlab.cli.options import Common, read, show


@dataclass(frozen=True, kw_only=True)
class _Diff(Common):
    a: str = field(metadata={"help": "an audit that compile --save wrote", "metavar": "A"})
    b: str = field(metadata={"help": "another, of the same config or of any", "metavar": "B"})


def diff(arguments: list[str], *, restart: bool) -> int:
    """The verb `diff`: exit status 1 where communication, memory by more than 1 %, or findings differ."""
    about = (
        "What changed between two saved audits. Exit status 1 where communication, memory by more than 1 percent, or "
        "findings differ."
    )
    options = read(_Diff, arguments, prog="shardlab diff", about=about)
    from shardlab.report.audit_diff import diff_text, differences
    from shardlab.report.audit_file import read_audit

    a, b = read_audit(options.a), read_audit(options.b)
    found = differences(a, b)
    matters = any(one.matters for one in found)
    facts = {"same": not found, "matters": matters, "differences": [dataclasses.asdict(one) for one in found]}
    show(options, facts, diff_text(a, b))
    return 1 if matters else 0
