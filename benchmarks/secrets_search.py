"""Run every stage of the chain with fake keys in the environment, and search all that they leave for a key.

    python benchmarks/secrets_search.py
    python benchmarks/secrets_search.py --stages evaluate mistakes

Searched: stdout and stderr, every file under the run, the home, the temporary and the working directory, and
inside archives; for each key as it is, and in base64, hex and percent encoding. The last stage sends the package
to a stub of the platform on this machine that refuses it and repeats the key in its answer. Stages are as small
as they can be; a gate that fails is no failure here. Exit status 1 if a key is found.
"""

import base64
import contextlib
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import kill_resume  # noqa: E402
from booster_soccer import errors  # noqa: E402

# What a machine of the user's may hold; no value is part of another, and none means anything.
KEYS = {
    name: f"{name.lower().replace('_', '-')}/{index:02d}+5ecre7{index * 7919:08x}"
    for index, name in enumerate(
        [
            "SAI_API_KEY",
            "WANDB_API_KEY",
            "MLFLOW_TRACKING_TOKEN",
            "MLFLOW_TRACKING_PASSWORD",
            "DATABRICKS_TOKEN",
            "HF_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "AZURE_CLIENT_SECRET",
            "GOOGLE_API_KEY",
            "GITHUB_TOKEN",
        ]  # fmt: skip
    )
}
_LIMIT_S = 3600.0
_GATE_FAILED = 1


@dataclass(frozen=True)
class Config:
    """What is run."""

    stages: tuple[str, ...] | None = None  # names as in `commands`, in that order; None: all
    keep: Path | None = None  # new directory for all that is written; None: a temporary one, deleted afterwards


def commands(run: Path) -> dict[str, list[list[str]]]:
    """The smallest commands of each stage, and such as must fail."""
    pretrained, converted, finetuned, package = (
        str(run / name) for name in ("pretrain", "converted", "finetuned", "package")
    )
    finetune = [argument for argument in kill_resume.STAGES["finetune"] if argument != "--from-scratch"]
    score = ["--episodes", "1", "--backend", "twin"]
    return {
        "pretrain": [[*kill_resume.STAGES["pretrain"], "--out", pretrained]],
        "convert": [["convert_jax2torch.py", "--checkpoint", pretrained, "--out", converted, "--real-observations", "2"]],
        "gates": [["gates.py", "--pretrained", pretrained, "--converted", converted, "--states", "100", "--episodes", "1",
                   "--behaviour-episodes", "2", "--json", str(run / "gates.json")]],
        "finetune": [[*finetune, "--checkpoint", converted, "--out", finetuned]],
        "evaluate": [["evaluate.py", "--policy", "zero", *score, "--json", str(run / "zero.json"),
                      "--plot", str(run / "zero.png")]],
        "submit": [["submit.py", "--checkpoint", finetuned, "--out", package, "--episodes", "1"]],
        "mistakes": [["train_mjx_sac.py", "--out", str(run / "x"), "--preset", "none"],
                     ["finetune_ddpg.py", "--out", str(run / "x"), "--checkpoint", str(run / "none")],
                     ["chain.py", "--out", str(run / "x"), "--preset", "none"],
                     ["evaluate.py", "--checkpoint", str(run / "none")],
                     ["submit.py", "--checkpoint", str(run / "none"), "--out", str(run / "x"), "--yes"]],
        "refused": [["submit.py", "--checkpoint", finetuned, "--out", package, "--episodes", "1", "--yes"]],
    }  # fmt: skip


_FAIL = ("mistakes", "refused")  # stages whose commands must end with status 2


# --- the search ---------------------------------------------------------------------------------------


