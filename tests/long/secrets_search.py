"""Run every stage of the chain with fake keys in the environment, and search all that they leave for a key.

    python -m pytest -s tests/long/secrets_search.py

Searched: stdout and stderr, every file under the run, the home, the temporary and the working directory, and
inside archives; for each key as it is, and in base64, hex and percent encoding. The last stage sends the package
to a stub of the platform on this machine that refuses it and repeats the key in its answer; W&B sends to a stub as well
(MLflow writes to its database here). Stages are as small as they can be; a gate that fails is no failure here.
"""

import base64
import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Collection, Iterator
from pathlib import Path

from tests.long.kill_resume import ROOT, STAGES
from tests.long.trackers import serving
from tests.test_submit import Platform, _serve

# What a machine of the user's may hold; no value is part of another, and none means anything.
_NAMES = ["SAI_API_KEY", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "DATABRICKS_TOKEN",
          "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AZURE_CLIENT_SECRET", "GOOGLE_API_KEY", "GITHUB_TOKEN"]  # fmt: skip
KEYS = {name: f"{name.lower().replace('_', '-')}/{i:02d}+5ecre7{i * 7919:08x}" for i, name in enumerate(_NAMES)}
_LIMIT_S = 3600.0
# How the commands of a stage may end, where not with 0; a gate may fail.
_STATUS = {"gates": (0, 1), "mistakes": (2,), "refused": (2,)}


def commands(run: Path) -> dict[str, list[list[str]]]:
    """The smallest commands of each stage, and such as must fail."""
    files = ("pretrain", "converted", "finetuned", "package", "none", "x", "gates.json", "zero.json", "zero.png")
    pretrained, converted, finetuned, package, none, new, gates, zero, plot = (str(run / name) for name in files)
    real = ["--real-observations", "2"]
    few = ["--states", "100", "--episodes", "1", "--behaviour-episodes", "2"]
    submit = ["submit.py", "--checkpoint", finetuned, "--out", package, "--episodes", "1"]
    return {
        "pretrain": [[*STAGES["pretrain"], "--out", pretrained]],
        "convert": [["convert_jax2torch.py", "--checkpoint", pretrained, "--out", converted, *real]],
        "gates": [["gates.py", "--pretrained", pretrained, "--converted", converted, *few, "--json", gates]],
        "finetune": [[*STAGES["finetune"], "--preset", "cpu", "--checkpoint", converted, "--out", finetuned]],
        "evaluate": [["evaluate.py", "--policy", "zero", "--episodes", "1", "--backend", "twin",
                      "--json", zero, "--plot", plot]],
        "submit": [submit],
        "mistakes": [["train_mjx_sac.py", "--out", new, "--preset", "none"],
                     ["finetune_ddpg.py", "--out", new, "--checkpoint", none],
                     ["chain.py", "--out", new, "--preset", "none"],
                     ["evaluate.py", "--checkpoint", none],
                     ["submit.py", "--checkpoint", none, "--out", new, "--yes"]],
        "refused": [[*submit, "--competition", "stub", "--yes"]],
    }  # fmt: skip


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


def in_files(place: Path) -> list[str]:
    """One line for each key found in files under a directory, or in their names."""
    found, sizes = [], []
    for path in sorted(place.rglob("*")):
        found += in_bytes(str(path.relative_to(place)).encode(), f"the name {path}")
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += in_bytes(content, str(path))
            sizes.append(len(content))
    print(f"{len(found)} keys found in {len(sizes)} files, {sum(sizes):,} bytes, of {len(KEYS)} keys set")
    return found


# --- the run ------------------------------------------------------------------------------------------


def run_and_search(place: Path, stages: Collection[str] | None = None, track: str = "none") -> list[str]:
    """Run some stages, or all, in an empty directory, and search it; returns one line for each key found."""
    home, tmp, cwd, output = (place / name for name in ("home", "tmp", "cwd", "output"))
    for directory in (home, tmp, cwd, output):
        directory.mkdir()
    environment = os.environ | KEYS | {"HOME": str(home), "TMPDIR": str(tmp), "BOOSTER_TRACK": track,
                                       "MUJOCO_GL": "disable"}  # fmt: skip
    chosen = {stage: scripts for stage, scripts in commands(place / "run").items() if stage in (stages or [stage])}
    with _serve(Platform(submission_status=401)) as platform, serving("ok") as tracker:
        environment |= {"SAI_API_BASE": platform.url, "WANDB_BASE_URL": tracker.url}
        for stage, scripts in chosen.items():
            for number, (script, *arguments) in enumerate(scripts):
                command = [sys.executable, str(ROOT / script), *arguments]
                done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, timeout=_LIMIT_S)
                (output / f"{stage}-{number}").write_bytes(done.stdout + done.stderr)
                print(f"{stage}: {script} ended with status {done.returncode}", flush=True)
                said = done.stderr.decode(errors="replace")
                assert done.returncode in _STATUS.get(stage, (0,)) and "Traceback" not in said, said[-300:]
    if "refused" in chosen:
        assert platform.key == KEYS["SAI_API_KEY"], "the platform's stub never saw the key: the search proves nothing"
    if "wandb" in track:
        basic = "Basic " + base64.b64encode(f"api:{KEYS['WANDB_API_KEY']}".encode()).decode()
        assert basic in tracker.authorizations, "W&B's stub never saw the key: the search proves nothing"
    return in_files(place)


def test_no_stage_leaves_a_key(tmp_path):
    assert run_and_search(tmp_path, track="wandb mlflow") == []
