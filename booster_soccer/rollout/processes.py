"""Worker processes: each holds one object and calls its methods for us. Nothing here knows what they play."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from booster_soccer.errors import More, UserError, of_the_machine

# One BLAS thread, so that no number depends on how many processes there are; JAX, where one needs it, off the GPU.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Failure(NamedTuple):
    """An unexpected error in a worker process."""

    traceback: str


class Workers:
    """A context of processes, numbered in order. Leaving it kills them at once, whatever they do: they hold nothing.

    So an exception raised where we wait for an answer, by a signal's handler too, ends them within moments.
    They end with their parent, however it went, and ignore SIGINT, SIGTERM and SIGHUP: the parent decides.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        arguments: Sequence[tuple],
        names: Sequence[str],
        remedy: str,
        environment: Mapping[str, str] = types.MappingProxyType({}),
    ):
        """Process p holds `make(*arguments[p])`, made there; `names[p]` and `remedy` are for error messages.

        `environment` is added to that of the processes.
        """
        self._names, self._remedy = names, remedy
        self._connections: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        try:
            with _lean_children({**_ENVIRONMENT, **environment}), _signals_blocked():
                for own in arguments:
                    here, there = context.Pipe()
                    self._connections.append(here)
                    process = context.Process(target=_serve, args=(there, make, own), daemon=True)
                    process.start()
                    there.close()
                    self._processes.append(process)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def call(self, process: int, method: str, *arguments: Any) -> None:
        """Set a process going; the caller may compute until it needs the `answer`."""
        with contextlib.suppress(ConnectionError):  # `answer` says why
            self._connections[process].send((method, *arguments))

    def ready(self, busy: Collection[int]) -> list[int]:
        """Wait until some of the processes have answered, and tell which."""
        answered = wait([self._connections[process] for process in busy])
        return [process for process in busy if self._connections[process] in answered]

    def answer(self, process: int) -> Any:
        """The answer of a process. Raises its `UserError`, or one if it died; `RuntimeError` for other errors."""
        try:
            answer = self._connections[process].recv()
        except (EOFError, ConnectionError) as error:
            name = self._names[process]
            raise UserError(f"{name} died, often for lack of memory: {self._remedy}; {More.OUT_OF_MEMORY}") from error
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, _Failure):
            raise RuntimeError(f"{self._names[process]} failed:\n{answer.traceback}")
        return answer


@contextlib.contextmanager
def _lean_children(environment: Mapping[str, str]) -> Iterator[None]:
    """Processes started inside get this environment, and do not import the caller's main module.

    `spawn` would import it again in each of them, JAX included; nothing of it is needed there.
    """
    saved = {name: os.environ.get(name) for name in environment}
    main_module = sys.modules["__main__"]
    try:
        os.environ.update(environment)
        sys.modules["__main__"] = types.ModuleType("__main__")
        yield
    finally:
        sys.modules["__main__"] = main_module
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def end_with_parent() -> None:
    """In a process that `multiprocessing` has started: let it end when its parent does, however that was."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside are born with the signals blocked that `_serve` ignores; ours come a moment later."""
    resource_tracker.ensure_running()  # its start would free them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple) -> None:
    """In a process: make the object and answer calls of its methods until the connection closes."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    try:
        served = make(*arguments)
        while True:
            method, *arguments = connection.recv()
            connection.send(getattr(served, method)(*arguments))
    except (EOFError, ConnectionError):
        return
    except UserError as error:
        connection.send(error)
    except (OSError, MemoryError) as error:
        connection.send(UserError(of_the_machine(error)))
    except Exception:
        connection.send(_Failure(traceback.format_exc()))
