"""The options of a verb: a dataclass's fields and a config's scalars, read by tyro; and what a verb prints."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shardlab.mesh.faults import Fault, raise_faults, suggestion
from shardlab.run.output import write

if TYPE_CHECKING:
    from shardlab.run.config import Scalar


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every verb."""

    json: bool = option(False, "print one JSON object on standard output")
    debug: bool = option(False, "show the traceback of an error")


def read(
    kind: type,
    arguments: list[str],
    *,
    prog: str,
    about: str,
    scalars: Sequence[Scalar] = (),
    defaults: bool = True,
) -> Any:
    """The options of `kind` and those of `scalars`, read from the arguments; `defaults` says whether help shows them.

    Raises:
      SystemExit: by tyro, which has printed the help, or what is wrong with the arguments.
    """
    import tyro

    fields: list[Any] = []
    annotation: Any
    for item in dataclasses.fields(kind):
        text, metavar = item.metadata["help"], item.metadata["metavar"]
        if item.default is dataclasses.MISSING:
            positional = Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=text, metavar=metavar)]
            fields.append((item.name, positional))
        else:
            # An empty or false default says nothing to a reader.
            hint = None if item.default else ""
            shown = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=hint)
            annotation = Annotated[type(item.default), shown, tyro.conf.FlagCreatePairsOff]
            fields.append((item.name, annotation, item.default))
    inner: dict[str, list[Any]] = {}
    for scalar in scalars:
        owner, _, name = scalar.name.rpartition(".")
        shown = tyro.conf.arg(help=scalar.help.removesuffix("."), help_behavior_hint=None if defaults else "")
        annotation = Annotated[scalar.kind, shown, tyro.conf.FlagConversionOff]
        (inner.setdefault(owner, []) if owner else fields).append((name, annotation, scalar.value))
    for owner, items in inner.items():
        made = dataclasses.make_dataclass(owner, items, frozen=True, kw_only=True)
        fields.append((owner, Annotated[made, tyro.conf.arg(help="")], made()))
    names = [item[0] for item in fields if item[0] not in inner and len(item) == 3]  # what has no default is positional
    names += [f"{owner}.{name}" for owner, items in inner.items() for name, *_ in items]
    known = [f"--{name.replace('_', '-')}" for name in names]
    given = [text.partition("=")[0].replace("_", "-") for text in arguments if text.startswith("--")]
    raise_faults(
        Fault(name, f"is no option of {prog}", f"{suggestion(name, known)}--help lists them")
        for name in given
        if name not in (*known, "--help", "--") and not name.startswith("--tyro-")
    )
    options = dataclasses.make_dataclass("Options", fields, frozen=True, kw_only=True)
    return tyro.cli(options, prog=prog, description=about, args=arguments)


def check_files(options: Any, *names: str) -> None:
    """That the files of these options can be written, before the minutes that it takes to have something to write.

    Raises:
      DeclarationError: with every one that cannot.
    """
    faults = []
    for name in names:
        path = getattr(options, name)
        if not path:
            continue
        file, given = Path(path), f"--{name} {path}"
        if file.is_dir():
            faults.append(Fault(given, "is a directory", "give a file"))
        elif not file.parent.is_dir():
            faults.append(Fault(given, f"there is no directory {file.parent}", "make it, or give another file"))
        elif not os.access(file if file.exists() else file.parent, os.W_OK):
            faults.append(Fault(given, "must not be written", "give another file"))
    raise_faults(faults)


def show(options: Any, facts: Mapping[str, Any], text: str | None) -> int:
    """Prints the facts as JSON where that is asked for, otherwise the text if there is one."""
    from shardlab.run.record import plain

    if options.json:
        write(json.dumps(plain(facts), allow_nan=False), sys.stdout)
    elif text is not None:
        write(text, sys.stdout)
    return 0