def forms(key: str) -> dict[str, bytes]:
    """A key as it may be written: plain, percent, hex, and base64 at the three places it may start."""
    raw = key.encode()
    found = {"plain": raw, "percent": urllib.parse.quote(key, safe="").encode(), "hex": raw.hex().encode(),
             "json": json.dumps(key)[1:-1].replace("/", "\\/").encode()}  # fmt: skip
    for shift in range(3):
        # Without the characters that its neighbours share; URL-safe base64 has others for two of them.
        text = base64.b64encode(bytes(shift) + raw)[(0, 2, 3)[shift] : -4]
        found |= {f"base64 {shift}": text, f"base64url {shift}": text.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def in_bytes(content: bytes, where: str) -> Iterator[str]:
    """One line for each key that a content holds, and what is packed in it."""
    lowered = content.lower()
    for name, key in KEYS.items():
        for form, text in forms(key).items():
            if text in content or (form in ("plain", "hex") and text.lower() in lowered):
                yield f"{where} holds {name}, {form}"
                break
    if content[:2] == b"\x1f\x8b":
        with contextlib.suppress(OSError, EOFError):
            yield from in_bytes(gzip.decompress(content), f"{where} (gzip)")
    if content[:4] == b"PK\x03\x04":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from in_bytes(archive.read(member), f"{where}: {member}")


def in_files(place: Path) -> tuple[list[str], int, int]:
    """One line for each key found in files under a directory or their names; how many files, and bytes."""
    found, count, size = [], 0, 0
    for path in sorted(place.rglob("*")):
        found += in_bytes(str(path.relative_to(place)).encode(), f"the name {path}")
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            count, size = count + 1, size + len(content)
            found += in_bytes(content, str(path))
    return found, count, size


# --- the run ------------------------------------------------------------------------------------------


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Refuses everything, and repeats the key."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.keys.append(self.headers.get("X-API-Key"))
        body = json.dumps({"error": f"no such key: {self.headers.get('X-API-Key')}"}).encode()
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _refuse

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def platform() -> Iterator[http.server.ThreadingHTTPServer]:
    """A stub of the platform; `keys` are those it was sent."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    server.keys = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_all(stages: dict[str, list[list[str]]], place: Path, url: str) -> None:
    """Run the commands with the fake keys, their output in `<place>/output`; `UserError` if one ends as it must not."""
    for name in ("home", "tmp", "cwd", "output"):
        (place / name).mkdir()
    environment = os.environ | KEYS | {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "SAI_API_BASE": url,
                                       "WANDB_MODE": "offline", "MUJOCO_GL": "disable"}  # fmt: skip
    for stage, scripts in stages.items():
        for number, (script, *arguments) in enumerate(scripts):
            output = place / "output" / f"{stage}-{number}"
            with open(f"{output}.out", "wb") as out, open(f"{output}.err", "wb") as err:
                status = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=place / "cwd",
                                        env=environment, stdout=out, stderr=err, timeout=_LIMIT_S).returncode  # fmt: skip
            allowed = (2,) if stage in _FAIL else (0, _GATE_FAILED) if stage == "gates" else (0,)
            lines = Path(f"{output}.err").read_bytes()
            print(f"{stage}: {script} ended with status {status}", flush=True)
            if status not in allowed or b"Traceback" in lines:
                raise errors.UserError(f"{script} ended with status {status}: {lines[-300:].decode(errors='replace')}")


def main(config: Config) -> list[str]:
    """Run and search; returns one line for each key found."""
    with tempfile.TemporaryDirectory() as temporary:
        place = (config.keep or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise errors.UserError(f"{place} is not empty: give a new directory")
        stages = commands(place / "run")
        unknown = set(config.stages or ()) - stages.keys()
        if unknown:
            raise errors.UserError(f"--stages {' '.join(sorted(unknown))}: use some of {', '.join(stages)}")
        chosen = {name: scripts for name, scripts in stages.items() if name in (config.stages or stages)}
        with platform() as server:
            run_all(chosen, place, f"http://127.0.0.1:{server.server_address[1]}")
        if "refused" in chosen and KEYS["SAI_API_KEY"] not in server.keys:
            raise errors.UserError("the platform's stub never saw the key: the search proves nothing")
        found, count, size = in_files(place)
    for line in found:
        print(line)
    print(f"{len(found)} keys found in {count} files, {size:,} bytes, of {len(KEYS)} keys set")
    return found


if __name__ == "__main__":
    sys.exit(1 if errors.run(main, tyro.cli(Config, description=__doc__)) else 0)
