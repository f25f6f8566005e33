"""The table of `make bench`: what is written and where, its arithmetic, and rows that cannot be measured. No timing."""

import json
import sys

import numpy as np
import pytest

from benchmarks import bench, pairs, target_falls
from benchmarks.pairs import Line, NotHere
from booster_soccer import errors
from booster_soccer.envs import constants as c

DOCUMENT = "# Speed\n\nbefore | it\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nafter\n"


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text(DOCUMENT)
    return path


@pytest.fixture
def rows(monkeypatch):
    """Two rows in place of the true ones, in a module of their own: P1 can be measured, P2 cannot."""

    def cannot(config):
        raise NotHere("no such processor")

    module = type(sys)("benchmarks.fake")
    module.can = lambda config: [Line("P1", "steps | s", "2", "limit: 4", f"{config.repeats} pairs", ">= 0.5")]
    module.cannot = cannot
    monkeypatch.setitem(sys.modules, "benchmarks.fake", module)
    monkeypatch.setattr(bench, "ROWS", {"P1": ("fake", "can"), "P2": ("fake", "cannot"), "P3": ("absent", "any")})


def refused(capsys, **settings) -> str:
    with pytest.raises(SystemExit) as ended:
        errors.run(bench.main, bench.Config(**settings))
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.err.count("\n") == 1 and said.out == ""
    return said.err


def test_the_table_goes_between_the_markers_and_nothing_else_changes(document, rows, capsys):
    bench.main(bench.Config(("P1", "P2", "P3"), repeats=3, document=document))
    text, before, after = document.read_text(), *DOCUMENT.split("old")
    assert text.startswith(before) and text.endswith(after)
    block = text.removeprefix(before).removesuffix(after)
    title, _, *table = block.splitlines()
    assert "usable cores" in title and "commit" in title and "mujoco 3.3.7" in title and "old" not in block
    assert table[2:] == [
        "| P1 | steps \\| s | 2 | limit: 4 | 3 pairs | >= 0.5 |",
        "| P2 |  | not measured: no such processor |  |  |  |",
        "| P3 |  | not measured: No module named 'benchmarks.absent' |  |  |  |",
    ]
    assert all(line in capsys.readouterr().out for line in table[2:3])
    bench.main(bench.Config(("P1",), document=document))
    assert "P2" not in document.read_text() and "| 5 pairs |" in document.read_text()


def test_a_line_is_printed_as_soon_as_it_is_measured(document, rows, monkeypatch, capsys):
    seen = []

    def second(config):
        seen.append(capsys.readouterr().out)
        return []

    monkeypatch.setattr(sys.modules["benchmarks.fake"], "cannot", second)
    bench.main(bench.Config(("P1", "P2"), document=document))
    assert "limit: 4" in seen[0]


def test_bad_input_is_one_line_before_anything_is_measured(document, tmp_path, capsys):
    assert "P6, P99 given: use some of P1, P2, P3, P4" in refused(capsys, rows=("P7", "P6", "P99"), document=document)
    assert "none given" in refused(capsys, rows=(), document=document)
    assert "--repeats must be at least 1, got 0" in refused(capsys, repeats=0, document=document)
    assert "4 lanes cannot be shared" in refused(capsys, finetune_lanes=4, document=document)
    assert "nowhere" in refused(capsys, checkpoint=tmp_path / "nowhere", document=document)
    assert "cannot be read" in refused(capsys, document=tmp_path / "nowhere.md")
    assert document.read_text() == DOCUMENT
    document.write_text("<!-- bench:end -->\n<!-- bench:begin -->\n")
    assert "has no line <!-- bench:begin --> with <!-- bench:end --> after it" in refused(capsys, document=document)


def test_the_documents_of_the_project_have_a_place_for_it():
    assert "\nX\n<!-- bench:end -->" in bench.with_table(bench.ROOT / "docs/performance.md", "X")


def test_smallest_median_and_largest_by_hand():
    """Ratios 2, 0.5, 1 and 4: the median of an even number is the mean of the middle two."""
    measured = [(200.0, 100.0), (1.0, 2.0), (3000.0, 3000.0), (8.0, 2.0)]
    assert pairs.ratios(measured) == "0.50, **1.50**, 4.00"
    assert pairs.spread([3.0, 1.0, 2.0]) == (1.0, 2.0, 3.0)
    line = pairs.compare("P1", "what", measured, "steps/s", "bare", ">= 0.9")
    assert line == Line("P1", "what", "104 (1 to 3,000) steps/s", "bare: 51 (2 to 3,000) steps/s",
                        "0.50, **1.50**, 4.00", ">= 0.9")  # fmt: skip


