"""Videos: what is drawn is the episode that is scored; files whole; a machine without OpenGL goes on without them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.rollout.lanes import TwinLanes
from booster_soccer.rollout.play import Episode, play
from booster_soccer.store.signals import Stopped
from booster_soccer.tracking import video


@pytest.fixture
def gl():
    """A machine that can draw; elsewhere the test is skipped and says what is missing."""
    try:
        return video.opengl()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture
def no_gl(monkeypatch):
    """A machine that cannot."""
    monkeypatch.setattr(video, "_GLS", ("nothing",))
    video.opengl.cache_clear()
    yield
    video.opengl.cache_clear()


def frames_of(file: Path) -> np.ndarray:
    """All pictures (N, height, width, 3) of an mp4 file."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(file))
    width, height = next(reader)["size"]
    return np.array([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_the_video_shows_the_scored_episode(gl, tmp_path):
    """Zero torque in the goalie task: the robot falls, the camera looks at it, the clock runs."""
    file, episode = tmp_path / "new" / "fall.mp4", Episode("goalie", 1)
    [result] = video.write(file, None, [episode], title="zero torque")
    assert [result] == list(play(TwinLanes("goalie", 1), None, [episode]))
    frames = frames_of(file)
    falling = -(-result.physics_steps // 20)  # frames until the end
    assert len(frames) == falling + 1 + round(1.5 * 25)
    # Below the title, neither black nor of one colour.
    picture, caption = frames[:, 24 : 24 + 480].astype(int), frames[:, 24 + 480 :].astype(int)
    assert picture.mean(axis=(1, 2, 3)).min() > 30 and picture.std(axis=(1, 2, 3)).min() > 20
    moving = np.abs(np.diff(picture, axis=0)).max(axis=(1, 2, 3))
    assert (moving[:falling] > 40).all()
    assert np.abs(picture[falling + 2] - picture[-1]).mean() < 1.0  # the end stays
    assert np.abs(caption[0] - caption[falling // 2]).max() > 60
    green = (picture[..., 1] > picture[..., 0] + 40) & (picture[..., 1] > picture[..., 2] + 40)
    assert 0.2 < green.mean() < 0.95  # the pitch
    assert [path.name for path in file.parent.iterdir()] == ["fall.mp4"]


def drawn(count: int) -> list[Image.Image]:
    """Pictures of one colour each."""
    return [Image.new("RGB", (48, 32), (20 * i, 255 - 20 * i, 0)) for i in range(count)]


def test_an_mp4_holds_every_frame(tmp_path):
    video._write_mp4(tmp_path / "a.mp4", iter(drawn(10)), "0123abcd")
    frames = frames_of(tmp_path / "a.mp4").astype(int)
    assert frames.shape == (10, 32, 48, 3)
    assert np.abs(frames[:, 16, 24, 0] - 20 * np.arange(10)).max() < 12  # but for the encoder's loss
    assert b"0123abcd" in (tmp_path / "a.mp4").read_bytes()


@pytest.mark.parametrize("name", ["a.webp", "a.gif"])
def test_an_animated_picture_keeps_its_pace_and_its_mark(tmp_path, name):
    video._write_picture(tmp_path / name, iter(drawn(10)), "0123abcd")
    with Image.open(tmp_path / name) as picture:
        assert picture.n_frames == 5
        assert video.mark_of(tmp_path / name) == "0123abcd"
        picture.seek(1)
        picture.load()
        assert picture.info["duration"] == 80


def test_without_opengl_the_evaluation_goes_on_and_says_what_to_install(no_gl, tmp_path, capsys):
    file = tmp_path / "play.mp4"
    result = evaluate.main(evaluate.Config(policy="zero", only="goalie:1", backend="twin", video=file))
    assert result["fell"] and not file.exists()
    warning = capsys.readouterr().err
    assert warning.startswith("warning: no video is written: no OpenGL") and "apt-get install libosmesa6" in warning
    assert warning.count("\n") == 1


def test_an_opengl_that_ends_its_process_does_not_end_ours(no_gl, monkeypatch):
    monkeypatch.setattr(video, "_PROBE", "import os; os.abort()")
    with pytest.raises(UserError, match="nothing: ended with status -6"):
        video.opengl()


def test_a_name_that_is_no_video_and_a_file_that_is_there_are_refused(tmp_path):
    for wrong in ("play.avi", "play"):
        with pytest.raises(UserError, match=f"{wrong} is no name of a video: .*mp4"):
            evaluate.main(evaluate.Config(policy="zero", video=tmp_path / wrong))
    (tmp_path / "mine.mp4").write_text("mine")
    with pytest.raises(UserError, match="mine.mp4 exists and is not overwritten"):
        evaluate.main(evaluate.Config(policy="zero", video=tmp_path / "mine.mp4"))


# --- while a policy is trained ------------------------------------------------------------------------------


def test_films_keep_their_interval_and_never_end_a_training(tmp_path, monkeypatch, capsys):
    clock, written, seen = [100.0], [], []

    def write(file, policy, episodes, start_noise_rad, title):
        if policy == "broken":
            raise RuntimeError("it\nbroke")
        written.append((file.name, [episode.task for episode in episodes], title))

    monkeypatch.setattr(video, "write", write)
    monkeypatch.setattr(video.time, "monotonic", lambda: clock[0])
    films = video.Films(tmp_path, 60.0)
    films.taken = seen.append
    for seconds, steps in ((0.0, 1000), (59.0, 2000), (1.0, 3000), (60.0, 4000)):
        clock[0] += seconds
        films.take(None, steps, 7)
    assert written == [(f"{steps:012d}.mp4", list(c.TASKS), f"step {steps:,}") for steps in (1000, 3000, 4000)]
    assert seen == [tmp_path / name for name, *_ in written]
    clock[0] += 60.0
    films.take("broken", 5000, 7)
    clock[0] += 60.0
    films.take(None, 6000, 7)
    assert len(written) == 3  # not tried again
    assert capsys.readouterr().err == "warning: no video of step 5,000: it broke\n"
    video.Films(tmp_path, 0.0).take(None, 1, 7)
    assert len(written) == 3


def test_sigterm_is_not_taken_for_a_failed_film(tmp_path, monkeypatch):
    def write(*_):
        raise Stopped

    monkeypatch.setattr(video, "write", write)
    with pytest.raises(Stopped):
        video.Films(tmp_path, 60.0).take(None, 1, 7)
