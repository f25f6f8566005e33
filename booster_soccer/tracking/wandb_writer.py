"""W&B: live curves, settings, alarms, and the stage's result as artifacts.

Online where there is a key that the server takes (`wandb login`, or WANDB_API_KEY; WANDB_MODE and WANDB_PROJECT are
W&B's own variables), offline otherwise, with the command that sends it later. An offline run cannot be resumed, and two
of one id replace each other when they are sent: so each attempt of a run has its own id, all are one group, and the
steps of an attempt go on where those of the one before ended.
"""

import os
import shlex
from pathlib import Path
from typing import Any

import requests
from requests.utils import get_netrc_auth

from booster_soccer.tracking.writer import Record

PROJECT = "booster_soccer"
_PROBE_S = 5.0
_LIMIT_S = 45.0  # to open a run, and to close it


class WandbWriter:
    """`writer.Writer` for W&B."""

    LABEL = "W&B"

    def __init__(self, place: Path):
        self.place = place
        # What is kept for sending lies with the run, not under the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(place / "wandb"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(place / "wandb" / "cache"))
        os.environ["WANDB_SILENT"] = "true"
        self.why_offline = ""

    def start(self, info: dict[str, Any], state: dict[str, Any]) -> None:
        """A new W&B run for this attempt."""
        import wandb

        self.server = wandb.setup().settings.base_url
        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online":
            self.why_offline = _refusal(self.server)
            mode = "offline" if self.why_offline else "online"
        settings = wandb.Settings(
            console="off",  # it would take over what the run prints
            disable_code=True,
            disable_git=True,  # the commit is in the settings; git knows more than others should
            x_disable_stats=True,  # of this process, which says nothing about the training
            init_timeout=_LIMIT_S,
            finish_timeout=_LIMIT_S,
            finish_timeout_raises=True,
        )
        (self.place / "wandb").mkdir(exist_ok=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=f"{info['key']}-{info['attempt']}",
            name=f"{info['stage']}-{info['key']}-{info['attempt']}",
            group=f"{info['stage']}-{info['key']}",
            job_type=info["stage"],
            config={name: info[name] for name in ("config", "parents", "commit", "parent")},
            mode=mode,  # type: ignore[arg-type]
            dir=self.place,
            settings=settings,
        )
        self.is_online = mode == "online"

    def log(self, records: list[Record]) -> None:
        """Numbers by step."""
        try:
            for step, numbers in records:
                self.run.log(numbers, step=step)
        except Exception as error:  # W&B's own process has ended
            raise ConnectionError(f"{type(error).__name__} {error}; {self._sync()} sends what it had") from error

    def _sync(self) -> str:
        """The command that sends what lies on disk."""
        return f"'wandb sync {shlex.quote(str(Path(self.run.dir).parent))}'"

    def alarm(self, text: str) -> None:
        """An alert, which W&B mails."""
        self.run.alert(title="GPU", text=text)

    def artifact(self, path: Path) -> None:
        """A film is shown; anything else is an artifact."""
        import wandb

        if path.suffix == ".mp4":
            # Of the present step, to which more numbers may come.
            self.run.log({"video": wandb.Video(str(path), format="mp4")}, commit=False)
            return
        kind = "model" if (path / "arrays.safetensors").exists() else "result"
        artifact = wandb.Artifact(f"{self.run.id}-{path.name}", type=kind)
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self.run.log_artifact(artifact)

    def finish(self, end: dict[str, Any]) -> str:
        """Close it, or leave what a broken server does not take on disk."""
        if self.is_online and (refusal := _refusal(self.server)):
            # Its service would go on trying for minutes; all is on disk.
            raise ConnectionError(f"{refusal}; {self._sync()} sends what is missing")
        if end["hash"] is not None:
            self.run.name = f"{self.run.job_type}-{end['hash']}"
        self.run.summary.update(end["numbers"] | {"status": end["status"]})
        for file in end["files"]:
            self.artifact(Path(file))
        url = self.run.url
        self.run.finish(exit_code=0 if end["status"] == "finished" else 1)
        if self.is_online:
            return f"{url}"
        return f"offline{self.why_offline and f' ({self.why_offline})'}; {self._sync()} sends it"


def _refusal(server: str) -> str:
    """Why the server does not take the user's key, in words; empty if it does."""
    # Of the environment, or where `wandb login` keeps it.
    key = os.environ.get("WANDB_API_KEY") or (get_netrc_auth(server) or ("", ""))[1]
    if not key:
        return "no key"
    try:
        answer = requests.post(
            f"{server.rstrip('/')}/graphql",
            json={"query": "query { viewer { id } }"},
            auth=("api", key),
            timeout=_PROBE_S,
        )
        if answer.ok:
            return "" if (answer.json().get("data") or {}).get("viewer") else "the server does not know the key"
        return f"the server answered {answer.status_code}"
    except (requests.RequestException, ValueError) as error:
        return f"the server did not answer: {type(error).__name__}"
