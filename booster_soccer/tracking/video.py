"""Videos of a policy: episodes side by side, with time, score and terms burnt in, drawn by MuJoCo without a screen.

    opengl()                                              # "egl" or "osmesa"; UserError where there is neither
    write(Path("play.mp4"), policy, [Episode("goalie", 5), Episode("target", 5)], start_noise_rad=0.02, title="...")

The episodes are played in the twin, so they are those that an evaluation with the same seeds and noise scores. Which
OpenGL MuJoCo uses is settled when it is imported, and a broken one may end its process: so both are probed and used in
processes of their own, and nothing else needs any OpenGL.
"""

import functools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from booster_soccer.envs import constants as c
from booster_soccer.errors import More, UserError, one_line
from booster_soccer.rewards.official import score_terms
from booster_soccer.rollout.lanes import TwinLanes
from booster_soccer.rollout.play import Episode, EpisodeResult, Policy, play
from booster_soccer.rollout.processes import Workers
from booster_soccer.rollout.scores import ending
from booster_soccer.store.atomic import OTHER_PLACE, os_errors

SUFFIXES = (".mp4", ".webp", ".gif")
_GLS = ("egl", "osmesa")  # MuJoCo's names; both draw without a screen
_PROBE_S = 60.0
_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1" rgba="1 1 1 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any(), "the picture is black"
"""

_ACTIONS_PER_FRAME = 2  # 25 frames a second of a policy at 50 Hz
_LAST_FRAME_S = 1.5  # how long the end stays in the picture
_CAPTION_PX = 92
_MARGIN_PX, _LINE_PX, _SMALL_LINE_PX = 8, 16, 13
_FINER = 2  # drawn larger and averaged down: without a GPU half the time of OpenGL's own smoothing
_MARK = 0x010E  # Exif: ImageDescription
_COLOURS = {"text": (235, 235, 235), "faint": (150, 150, 150), "background": (24, 26, 30)}
# The camera stands behind the robot's start, a little to its right, and looks the way that the ball should go.
_AZIMUTH_DEG, _ELEVATION_DEG = -20.0, -16.0
_DISTANCE_M, _DISTANCE_PER_M = 3.6, 0.7  # with the ball at the robot, and more for each metre between them
_CAMERA_INERTIA = 0.9  # of a frame


@functools.cache
def opengl() -> str:
    """The OpenGL that draws here, by MuJoCo's name; `UserError` that says what to install where none does.

    `MUJOCO_GL` in the environment is tried first, if it is one of them.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    reasons = []
    for name in sorted(_GLS, key=lambda name: name != wanted):
        environment = os.environ | {"MUJOCO_GL": name}
        command = [sys.executable, "-c", _PROBE]
        try:
            probe = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PROBE_S)
        except subprocess.TimeoutExpired:
            reasons.append(f"{name}: no answer")
            continue
        if probe.returncode == 0:
            return name
        last_line = (probe.stderr.strip().splitlines() or [f"ended with status {probe.returncode}"])[-1]
        reasons.append(f"{name}: {one_line(last_line)[:80]}")
    raise UserError(
        "no OpenGL draws on this machine, so there is no picture; everything else works. "
        f"On Debian and Ubuntu: apt-get install libosmesa6, or libegl1 with a GPU's driver ({'; '.join(reasons)}); "
        f"{More.OPENGL}"
    )


def write(
    file: Path,
    policy: Policy,
    episodes: Sequence[Episode],
    start_noise_rad: float = 0.0,
    title: str = "",
    mark: str = "",
) -> list[EpisodeResult]:
    """Play episodes and write a new file with their video, named `.mp4`, `.webp` or `.gif`; their results.

    `title` stands above the pictures; `mark` (such as a checkpoint's hash) goes into the file's metadata. `policy` must
    be picklable. Raises `UserError` where there is no OpenGL.
    """
    check_name(file)
    environment = {"MUJOCO_GL": opengl()}
    arguments = (list(episodes), policy, start_noise_rad)
    with Workers(_Studio, [arguments], ["the process that draws"], "use less of it", environment) as processes:
        processes.call(0, "write", file, title, mark)
        return processes.answer(0)


