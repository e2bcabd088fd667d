"""Which of several processes this is, and how they say the same: what one knows is told to all, an error too.

A pod is driven by one process a host. Each runs the same program over its own devices, and all must call the same
collectives in the same order: what a process decides from anything that is its own (a file, a signal, a clock) the
others would not know, and wait for ever. So whatever steers a run is decided by the first and told (`by_first`), or
asked of all (`of_all`, `Agreement`).

In a single process nothing is sent, and everything here is what it would be without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from shardlab.mesh.faults import DeclarationError

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

# JAX is imported where it is used, as everywhere in this package.

# Set by `shardlab launch`: which of how many, and where the first listens.
PLACE = "SHARDLAB_PROCESS"
# What XLA, its coordination service and Gloo say where another process is gone.
_LOST = re.compile(r"Gloo|UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|Socket closed|Connection (reset|closed|refused)")
# Milliseconds that the first process waits for what the others do meanwhile; one that is gone ends it sooner.
_LONGEST = 24 * 3600 * 1000
# Set where a program is started several times at once, each being one of so many.
_ONE_OF = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


class Lost(DeclarationError):
    """Another process has ended before its time."""


def place(index: int, count: int, address: str) -> str:
    """The value of `PLACE` for one of the processes that `shardlab launch` starts."""
    return f"{index}/{count}@{address}"


def join() -> None:
    """Makes this process one of those that run the program together; to be called before JAX starts its devices.

    Where `shardlab launch` started it, its place is in the environment; anywhere else JAX looks for Slurm, a TPU pod,
    a Kubernetes job or Open MPI, and takes the places from there.

    Raises:
      DeclarationError: JAX has started, or finds no cluster.
    """
    import jax

    _own_output()
    # Its notifier takes SIGTERM away from Python, and knows nothing of Ctrl-C: `Agreement` is for both.
    jax.config.update("jax_enable_preemption_service", False)
    given: dict[str, Any] = {}
    if PLACE in os.environ:
        threading.Thread(target=_ends_with, args=(os.getppid(),), daemon=True).start()
        which, _, address = os.environ[PLACE].partition("@")
        index, count = (int(part) for part in which.split("/"))
        given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise DeclarationError(
            f"--distributed: {str(error).strip().partition(chr(10))[0]}; start every process by srun, mpirun, a "
            "Kubernetes JobSet or on a TPU pod (configs/launch has templates), or emulate several by shardlab launch"
        ) from error


def _ends_with(parent: int) -> None:
    """Ends this process when `shardlab launch` is gone, which could not end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _own_output() -> None:
    """Standard output for Python alone: what Gloo prints there goes to standard error."""
    sys.stdout.flush()
    if sys.stdout is sys.__stdout__:
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)


def joined() -> bool:
    """Whether this process is one of several that run the program together."""
    jax = sys.modules.get("jax")
    return jax is not None and hasattr(jax, "distributed") and bool(jax.distributed.is_initialized())


def count() -> int:
    """How many processes there are; it starts nothing."""
    if not joined():
        return 1
    from jax._src import distributed  # jax.process_count() would start the devices

    return int(distributed.global_state.num_processes)


def index() -> int:
    """Which of them this is; it starts nothing."""
    if not joined():
        return 0
    from jax._src import distributed

    return int(distributed.global_state.process_id)


def check_not_alone() -> None:
    """That a process that was started as one of several does not run the whole program alone, as all the others would.

    Raises:
      DeclarationError: the environment says that it is one of several.
    """
    for name in _ONE_OF:
        if os.environ.get(name, "1") not in ("0", "1"):
            raise DeclarationError(
                f"processes: this is one of {os.environ[name]} ({name}), and each would run alone and write over the "
                f"others; give --distributed to run them together, or unset {name} for runs of their own"
            )


def check_all_joined() -> None:
    """That JAX, whose devices this starts, sees no more processes than have joined: on a TPU pod it sees all anyway.

    Raises:
      DeclarationError: it sees more.
    """
    import jax

    if jax.process_count() != count():
        raise DeclarationError(
            f"processes: this is one of {jax.process_count()}, as JAX sees them, and each would write over the others; "
            "give --distributed to run them together"
        )


@contextlib.contextmanager
def losses_named() -> Iterator[None]:
    """Errors of JAX that come from the loss of another process told as that.

    Raises:
      Lost: there was one.
    """
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        if count() == 1 or not _LOST.search(first):
            raise
        raise Lost(
            f"another process is gone, or the link to it ({first}); its own output, or its host's, says why; start all "
            "of them again with --resume"
        ) from error


def by_first(work: Callable[[], Any], *, error: type[DeclarationError] = DeclarationError) -> Any:
    """What `work` gives on the first process, in all of them; only the first runs it.

    Args:
      work: gives what JSON can hold, or raises.
      error: its errors of this type are raised in all processes with this type, others as `DeclarationError`.

    Raises:
      DeclarationError: what `work` raised; on the first process as it was raised.
    """
    if count() == 1:
        return work()
    told: dict[str, Any] = {}
    raised: Exception | None = None
    if index() == 0:
        try:
            told = {"value": work()}
        except Exception as caught:
            raised, told = caught, _told(caught, error)
    told = json.loads(_broadcast(json.dumps(told).encode()))
    if raised is not None:
        raise raised
    return _value(told, error)


