"""Trackers that are refused, wrong, slow, cut off or without room, spoken to by the real clients, while a run trains.

    python -m pytest -s tests/long/trackers.py

A stub on the loopback interface stands for both servers. Each case trains the same toy, whose steps take a tenth of a
second, as without trackers; the result's arrays and saved states must have the same bytes, and the main thread's time
inside the recorder while it trains must stay below 1 % of it. So must those of a small fine-tuning, with trackers that
need files alone. A run that is killed and goes on leaves no gap and no doubled point in either. The full disk needs
root, for a file system of its own.
"""

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from booster_soccer.store import checkpoints
from tests import wandb_file
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
    spent["all"] = time.perf_counter() - started - spent["end"]
    open(os.environ["SPENT"], "w").write(json.dumps(spent))
"""
_TOY = """
import dataclasses, os, sys, time
from pathlib import Path
from booster_soccer.store import checkpoints
from booster_soccer.store.run import Run
from booster_soccer.store.signals import StopSignal
from booster_soccer.tracking.record import Recorder, Result, TrackConfig
from tests.toy_run import OBS, Config, Toy, keeping
@dataclasses.dataclass(frozen=True)
class Tracked(Config):
    tracking: TrackConfig = TrackConfig()
class Slow(Toy):
    def advance(self):
        time.sleep(0.1)
        return super().advance()
def wait_for_trackers():
    places = [Path(f"{sys.argv[1]}.tracking/{name}.json") for name in os.environ.get("WAIT_FOR", "").split()]
    while not all(place.exists() and '"delivered": {"' in place.read_text() for place in places):
        time.sleep(0.1)
    Path("opened").touch()
config = keeping(Tracked(Path(sys.argv[1]), total_steps=int(sys.argv[2])))
run = Run(config.out, "converted", config, free=("track",))
toy = Slow(config, run, {"step 200": wait_for_trackers})
with StopSignal() as stop:
    if goes_on := run.goes_on(bool(sys.argv[3:])):
        run.restore(toy)
    print("under way", flush=True)
    with Recorder(config.out, "converted", config, (), goes_on) as recorder:
        run.watch = recorder.at
        run.train(toy, config.total_steps, stop)
        path = run.finish(run.kept["best"], OBS, {})
        recorder.result(Result({"result/score": 1.0}, [path], checkpoints.load(path)))
"""
_STEPS = 2000  # four a tenth of a second: 50 s, so that slow clients come to their ends inside


class Server(http.server.ThreadingHTTPServer):
    """Answers as `how` says: refused is 403, wrong is 401, slow after 30 s; `ok` as both services would at first."""

    daemon_threads = True

    def __init__(self, how: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.how, self.asked = how, 0
        self.authorizations: set[str | None] = set()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.asked += 1
        self.server.authorizations.add(self.headers.get("Authorization"))
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
    project = {"id": "p", "name": "booster_soccer", "entity": {"id": "e", "name": "me"}}
    run = {"id": "1", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0,
           "summaryMetrics": "{}", "project": project}  # fmt: skip
    uploads = {"runID": "1", "uploadHeaders": [], "files": []}
    viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
    types = {"__type": {"fields": [], "inputFields": []}, "serverInfo": {"features": [], "cliVersionInfo": {}}}
    return {
        "data": {
            "viewer": viewer,
            "upsertBucket": {"bucket": run, "inserted": True},
            "createRunFiles": uploads,
            **types,
        }
    }


@contextlib.contextmanager
def serving(how: str, later: str | None = None, once: Path | None = None) -> Iterator[Server]:
    """A server that answers so, and otherwise once a file is there."""
    server = Server(how)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def change() -> None:
        while not server.ended.wait(0.1):
            if once is not None and once.exists():
                server.how = later or how

    threading.Thread(target=change, daemon=True).start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


# --- the run ------------------------------------------------------------------------------------------------


def environment_of(place: Path, track: str, **more: str) -> dict[str, str]:
    """A machine on which nobody has set anything up."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "MLFLOW", "BOOSTER"))}
    (place / "home").mkdir(parents=True, exist_ok=True)
    (place / "toy.py").write_text(_TOY)
    return clean | {"PYTHONPATH": str(ROOT), "HOME": str(place / "home"), "SPENT": str(place / "spent.json"),
                    "MUJOCO_GL": "disable", "BOOSTER_TRACK": track} | more  # fmt: skip


