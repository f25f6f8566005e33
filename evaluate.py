"""The official score of a checkpoint of any stage, or of a baseline, in the official environments.

    python evaluate.py --checkpoint DIR [--episodes 100] [--seed 0] [--start-noise 0.02] [--json FILE]
                       [--plot FILE.png] [--video FILE.mp4] [--backend official|twin]
    python evaluate.py --checkpoint DIR --only target:123 [--start-noise 0.02] [--video FILE.mp4]
    python evaluate.py --checkpoint DIR --json FILE --gates GATES.json
    python evaluate.py --policy hold

Input: a checkpoint directory. Output: tables of the score and, without `--json`, of its terms, the ball's motion and
the worst episodes; with `--json` a file that holds per task the mean, standard deviation, 95 % interval, success rate,
fall rate, mean steps, mean of each term and every episode, and the mean of the three tasks, and beside it a page
of the same name (.html) with tables, figures, episodes to play and advice; with `--plot` the
distribution of the scores; with `--video` the first episode of each task side by side (.mp4, .webp or .gif), where the
machine has an OpenGL. `--only` plays one episode again, by its task and seed. With `--gates` a fine-tuned checkpoint
that is scored officially becomes the registry's `Champion`, if it has earned it. The numbers do not depend on the
number of workers, nor on the backend: the twin gives the official numbers, faster.
"""

from booster_soccer import terminal

terminal.begin(__name__)

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from booster_soccer import errors
from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.envs import official
from booster_soccer.errors import UserError
from booster_soccer.rollout.play import Episode, EpisodeResult, Policy, play_in_workers, reference_policy
from booster_soccer.rollout.scores import check_numbers, ending, evaluate
from booster_soccer.store import checkpoints
from booster_soccer.store.checkpoints import Checkpoint
from booster_soccer.store.entry import guarded
from booster_soccer.tracking import plots, report, stage_pages, video
from booster_soccer.tracking.record import Recorder, Result, TrackConfig, has_claimed, score_columns
from booster_soccer.tracking.report import PLOT_SUFFIXES, finished


@dataclass(frozen=True)
class Config:
    """Give either a checkpoint or a baseline policy."""

    checkpoint: Path | None = None  # checkpoint directory, of any stage
    policy: Literal["zero", "hold"] | None = None  # baseline: zero torque, or hold the default pose
    episodes: int = 100  # per task
    seed: int = 0  # master seed; episode i plays the platform's match seed i of it
    start_noise: float = 0.0  # standard deviation of the noise on each joint's start position, rad
    json: Path | None = None  # new file for the result
    plot: Path | None = None  # new file for the distribution of the scores, .png, .svg or .pdf
    video: Path | None = None  # new file for the first episode of each task, or that of --only: .mp4, .webp or .gif
    only: str | None = None  # task:seed, play this one episode instead, e.g. target:123
    backend: Literal["official", "twin"] = "official"  # which environment plays
    workers: int | None = None  # processes; default one per core
    gates: Path | None = None  # JSON file of gates.py: a fine-tuned checkpoint may then become the Champion
    tracking: TrackConfig = TrackConfig()


def _check(config: Config) -> None:
    """Everything that can be told before the first episode."""
    if (config.checkpoint is None) == (config.policy is None):
        raise UserError("give either --checkpoint DIR or --policy zero|hold")
    check_numbers(config.episodes, config.seed, config.start_noise, config.workers)
    if config.plot is not None and (config.only is not None or config.plot.suffix not in PLOT_SUFFIXES):
        raise UserError(
            f"--plot {config.plot} needs a name that ends in {', '.join(PLOT_SUFFIXES)}, and no --only: "
            "one episode has no distribution"
        )
    if config.only is not None:
        _episode(config.only)
    if config.video is not None:
        video.check_name(config.video)
    for file in (config.plot, config.video):
        finished(file, {})
    if config.gates is not None and (config.json is None or config.backend != "official" or not config.gates.is_file()):
        raise UserError(
            f"--gates {config.gates}: a Champion needs this file (gates.py --json writes it), --json FILE and the "
            "official backend"
        )
    if config.gates is not None and config.checkpoint is None:
        raise UserError(f"--gates {config.gates}: a baseline cannot be the Champion: give --checkpoint DIR")


def _episode(text: str) -> Episode:
    """The episode of `--only task:seed`."""
    task, _, seed = text.partition(":")
    if task not in c.TASKS or not (seed.isascii() and seed.isdigit() and int(seed) < 2**64):
        raise UserError(
            f"--only {text} is not task:seed: give one of {', '.join(c.TASKS)} and a seed below 2^64, "
            "as the table of worst episodes lists them"
        )
    return Episode(task, int(seed))


class Subject(NamedTuple):
    """Who plays."""

    policy: Policy
    title: str
    about: dict[str, Any]  # part of the result
    checkpoint: Checkpoint | None = None  # None: a baseline

    @property
    def hash(self) -> str:
        """Of the checkpoint; empty for a baseline."""
        return self.about.get("hash", "")