def check_name(file: Path) -> None:
    """Raise `UserError` unless a video can have this name."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"{file} is no name of a video: let it end in one of {', '.join(SUFFIXES)}")


class Films:
    """Videos of a policy while it is trained, at most one in an interval; if one fails, training goes on.

    They are `<directory>/<steps>.mp4`. Training waits meanwhile: a minute or more without a GPU (measured).
    """

    def __init__(self, directory: Path, every_s: float):
        """`every_s` is the interval; 0: no videos."""
        self.taken: Callable[[Path], None] = lambda file: None  # called with each new file
        self._directory, self._every_s, self._last_s = directory, every_s, -math.inf

    def take(self, policy: Policy, steps: int, seed: int) -> None:
        """Film one episode of each task, all from one seed, if it is time."""
        now_s = time.monotonic()
        if self._every_s <= 0.0 or now_s - self._last_s < self._every_s:
            return
        self._last_s = now_s
        file = self._directory / f"{steps:012d}.mp4"
        try:
            write(file, policy, [Episode(task, seed) for task in c.TASKS], c.START_NOISE_RAD, f"step {steps:,}")
            self.taken(file)
        except (UserError, RuntimeError, OSError) as error:
            print(f"warning: no video of step {steps:,}: {one_line(str(error))}", file=sys.stderr, flush=True)
            if not isinstance(error, OSError):  # it will not be better next time
                self._every_s = 0.0


def mark_of(file: Path) -> str:
    """The mark of an animated picture."""
    with Image.open(file) as picture:
        return picture.getexif().get(_MARK) or picture.info.get("comment", b"").decode()


# --- in the process that draws --------------------------------------------------------------------------


class Moment(NamedTuple):
    """What a picture shows."""

    time_s: float
    qpos: np.ndarray  # (nq,) of the official model
    terms: dict[str, float]  # weighted terms of the official score, if the episode ended now
    robot_pos_w: np.ndarray  # (3,) m
    ball_pos_w: np.ndarray  # (3,) m


class FilmedLane(TwinLanes):
    """One lane of the twin that keeps a moment after every action."""

    def __init__(self, task: str):
        super().__init__(task, 1)
        self.moments: list[Moment] = []

    def reset(self, lanes: Sequence[int], seeds: Sequence[int], start_noise_rad: float) -> None:
        super().reset(lanes, seeds, start_noise_rad)
        self.model = self.env.physics.model_of(0)
        self.moments = [self._moment({})]
        self.aim_pos_w = self.look().aim_pos_w[0]

    def hold(self, action: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        ends = super().hold(action)
        raw = {name: values[0] for name, values in self.raw_terms.items()}
        self.moments.append(self._moment(score_terms(self.tasks[0], raw)))
        return ends

    def _moment(self, terms: dict[str, float]) -> Moment:
        env = self.env
        places = env.imu_pos_w[0].copy(), env.ball.centre_pos_w[0].copy()
        return Moment(float(env.steps[0]) * c.PHYSICS_DT_S, env.qpos[0].copy(), terms, *places)


class Take(NamedTuple):
    """A played episode, ready to be drawn."""

    result: EpisodeResult
    moments: list[Moment]
    model: mujoco.MjModel
    aim_pos_w: np.ndarray  # (3,) m where the ball should go

    def at(self, frame: int) -> Moment:
        """What a frame shows; the end stays."""
        return self.moments[min(frame * _ACTIONS_PER_FRAME, len(self.moments) - 1)]


class _Studio:
    """Plays and draws."""

    def __init__(self, episodes: list[Episode], policy: Policy, start_noise_rad: float):
        self._takes = []
        for episode in episodes:
            lane = FilmedLane(episode.task)
            [result] = play(lane, policy, [episode], start_noise_rad)
            self._takes.append(Take(result, lane.moments, lane.model, lane.aim_pos_w))

    def write(self, file: Path, title: str, mark: str) -> list[EpisodeResult]:
        """Draw all frames into a new file."""
        size = (640, 480) if len(self._takes) == 1 else (400, 300)
        frames = _frames(self._takes, size, title)
        unfinished = file.with_name(f"{file.stem}.part{file.suffix}")
        with os_errors(f"write {file}", OTHER_PLACE):
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                (_write_mp4 if file.suffix == ".mp4" else _write_picture)(unfinished, frames, mark)
                unfinished.replace(file)
            finally:
                unfinished.unlink(missing_ok=True)
        return [take.result for take in self._takes]


def frames_per_s() -> float:
    """Of the video."""
    return 1.0 / (c.ACTION_DT_S * _ACTIONS_PER_FRAME)


def _frames(takes: Sequence[Take], size: tuple[int, int], title: str) -> Iterator[Image.Image]:
    """The pictures of all episodes side by side, each of `size` in pixels, until the last one has ended."""
    cameras = [_Camera(take, size) for take in takes]
    width, height = size
    last = max(-(-(len(take.moments) - 1) // _ACTIONS_PER_FRAME) for take in takes)
    heading_px = _LINE_PX + _MARGIN_PX if title else 0
    for frame in range(last + round(_LAST_FRAME_S * frames_per_s()) + 1):
        whole = Image.new("RGB", (width * len(takes), heading_px + height + _CAPTION_PX), _COLOURS["background"])
        draw = ImageDraw.Draw(whole)
        draw.text((_MARGIN_PX, _MARGIN_PX // 2), title, _COLOURS["text"], _font())
        for i, (take, camera) in enumerate(zip(takes, cameras)):
            whole.paste(camera.picture(take.at(frame)), (i * width, heading_px))
            _caption(draw, (i * width + _MARGIN_PX, heading_px + height), width, take, take.at(frame))
        yield whole


class _Camera:
    """Follows robot and ball of one episode."""

    def __init__(self, take: Take, size: tuple[int, int]):
        model, (width, height) = take.model, (size[0] * _FINER, size[1] * _FINER)
        # What a screenless OpenGL without a GPU spends most of its time on.
        model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self._data, self._size = mujoco.MjData(model), size
        self._renderer = mujoco.Renderer(model, height, width)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = False
        self._view = mujoco.MjvCamera()
        self._view.type, self._view.elevation = mujoco.mjtCamera.mjCAMERA_FREE, _ELEVATION_DEG
        start = take.moments[0]
        ahead_w = take.aim_pos_w - start.robot_pos_w
        self._view.azimuth = np.degrees(np.arctan2(ahead_w[1], ahead_w[0])) + _AZIMUTH_DEG
        self._model = model
        self._drawn: tuple[Moment | None, Image.Image] = None, Image.new("RGB", size)
        self._view.lookat[:], self._view.distance = self._place(start)

    def _place(self, moment: Moment) -> tuple[np.ndarray, float]:
        """What to look at, and from how far."""
        apart_m = float(np.linalg.norm(moment.ball_pos_w - moment.robot_pos_w))
        return (moment.ball_pos_w + moment.robot_pos_w) / 2, _DISTANCE_M + _DISTANCE_PER_M * apart_m

    def picture(self, moment: Moment) -> Image.Image:
        """The next frame; once the episode is over, the same again."""
        if moment is self._drawn[0]:
            return self._drawn[1]
        self._data.qpos[:] = moment.qpos
        mujoco.mj_forward(self._model, self._data)
        place, distance = self._place(moment)
        stay = _CAMERA_INERTIA
        self._view.lookat[:] = stay * self._view.lookat + (1 - stay) * place
        self._view.distance = stay * self._view.distance + (1 - stay) * distance
        self._renderer.update_scene(self._data, self._view)
        picture = Image.fromarray(self._renderer.render()).resize(self._size, Image.Resampling.BOX)
        self._drawn = moment, picture
        return picture


def _caption(draw: ImageDraw.ImageDraw, corner: tuple[int, int], width: int, take: Take, moment: Moment) -> None:
    """Task, time, score and its terms, under an episode's picture."""
    x, y = corner
    result, is_over = take.result, moment is take.moments[-1]
    draw.text((x, y + 4), f"{result.task}  seed {result.seed}", _COLOURS["text"], _font())
    now = f"score {sum(moment.terms.values()):+.2f}"
    now += f"  {ending(result)}" if is_over else "  if it ended now"
    draw.text((x, y + 4 + _LINE_PX), f"{moment.time_s:5.2f} s  {now}", _COLOURS["text"], _font())
    said = [f"{name} {value:+.2f}" for name, value in moment.terms.items() if abs(value) >= 0.005]
    for i, words in enumerate(said):
        column, row = divmod(i, 4)
        place = (x + column * width // 2, y + 4 + 2 * _LINE_PX + row * _SMALL_LINE_PX)
        draw.text(place, words, _COLOURS["faint"], _font(11))


@functools.cache
def _font(size: int = 13) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _write_mp4(file: Path, frames: Iterator[Image.Image], mark: str) -> None:
    """H.264, by the encoder that comes with imageio-ffmpeg."""
    import imageio_ffmpeg

    first = next(frames)
    details = ["-metadata", f"comment={mark}"]
    writer = imageio_ffmpeg.write_frames(
        str(file), first.size, fps=frames_per_s(), macro_block_size=2, output_params=details
    )
    writer.send(None)
    try:
        for frame in (first, *frames):
            writer.send(frame.tobytes())
    finally:
        writer.close()


def _write_picture(file: Path, frames: Iterator[Image.Image], mark: str) -> None:
    """An animated WebP or GIF; every other frame is enough there."""
    first, *others = list(frames)[::2]
    exif = Image.Exif()
    exif[_MARK] = mark
    details = {"exif": exif.tobytes(), "quality": 60, "method": 4} if file.suffix == ".webp" else {"comment": mark}
    duration_ms = round(2000.0 / frames_per_s())
    first.save(file, save_all=True, append_images=others, duration=duration_ms, loop=0, **details)