def train(place: Path, track: str, command: list[str] | None = None, **more: str) -> tuple[dict[str, bytes], str]:
    """Run in an empty directory; arrays by name, and what it said on stderr of its trackers."""
    environment = environment_of(place, track, **more)
    command = [sys.executable, "-c", _TIMED, *(command or ["toy.py", "out/run", str(_STEPS)])]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    checkpoints.load(place / "out" / "run")
    files = [path for path in sorted((place / "out").rglob("*.safetensors")) if ".tracking" not in str(path)]
    spent = json.loads((place / "spent.json").read_text())
    share, said = spent["calls"] / spent["all"], [line for line in done.stderr.splitlines() if "GPU" not in line]
    print(
        f"\n{place.name}: {share:.3%} of {spent['all']:.0f} s in calls, {spent['end']:.1f} s at the end",
        *said,
        sep="\n  ",
    )
    assert share < _MOST
    return {str(path.relative_to(place)): path.read_bytes() for path in files}, "\n".join(said)


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> dict[str, bytes]:
    """The arrays of a toy that no tracker watched."""
    bits, said = train(tmp_path_factory.mktemp("long") / "without", "none")
    assert said == "" and any("arrays" in name for name in bits)
    return bits


def test_files_alone(tmp_path, without):
    bits, said = train(tmp_path / "offline", "wandb mlflow")
    assert bits == without
    assert "W&B: offline (no key)" in said and "MLflow: run" in said


def test_processes_that_make_the_store_at_the_same_moment(tmp_path):
    """A chain and its stage begin together: MLflow itself then fails with "table already exists"."""
    program = "from booster_soccer.tracking import mlflow_writer as w; w.use_default_store(); w._make_store()"
    variables = environment_of(tmp_path, "mlflow")
    start = {"cwd": tmp_path, "env": variables, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    makers = [subprocess.Popen([sys.executable, "-c", program], **start) for _ in range(6)]
    assert [maker.communicate()[1] for maker in makers if maker.wait()] == []


def test_files_alone_beside_a_real_training(tmp_path):
    command = [str(ROOT / STAGES["finetune"][0]), *STAGES["finetune"][1:], "--out", "out/run"]
    without, with_trackers = (train(tmp_path / track, track, command)[0] for track in ("none", "wandb mlflow"))
    assert without == with_trackers


@pytest.mark.parametrize("how", ["closed", "refused", "wrong", "slow"])
def test_servers_that_never_take_anything(tmp_path, without, how):
    with serving(how) as server:
        url = "http://127.0.0.1:9" if how == "closed" else server.url
        services = {"WANDB_BASE_URL": url, "WANDB_API_KEY": "k" * 40, "MLFLOW_TRACKING_URI": url}
        bits, said = train(tmp_path / how, "wandb mlflow", **services)
    assert bits == without
    assert "W&B: offline (the server" in said and "MLflow cannot be used" in said
    assert how == "closed" or server.asked > 0


@pytest.mark.parametrize("how", ["wrong", "refused", "slow"])
def test_servers_that_fail_while_it_trains(tmp_path, without, how):
    with serving("ok", later=how, once=tmp_path / how / "opened") as server:
        services = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "MLFLOW_TRACKING_URI": server.url}
        services["WAIT_FOR"] = "wandb mlflow"
        bits, said = train(tmp_path / how, "wandb mlflow", **services)
    assert bits == without
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
    bits, said = train(place, "wandb mlflow")
    assert bits == without and "is not tracked" in said


def test_a_run_killed_again_and_again_leaves_whole_curves(tmp_path):
    """SIGKILL at three instants; then every name and step of the metrics file is in both trackers, once."""
    environment = environment_of(tmp_path, "wandb mlflow")
    command = [sys.executable, "toy.py", "out/run", str(_STEPS), "--resume"]
    for delay_s in (15.0, 9.0, 13.0):
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
        assert process.stdout is not None
        while process.stdout.readline() != b"under way\n":
            pass
        time.sleep(delay_s)
        process.kill()
        process.wait()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=_LIMIT_S)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, (tmp_path / "out" / "run.metrics.jsonl").read_text().splitlines())
    recorded = {(name, line["step"]) for line in lines for name in line if name != "step"}
    files = sorted((tmp_path / "out" / "run.tracking" / "wandb").glob("offline-run-*/*.wandb"))
    points = [(name, step) for file in files for name, row in wandb_file.history(file).items() for step, _ in row]
    print(f"\n{len(files)} attempts, {len(recorded)} numbers in the file, {len(points)} in W&B")
    assert len(files) == 4 and len(points) == len(set(points)) and set(points) >= recorded
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("booster_soccer").experiment_id])
    names = {name for name, _ in recorded}
    points = [(name, point.step) for name in names for point in client.get_metric_history(run.info.run_id, name)]
    assert len(points) == len(set(points)) and set(points) >= recorded
    assert (run.info.status, run.data.tags["attempts"]) == ("FINISHED", "4")
