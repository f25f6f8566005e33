"""One tracker's process: reads a run's metrics file as it grows, and hands the numbers to W&B or MLflow.

    python -m booster_soccer.tracking.worker wandb|mlflow runs/demo/pretrain.tracking

Started by `record.Recorder`, which says over a pipe what the run is, what to keep, and how it ended; the end of the
pipe without that word means that the run was killed. What a tracker has taken is remembered in `<tracker>.json`, by
name of metric and step, so that a later attempt of the same run leaves no gap and no point twice.

A tracker that cannot start is given up in one line. One that fails later is tried again, and what it never took is
said once, at the end: every number is in the metrics file all the same.
"""

import contextlib
import fcntl
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from booster_soccer.errors import one_line
from booster_soccer.tracking.writer import END, Record, Writer

_POLL_S = 1.0  # between two looks at the metrics file
_AGAIN_S = 10.0  # before a tracker that failed is tried again, then twice as long, up to five minutes
_AGAIN_MAX_S = 300.0
_LOCK_S = 200.0  # for the process of the attempt before to end, which it does within _ORPHAN_S
_ORPHAN_S = 150.0  # to the end, once the run is gone or has said its last word


class Tail:
    """The records of a file of JSON lines as they are appended."""

    def __init__(self, path: Path):
        self.path, self._offset = path, 0

    def read(self) -> list[Record]:
        """What was appended since the last call, whole lines only."""
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0  # cut: a run that goes on from an older state; what was taken is known
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut
                numbers = json.loads(line)
                step = int(numbers.pop("step"))
                records.append((step, {name: float(value) for name, value in numbers.items()}))
        return records


class Delivery:
    """Hands records to a writer, each number once, and remembers which."""

    def __init__(self, writer: Writer, file: Path):
        self.writer, self.file, self.pending = writer, file, []  # type: Writer, Path, list[Record]
        self.state: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            self.state = json.loads(file.read_text())
        self.delivered: dict[str, int] = self.state.setdefault("delivered", {})
        self._known = dict(self.delivered)  # and what is pending
        self.error: Exception | None = None  # of the last try
        self._wait_s, self._not_before = _AGAIN_S, 0.0

    def start(self, info: dict[str, Any]) -> None:
        """Open the tracker's run, which may know better what it has taken; raises what its library raises."""
        if self.state.get("key") != info["key"]:  # of a run that was here before
            self.delivered = {}
            self.state = {"key": info["key"], "delivered": self.delivered}
        self.writer.start(info, self.state)
        self._known = dict(self.delivered)
        self.save()

    def add(self, records: list[Record]) -> None:
        """Records to hand on; what was handed on before, in this attempt or an earlier one, is left out."""
        for step, numbers in records:
            new = {name: value for name, value in numbers.items() if step > self._known.get(name, -1)}
            self._known |= dict.fromkeys(new, step)
            if new:
                self.pending.append((step, new))

    def try_now(self) -> None:
        """One try, unless the last one failed a moment ago."""
        if not self.pending or time.monotonic() < self._not_before:
            return
        try:
            self.writer.log(self.pending)
        except Exception as error:  # whatever the tracker's library raises
            if self.error is None:
                print(f"failed: {type(error).__name__} {error}", flush=True)
            self.error, self._not_before = error, time.monotonic() + self._wait_s
            self._wait_s = min(2.0 * self._wait_s, _AGAIN_MAX_S)
            return
        for step, numbers in self.pending:
            self.delivered |= dict.fromkeys(numbers, step)
        self.pending, self.error, self._wait_s = [], None, _AGAIN_S
        self.save()

    def save(self) -> None:
        """The state on disk; a full disk costs later attempts their memory, no more."""
        writing = self.file.with_suffix(".writing")
        with contextlib.suppress(OSError):
            writing.write_text(json.dumps(self.state))
            writing.replace(self.file)


def serve(writer: Writer, place: Path, info: dict[str, Any], messages: queue.Queue, say: Callable[[str], None]) -> None:
    """From the start of a run to its end."""
    metrics = Path(info["metrics"])
    delivery, tail = Delivery(writer, place), Tail(metrics)
    try:
        delivery.start(info)
    except Exception as error:  # whatever the tracker's library raises
        say(f"{writer.LABEL} cannot be used ({_reason(error)}): this run is not tracked there")
        return
    end: dict[str, Any] | None = None
    while end is None:
        with contextlib.suppress(queue.Empty):
            message = messages.get(timeout=_POLL_S)
            if message["what"] == "finish":
                end = message
            else:
                _pass_on(writer, message)
        delivery.add(tail.read())
        delivery.try_now()
    try:
        if delivery.error is not None:
            raise delivery.error
        where = writer.finish(end)
        delivery.save()
        say(f"{writer.LABEL}: {where}")
    except Exception as error:  # whatever the tracker's library raises
        lost = f"{len(delivery.pending)} lines of numbers did not arrive" if delivery.pending else "its end is missing"
        say(f"{writer.LABEL} failed ({_reason(error)}): {lost}; all numbers are in {metrics}")


def _pass_on(writer: Writer, message: dict[str, Any]) -> None:
    try:
        if message["what"] == "alarm":
            writer.alarm(message["text"])
        elif message["what"] == "artifact":
            writer.artifact(Path(message["path"]))
    except Exception as error:  # whatever the tracker's library raises
        print(f"failed: {message['what']}: {type(error).__name__} {error}", flush=True)


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:300]


# --- the process ------------------------------------------------------------------------------------------------


def _read_messages(messages: queue.Queue) -> None:
    """In its own thread: lines from the run; their end without a last word means that it was killed."""
    # Without a buffer, whose lock this thread would hold when the process ends.
    with open(0, "rb", buffering=0, closefd=False) as pipe:
        for line in pipe:
            with contextlib.suppress(ValueError):
                messages.put(json.loads(line))
    messages.put(END)
    time.sleep(_ORPHAN_S)
    os.killpg(0, signal.SIGKILL)  # and what a library started


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Only one attempt at a time may hand on a run's numbers; a place that knows no locks goes without."""
    with lock.open("w") as file:
        until = time.monotonic() + _LOCK_S
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        else:
            raise TimeoutError("the attempt before has not ended")
        yield


def _writer(tracker: str, place: Path) -> Writer:
    # The libraries take seconds to import, and only one of them is needed.
    if tracker == "wandb":
        from booster_soccer.tracking.wandb_writer import WandbWriter

        return WandbWriter(place)
    from booster_soccer.tracking.mlflow_writer import MlflowWriter

    return MlflowWriter(place)


def main(tracker: str, place: Path) -> None:
    """The whole life of the process."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the run decides when it ends
    user = os.fdopen(os.dup(2), "w")

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, file=user, flush=True)

    try:
        log = os.open(place / f"{tracker}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        messages: queue.Queue = queue.Queue()
        threading.Thread(target=_read_messages, args=(messages,), daemon=True).start()
        with _alone(place / f"{tracker}.lock"):
            info = messages.get()
            if info.get("what") != "finish":
                serve(_writer(tracker, place), place / f"{tracker}.json", info, messages, say)
    except Exception as error:  # whatever the disk or the tracker's library raises
        say(f"{tracker} cannot be used ({_reason(error)}): this run is not tracked there")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    os._exit(0)  # all is done; at a normal end W&B would wait once more for a server that is gone