def of_all(work: Callable[[], Any], *, error: type[DeclarationError] = DeclarationError) -> list[Any]:
    """What `work` gives on each process, by index, in all of them.

    Raises:
      DeclarationError: what `work` raised anywhere, with the process named; where it was raised as it was.
    """
    if count() == 1:
        return [work()]
    mine, raised = _done(work, error)
    everyones = [json.loads(text) for text in _gather(json.dumps(mine).encode())]
    if raised is not None:
        raise raised
    return _values(everyones, error)


def to_first(work: Callable[[], Any], key: str, *, error: type[DeclarationError] = DeclarationError) -> Any:
    """What `work` gives on each process, by index, on the first; None on the others, which go on.

    It may be called in a thread beside the steps: no device takes part.

    Args:
      key: the same in all processes, and used once.

    Raises:
      DeclarationError: as of `of_all`, on the first; elsewhere only where it was raised.
    """
    if count() == 1:
        return [work()]
    from jax._src import distributed

    client: Any = distributed.global_state.client
    mine, raised = _done(work, error)
    if index():
        client.key_value_set(f"{key}/{index()}", json.dumps(mine))
        if raised is not None:
            raise raised
        return None
    others = [json.loads(client.blocking_key_value_get(f"{key}/{k}", _LONGEST)) for k in range(1, count())]
    client.key_value_delete(key)
    if raised is not None:
        raise raised
    return _values([mine, *others], error)


def gathered(values: Iterator[Any], work: Callable[[Iterator[Any]], Any]) -> Any:
    """What `work` makes of values on the first process; None on the others. All take part in making the values.

    Raises:
      DeclarationError: what `work` raised; on the first process as it was raised.
    """
    if count() == 1:
        return work(values)
    made, raised = None, None
    if index() == 0:
        try:
            made = work(values)
        except Exception as caught:
            raised = caught
    for _ in values:
        pass  # where the first has failed, too: the others cannot know

    def tell() -> None:
        if raised is not None:
            raise raised

    by_first(tell)
    return made


class Agreement:
    """Whether any process was asked to stop, as all of them see it: at the same step.

    Each process hands its own answer over after every step, beside it, and reads all answers some steps later, when
    they are there without a wait.

    Args:
      mesh: the devices that the answers go over.
      asked: filled where this process is asked to stop.
    """

    def __init__(self, mesh: Mesh, asked: Any) -> None:
        self._asked, self._agreed = asked, False
        self._waiting: deque[tuple[int, Any]] = deque()
        if count() > 1:
            import jax
            from jax.sharding import NamedSharding, PartitionSpec

            self._one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._any = jax.jit(lambda asked: asked.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def hand_over(self, step: int) -> None:
        """Says to the others whether this process was asked to stop by now."""
        if count() == 1:
            return
        import jax

        answer = np.full(1, bool(self._asked), np.int32)
        shape = (self._one_each.num_devices,)
        self._waiting.append((step, self._any(jax.make_array_from_callback(shape, self._one_each, lambda _: answer))))

    def to_stop(self, step: int) -> bool:
        """Whether a process had been asked when it handed over a step up to this one; alone: whether it is now."""
        while self._waiting and self._waiting[0][0] <= step:
            self._agreed |= bool(self._waiting.popleft()[1])
        return self._agreed or (count() == 1 and bool(self._asked))


def whole(array: jax.Array, mesh: Mesh) -> np.ndarray | None:
    """All of a global array, on the first process; None on the others, which must call it too.

    Meanwhile every device holds all of it.
    """
    if not array.is_fully_replicated:
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        array = jax.jit(lambda array: array, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    return np.asarray(array) if index() == 0 else None


def _done(work: Callable[[], Any], error: type[DeclarationError]) -> tuple[dict[str, Any], Exception | None]:
    """What `work` gives or raises, to be told, and what it raised."""
    try:
        return {"value": work()}, None
    except Exception as caught:
        return _told(caught, error), caught


def _values(everyones: list[dict[str, Any]], error: type[DeclarationError]) -> list[Any]:
    """What each process told.

    Raises:
      DeclarationError: one of them told an error; with the process named.
    """
    for number, told in enumerate(everyones):
        if "value" not in told:
            told["text"] = f"process {number}: {told['text']}"
        _value(told, error)
    return [told["value"] for told in everyones]


def _told(caught: Exception, error: type[DeclarationError]) -> dict[str, Any]:
    known = isinstance(caught, DeclarationError)
    return {"text": str(caught) if known else f"{type(caught).__name__}: {caught}", "same": isinstance(caught, error)}


def _value(told: dict[str, Any], error: type[DeclarationError]) -> Any:
    if "value" in told:
        return told["value"]
    raise (error if told["same"] else DeclarationError)(told["text"])


def _broadcast(text: bytes) -> bytes:
    """The first process's text."""
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = int(broadcast_one_to_all(np.int32(len(text))))
    return bytes(np.asarray(broadcast_one_to_all(_held(text, size)))[:size])


def _gather(text: bytes) -> list[bytes]:
    """Every process's text."""
    from jax.experimental.multihost_utils import process_allgather

    sizes = np.asarray(process_allgather(np.int32(len(text)))).reshape(-1)
    rows = np.asarray(process_allgather(_held(text, int(sizes.max()))))
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def _held(text: bytes, size: int) -> np.ndarray:
    """The bytes in an array of one of few lengths, each of which is a program of its own."""
    held = np.zeros(max(1024, 1 << (size - 1).bit_length()), np.uint8)
    part = np.frombuffer(text[: held.size], np.uint8)
    held[: part.size] = part
    return held
