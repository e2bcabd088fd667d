"""A plan as a file: what it changes of a config, and the plan that comes of it.

The verbs apply the changes to the config and make the plan anew; where it is not the one in the file (another version,
another model, a further option) they say what differs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardlab.mesh.faults import DeclarationError
from shardlab.plan.plan import Plan
from shardlab.run.config import Config, override
from shardlab.search.choice import changed

_WAY_OUT = "give a file that shardlab plan --search CONFIG --target T --out FILE wrote"


@dataclass(frozen=True)
class PlanFile:
    """What a plan file holds.

    Attributes:
      config: the path of the config it was made for.
      given: scalars of the config that were given anew, by name.
      overrides: what the plan changes: see `shardlab.search.choice.Choice.overrides`.
      plan: that comes of them.
    """

    config: str
    given: Mapping[str, Any]
    overrides: Mapping[str, Any]
    plan: Plan

    def apply(self, config: Config) -> Config:
        """The config with what the file changes of it.

        Raises:
          DeclarationError: it changes what is no part of the config, or to what that refuses.
        """
        with _read("plan file"):
            return changed(override(config, self.given), self.overrides)

    def check(self, plan: Plan, where: str) -> None:
        """That a plan is the one in the file.

        Raises:
          DeclarationError: with what differs.
        """
        # What was chosen stands before what it made of every parameter.
        with _read(f"plan {where!r}"):
            differences = self.plan.diff(plan)
        lines = sorted(differences, key=lambda line: line.startswith(("parameters ", "optimizer_state ")))
        if lines:
            shown = ", ".join(lines[:3]) + (f" and {len(lines) - 3} more" if len(lines) > 3 else "")
            raise DeclarationError(
                f"plan {where!r}: the plan made of its overrides is not the one it holds: {shown}; leave out "
                "options that change the plan, or write the file anew with shardlab plan --search ... --out"
            )


def write_plan(path: str | Path, held: PlanFile) -> None:
    """Writes a plan file."""
    text = {
        "config": held.config,
        "given": dict(held.given),
        "overrides": dict(held.overrides),
        "plan": json.loads(held.plan.to_json()),
    }
    Path(path).write_text(json.dumps(text, indent=1) + "\n")


def read_plan(path: str | Path) -> PlanFile:
    """Reads a plan file.

    Raises:
      DeclarationError: no such file, or one that is none.
    """
    file = Path(path)
    if not file.is_file():
        raise DeclarationError(f"plan {str(path)!r}: there is no such file; {_WAY_OUT}")
    with _read(f"plan {str(path)!r}"):
        data = json.loads(file.read_text())
        plan = Plan.from_json(json.dumps(data["plan"]))
        return PlanFile(data["config"], data["given"], data["overrides"], plan)


@contextlib.contextmanager
def _read(where: str) -> Iterator[None]:
    """Around what reads a file's data: what of it is of another kind than was written is told as of the file."""
    try:
        yield
    except DeclarationError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, AssertionError) as error:
        raise DeclarationError(f"{where}: is no plan file ({type(error).__name__}: {error}); {_WAY_OUT}") from error