def subject_of(config: Config) -> Subject:
    """The checkpoint or the baseline."""
    if config.checkpoint is None:
        name = str(config.policy)
        return Subject(reference_policy(name), name, {"policy": name})
    stages = None if config.gates is None else ("finetuned",)  # only such a one may claim to be the Champion
    checkpoint = checkpoints.load(config.checkpoint, stages)
    about = {"checkpoint": str(config.checkpoint), "stage": checkpoint.stage, "hash": checkpoint.hash}
    title = f"{config.checkpoint} ({checkpoint.stage}, {checkpoint.hash})"
    return Subject(policy_from_arrays(checkpoint.arrays), title, about, checkpoint)


def measure(config: Config, subject: Subject, identity: dict[str, Any]) -> dict:
    """Play; returns the JSON file's content."""
    result, policy = subject.about | {"identity": identity}, subject.policy
    if config.only is None:
        return result | evaluate(
            policy, config.episodes, config.seed, config.start_noise, config.backend, config.workers
        )
    [played] = play_in_workers(config.backend, policy, [_episode(config.only)], config.start_noise, workers=1)
    result |= {"backend": config.backend, "start_noise_rad": config.start_noise}
    return result | asdict(played) | {"ending": ending(played)}


def write(config: Config, subject: Subject, result: dict) -> list[Path]:
    """Write the result's files that are named, but for the video; returns them. A result's file may be there."""
    files = []
    if config.json is not None and not config.json.exists():
        report.write_json(result, config.json)
    if config.plot is not None:
        plots.scores(result, subject.title).savefig(config.plot)
        files.append(config.plot)
    if config.json is not None:
        files.append(config.json)
        if config.only is None:
            files += stage_pages.of_evaluation(config.json)
    return files


def show(config: Config, subject: Subject, result: dict) -> None:
    """Print the tables; where there is a page beside the result, the first alone, the others are on it."""
    if config.only is not None:
        played = {field.name: result[field.name] for field in fields(EpisodeResult)}
        report.print_episode(played, f"{subject.title}, {config.only}: {result['ending']}")
        return
    report.print_scores(result, subject.title)
    if config.json is None:
        report.print_details(result)
        worst = report.worst_episodes(result["tasks"]["target"])[0]
        print(f"one of them again: {report.replay_command(result, worst)}")


def film(config: Config, subject: Subject, file: Path) -> list[Path]:
    """Write the video, and return it; where the machine cannot draw, say so and go on."""
    if config.only is not None:
        episodes = [_episode(config.only)]
    else:
        episodes = [Episode(task, official.match_seed(config.seed, 0)) for task in c.TASKS]
    try:
        video.opengl()
    except UserError as error:
        print(f"warning: no video is written: {error}", file=sys.stderr)
        return []
    video.write(file, subject.policy, episodes, config.start_noise, subject.title, subject.hash)
    return [file]


def tracked(config: Config, subject: Subject, result: dict, files: list[Path]) -> Result:
    """What trackers and the table of runs get to know of an evaluation."""
    tasks = result["tasks"]
    numbers = {f"result/{name}_{task}": of_task[f"{name}_rate"] for task, of_task in tasks.items()
               for name in ("success", "fall")}  # fmt: skip
    means = {task: of_task["mean"] for task, of_task in tasks.items()}
    judged = score_columns(means, config.backend, config.episodes, config.start_noise)
    claim = None
    if config.gates is not None and config.checkpoint is not None and config.json is not None:
        claim = (config.checkpoint, config.gates, config.json)
    return Result(numbers, files, subject.checkpoint, judged, claim=claim)


@guarded("json", "plot", "video")
def main(config: Config) -> dict:
    """Evaluate, print the tables, write the files that are named; returns the JSON file's content."""
    _check(config)
    subject = subject_of(config)
    settings = {"episodes": config.episodes, "seed": config.seed, "only": config.only}
    identity = {name: value for name, value in subject.about.items() if name != "checkpoint"} | settings
    identity |= {"start_noise": config.start_noise, "backend": config.backend}
    started, there = time.perf_counter(), finished(config.json, identity)
    recorder = None
    # A result that is there already may still have to claim what `--gates` proves.
    if config.only is None and (there is None or (config.gates is not None and not has_claimed(config.json))):
        parents = [] if subject.checkpoint is None else [subject.checkpoint]
        recorder = Recorder(config.json, "evaluation", config, parents, resumed=there is not None)
    with recorder or contextlib.nullcontext():
        result = there or measure(config, subject, identity)
        # First what is kept: whatever happens to the screen, the episodes have been played.
        files = write(config, subject, result)
        show(config, subject, result)
        if config.video is not None:
            files += film(config, subject, config.video)
        if recorder is not None:
            recorder.result(tracked(config, subject, result, files))
    print(f"{time.perf_counter() - started:.0f} s")
    for file in files:
        print(file)
    return result


if __name__ == "__main__":
    errors.run(main, tyro.cli(Config, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
