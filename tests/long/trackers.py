"""Trackers that are refused, wrong, slow or without room, spoken to by the real clients, while a real run trains.

    python -m pytest -s tests/long/trackers.py

A stub on the loopback interface stands for both servers. Each case trains the same small fine-tuning as without
trackers; the result's arrays and saved states must have the same bytes, and the main thread's time inside the
recorder during the training must stay below 1 % of it. The full disk needs root, for a file system of its own.
"""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from booster_soccer.store import checkpoints
from tests.long.kill_resume import ROOT, STAGES
from tests.test_disk import small_disk  # noqa: F401  (a fixture)

_LIMIT_S = 600.0
_MOST = 0.01  # of a training's time may go into the recorder's calls
# What the run's process does besides the script: it adds up the time inside the recorder between start and end.
_TIMED = """
import json, os, runpy, sys, time
from booster_soccer.tracking import record
spent = {"calls": 0.0, "end": 0.0}
def timed(name, where):
    real = getattr(record.Recorder, name)
    def call(*arguments, **named):
        started = time.perf_counter()
        try:
            return real(*arguments, **named)
        finally:
            spent[where] += time.perf_counter() - started
    setattr(record.Recorder, name, call)
for name in ("__enter__", "at", "alarm", "artifact", "result"):
    timed(name, "calls")
timed("__exit__", "end")
started = time.perf_counter()
try:
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    spent["all"] = time.perf_counter() - started
    open(os.environ["SPENT"], "w").write(json.dumps(spent))
"""


class Server(http.server.ThreadingHTTPServer):
    """Answers as `how` says: refused is 403, wrong is 401, slow after 30 s; `ok` as both services would at first."""

    daemon_threads = True

    def __init__(self, how: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.how, self.asked = how, 0
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        how = self.server.how
        if how == "slow":
            self.server.ended.wait(30.0)
        status = {"wrong": 401, "refused": 403, "slow": 500}.get(how, 200)
        answer = json.dumps(_answer(self.path, body) if status == 200 else {"errors": [{"message": how}]}).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    do_GET = do_PUT = do_PATCH = do_POST

    def log_message(self, *_) -> None:
        pass


def _answer(path: str, body: bytes) -> dict:
    """As much of both services as their clients need to open a run."""
    if "mlflow" in path:
        info = {"run_id": "r" * 32, "run_uuid": "r" * 32, "experiment_id": "1", "status": "RUNNING", "start_time": 0,
                "artifact_uri": "mlflow-artifacts:/1", "lifecycle_stage": "active"}  # fmt: skip
        experiment = {"experiment_id": "1", "name": "booster_soccer", "artifact_location": "mlflow-artifacts:/1",
                      "lifecycle_stage": "active"}  # fmt: skip
        return {"experiment": experiment, "run": {"info": info, "data": {}}}
    run = {"id": "1", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0,
           "summaryMetrics": "{}",
           "project": {"id": "p", "name": "booster_soccer", "entity": {"id": "e", "name": "me"}}}  # fmt: skip
    viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    types = {"__type": {"fields": [], "inputFields": []}, "serverInfo": {"features": [], "cliVersionInfo": {}}}
    return {"data": {"viewer": viewer, "upsertBucket": {"bucket": run, "inserted": True}, **types}}


@contextlib.contextmanager
def serving(how: str, later: str | None = None, after_s: float = 8.0) -> Iterator[Server]:
    """A server that answers so, and after a while otherwise."""
    server = Server(how)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def change() -> None:
        if not server.ended.wait(after_s):
            server.how = later or how

    threading.Thread(target=change, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


# --- the run ------------------------------------------------------------------------------------------------

# Long enough for every tracker to be there before it ends.
_COMMAND = [*STAGES["finetune"], "--total-steps", "6000", "--log-every", "120", "--checkpoint-every", "2000"]


def train(place: Path, track: str, **environment: str) -> tuple[dict[str, bytes], dict[str, float], str]:
    """Run the fine-tuning in an empty directory; arrays by name, the seconds spent, what it said on stderr."""
    place.mkdir(parents=True, exist_ok=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW", "BOOSTER"))}
    home = place / "home"
    home.mkdir(exist_ok=True)
    environment = clean | {"PYTHONPATH": str(ROOT), "HOME": str(home), "SPENT": str(place / "spent.json"),
                           "MUJOCO_GL": "disable"} | environment  # fmt: skip
    script, *arguments = _COMMAND
    command = [sys.executable, "-c", _TIMED, str(ROOT / script), *arguments, "--out", "out/run", "--track", track]
    command += environment.pop("TRACK_TOO", "").split()
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    files = sorted((place / "out").rglob("*.safetensors"))
    bits = {str(path.relative_to(place)): path.read_bytes() for path in files if ".tracking" not in str(path)}
    assert any("arrays" in name for name in bits)
    checkpoints.load(place / "out" / "run")
    spent = json.loads((place / "spent.json").read_text())
    calls, end = spent["calls"] / spent["all"], spent["end"]
    print(f"{place.name}: {calls:.3%} of {spent['all']:.1f} s in calls, {end:.1f} s at the end", flush=True)
    return bits, spent, done.stderr


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict[str, bytes]:
    """The arrays of a run that no tracker watched."""
    return train(tmp_path_factory.mktemp("long") / "without", "none")[0]


def is_as_without(result, without) -> str:
    """Same bytes, and hardly any time; returns what was said."""
    bits, spent, said = result
    assert {name for name in bits if bits[name] != without.get(name)} == set() and bits.keys() == without.keys()
    assert spent["calls"] < _MOST * spent["all"]
    lines = [line for line in said.splitlines() if "W&B" in line or "MLflow" in line or "wandb" in line]
    print(*lines, sep="\n")
    return "\n".join(lines)


def test_files_alone(tmp_path, without):
    said = is_as_without(train(tmp_path / "offline", "wandb", TRACK_TOO="mlflow"), without)
    assert "W&B: offline (no key)" in said and "MLflow: run" in said


@pytest.mark.parametrize("how", ["closed", "refused", "wrong", "slow"])
def test_servers_that_never_take_anything(tmp_path, without, how):
    with serving(how) as server:
        url = "http://127.0.0.1:9" if how == "closed" else server.url
        environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40, "MLFLOW_TRACKING_URI": url}
        said = is_as_without(train(tmp_path / how, "wandb", TRACK_TOO="mlflow", **environment), without)
    assert "W&B: offline (the server" in said and "MLflow cannot be used" in said
    assert how == "closed" or server.asked > 0


@pytest.mark.parametrize("how", ["wrong", "refused", "slow"])
def test_servers_that_fail_while_it_trains(tmp_path, without, how):
    with serving("ok", later=how, after_s=20.0) as server:
        environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "MLFLOW_TRACKING_URI": server.url}
        said = is_as_without(train(tmp_path / how, "wandb", TRACK_TOO="mlflow", **environment), without)
    assert "W&B failed" in said and "wandb sync" in said
    assert "MLflow failed" in said and "all numbers are in" in said


def test_a_full_disk_under_the_trackers(small_disk, tmp_path, without):  # noqa: F811
    """The run writes elsewhere; its tracking directory lies on a volume that is full."""
    place = tmp_path / "full"
    (place / "out").mkdir(parents=True)
    (place / "out" / "run.tracking").symlink_to(small_disk)
    with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1 << 12))
    is_as_without(train(place, "wandb", TRACK_TOO="mlflow"), without)