def test_the_sides_take_turns_and_the_first_turn_does_not_count():
    played, values = [], iter(range(8))

    def side(name):
        return lambda: (played.append(name), next(values))[1]

    assert pairs.in_turn(side("A"), side("B"), 3) == [(2, 3), (4, 5), (6, 7)]
    assert played == ["A", "B"] * 4


def test_the_knee_is_the_smallest_size_near_the_best():
    bench_pretraining = pytest.importorskip("benchmarks.bench_pretraining")
    lines = bench_pretraining.curve("{} lanes", "steps/s", {64: [80.0, 89.0, 95.0], 256: [91.0, 90.0, 80.0],
                                                            1024: [100.0, 100.0, 100.0]})  # fmt: skip
    assert [line.reach for line in lines] == ["", "knee", ""]
    assert lines[0][:5] == ("P10", "64 lanes", "89 (80 to 95) steps/s", "the best, 1024", "0.80, **0.89**, 0.95")


def test_a_python_without_the_peer_makes_a_row_that_says_so(document, tmp_path, capsys):
    """A true interpreter that sees no installed package, and one that is not there."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    (line,) = bench.main(bench.Config(("P4",), sbx_python=bare, document=document))
    assert line.row == "P4" and line.ours.startswith("not measured: no sbx-rl") and "No module named" in line.ours
    assert bench.text_of(line) in document.read_text()
    (line,) = bench.main(bench.Config(("P4",), sbx_python=tmp_path / "gone", document=document))
    assert "gone cannot be run: No such file" in line.ours


def test_wall_time_is_read_from_the_first_judgement_that_reached_it(tmp_path):
    """At 600 s +4.1, later less, never +8."""
    from benchmarks.bench_finetuning import wall_time

    file = tmp_path / "seed0.metrics.jsonl"
    scores = {300.0: 1.0, 600.0: 4.1, 900.0: 3.0, 1200.0: 5.0}
    records = [{"eval/score": score, "step": int(1000 * wall_s), "wall_s": wall_s} for wall_s, score in scores.items()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    four, eight = wall_time(bench.Config(), (file,))
    assert (four.ours, four.reach) == ("10.0 min, 0.60 M steps", "<= 15 min")
    assert four.against == f"read from `{tmp_path.name}/seed0.metrics.jsonl`"
    assert (eight.ours, eight.reach) == ("not reached", "<= 35 min")


def test_the_competitions_loop_plays_learns_and_starts_anew():
    """An untrained actor falls within 500 physics steps; with 64 transitions the networks begin to move."""
    from benchmarks.competition_loop import CompetitionLoop

    loop = CompetitionLoop("goalie")
    before = [parameter.clone() for net in (loop._actor, loop._target_critic) for parameter in net.parameters()]
    loop.play(63)
    after = [parameter for net in (loop._actor, loop._target_critic) for parameter in net.parameters()]
    assert all(bool((a == b).all()) for a, b in zip(before, after))  # fewer transitions than a batch
    loop.play(1)
    assert any(bool((a != b).any()) for a, b in zip(before[:8], after[:8])) and bool((before[-1] != after[-1]).any())
    torques = [torque_nm for _, torque_nm, *_ in loop._buffer]
    assert len(loop._buffer) == 64 and all(t.shape == (c.NUM_JOINTS,) and abs(t).max() <= 1.0 for t in torques)
    loop.play(500)
    rows = list(loop._buffer)
    fell = next(number for number, (*_, ended) in enumerate(rows) if ended)
    assert not (rows[fell + 1][0] == rows[fell][3]).all() and (rows[fell][0] == rows[fell - 1][3]).all()
    loop.close()


def test_falls_count_where_the_ball_was_before_them():
    """Two lanes of 50 actions, chasing from the 10th: one falls at its 45th, one too early to have chased before."""
    distance_m = np.full((50, 2), 0.5)
    distance_m[15, 0] = 3.0
    chased = np.repeat(np.arange(50)[:, None] >= 10, 2, axis=1)
    rows = target_falls.by_place("m away", distance_m, (0.0, 1.0, 4.0), chased, np.array([45, 35]))
    assert [name for name, _ in rows] == ["0 to 1 m away", "1 to 4 m away"]
    np.testing.assert_allclose([counts for _, counts in rows], [[0.0, 79 * 0.02], [1.0, 0.02]])
