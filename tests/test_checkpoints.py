"""What is written is what is read, and nothing wrong is loaded: checkpoints damaged, foreign, mutated."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from booster_soccer.agents.policy import policy_from_arrays
from booster_soccer.envs import constants as c
from booster_soccer.errors import UserError
from booster_soccer.preprocess.observation import LAYOUT_HASH, OBS_SIZE
from booster_soccer.store import checkpoints, manifests
from tests.small_checkpoints import FILES, HIDDEN, OPTIMIZER, network, one_line, replace_file, save, seal

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """One good checkpoint; not to be changed."""
    return save(tmp_path_factory.mktemp("good") / "run")


@pytest.fixture
def copy(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "run"))


# --- what is written is what is read ------------------------------------------------------------------


@pytest.mark.parametrize("stage", manifests.STAGES)
def test_roundtrip(tmp_path, stage):
    path = save(tmp_path / "new" / "run", stage=stage)
    loaded = checkpoints.load(path, (stage,))
    arrays = network(stage)
    assert loaded.stage == stage and loaded.path == path
    assert loaded.arrays.keys() == arrays.keys()
    for name, value in arrays.items():
        assert loaded.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.arrays[name], value)
        loaded.arrays[name] += 1  # may be written to, as torch.from_numpy expects
    assert loaded.golden_obs.shape == (16, OBS_SIZE)
    np.testing.assert_array_equal(loaded.golden_actions, policy_from_arrays(arrays)(loaded.golden_obs))
    extra = checkpoints.load_extra(loaded, "optimizer")
    for name, value in OPTIMIZER.items():
        assert extra[name].dtype == value.dtype and extra[name].shape == value.shape
        np.testing.assert_array_equal(extra[name], value)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    assert [p.name for p in path.parent.iterdir()] == ["run"]
    assert "replay" in one_line(checkpoints.load_extra, loaded, "replay")


def test_manifest_says_where_it_came_from(good):
    manifest = checkpoints.load(good).manifest
    assert manifest["observation_layout"] == LAYOUT_HASH
    assert manifest["config"] == {"out": str(good), "sizes": [8, 8], "rate": 0.5}
    assert manifest["metrics"] == {"score": 1.25, "hits": None}
    assert manifest["action"]["kp_nm_per_rad"] == c.KP_NM_PER_RAD.tolist()
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert manifest["time_utc"].endswith("+00:00")
    assert manifest["parents"] == [] and manifest["lineage"] == []


def test_lineage_names_every_ancestor_once_parents_first(tmp_path):
    """A student of a start and two teachers, of whom one descends from the start; then converted."""

    def made(name: str, stage: str, *parents: checkpoints.Checkpoint) -> checkpoints.Checkpoint:
        return checkpoints.load(save(tmp_path / name, stage=stage, parents=parents, seed=len(name)))

    start = made("a", "pretrained")
    child = made("bb", "pretrained", start)
    other = made("ccc", "pretrained")
    student = made("dddd", "pretrained", start, child, other, other)
    last = made("eeeee", "converted", student)
    entry = {
        name: {"stage": "pretrained", "hash": one.hash}
        for name, one in (("start", start), ("child", child), ("other", other), ("student", student))
    }
    assert student.manifest["parents"] == [entry["start"], entry["child"], entry["other"]]
    assert last.manifest["parents"] == [entry["student"]]
    assert last.manifest["lineage"] == [
        entry["start"] | {"parents": []},
        entry["child"] | {"parents": [start.hash]},
        entry["other"] | {"parents": []},
        entry["student"] | {"parents": [start.hash, child.hash, other.hash]},
    ]
    assert len({one.hash for one in (start, child, other, student, last)}) == 5
    raw = (tmp_path / "a" / "manifest.json").read_bytes()
    assert start.hash == hashlib.sha256(raw).hexdigest()[:16]


def test_neither_jax_nor_torch_is_imported():
    code = (
        "import sys; from booster_soccer.store import checkpoints; print({'jax', 'torch', 'mujoco'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_that_of_this_tree_alone(tmp_path, monkeypatch):
    def code(directory: Path) -> dict:
        monkeypatch.setattr(manifests, "__file__", str(directory / "booster_soccer" / "store" / "manifests.py"))
        return manifests.code.__wrapped__()  # not the cached answer for this process

    unknown = {"commit": None, "dirty": None}
    assert code(tmp_path) == unknown
    as_somebody = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), (*as_somebody, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    commit = subprocess.check_output(["git", "-C", tmp_path, "rev-parse", "HEAD"], text=True).strip()
    assert code(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "manifests.py").touch()
    assert code(tmp_path) == {"commit": commit, "dirty": True}
    assert code(tmp_path / "installed") == unknown  # somebody else's tree around it
    monkeypatch.setenv(manifests.COMMIT_VARIABLE, "abc")  # a cluster's copy
    assert code(tmp_path / "installed") == {"commit": "abc", "dirty": None}
    assert code(tmp_path) == {"commit": commit, "dirty": True}


# --- what is not loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 9, 0.5, -1])
def test_a_flipped_bit_is_found(copy, name, where):
    content = bytearray((copy / name).read_bytes())
    content[int(where * len(content)) if isinstance(where, float) else where] ^= 1
    (copy / name).write_bytes(content)
    assert name in one_line(checkpoints.load, copy)
    assert name in one_line(checkpoints.load, copy, verify=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 7, -1])
def test_truncation_is_found(copy, name, keep):
    (copy / name).write_bytes((copy / name).read_bytes()[:keep])
    assert name in one_line(checkpoints.load, copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_irregular_file_is_found(copy, name):
    (copy / name).unlink()
    assert name in one_line(checkpoints.load, copy)
    os.mkfifo(copy / name)  # would block for ever if opened
    assert name in one_line(checkpoints.load, copy)


def test_extra_arrays_are_those_of_the_loaded_checkpoint(copy):
    loaded = checkpoints.load(copy)
    save(copy, steps=2, overwrite=True, extra_arrays={"optimizer": {"count": np.array(8)}})
    assert "damaged" in one_line(checkpoints.load_extra, loaded, "optimizer")


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"observation_layout": "0" * 16}, "observation layout"),
        ({"schema_version": 1}, "schema version"),
        ({"schema_version": True}, "schema version"),
        ({"schema_version": 10**4000}, "schema version"),
        ({"stage": "trained"}, "stage"),
        ({"stage": ["converted"]}, "stage"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"steps": -1}, "steps"),
        ({"steps": 10**4000}, "steps"),
        ({"metrics": []}, "metrics"),
        ({"config": None}, "config"),
        ({"code": {}}, "code"),
        ({"lineage": [{"stage": "converted"}]}, "lineage"),
        ({"lineage": [{"stage": "converted", "hash": "a", "parents": 5}]}, "lineage"),
        ({"lineage": [{"stage": "converted", "hash": "a", "parents": [["b"]]}]}, "lineage"),
        ({"lineage": [{"stage": "converted", "hash": "a", "parents": ["b"]}]}, "lineage"),
        ({"lineage": [{"stage": "trained", "hash": "a", "parents": []}]}, "lineage"),
        ({"parents": [{"stage": "converted", "hash": "a"}]}, "parents"),
        ({"parents": None}, "parents"),
        ({"action": {}}, "joint_names"),
        ({"extra": 1}, "extra"),
        ({"files": {}}, "files"),
        ({"config": {"long": "x" * (1 << 20)}}, "damaged"),
    ],
)
def test_a_wrong_manifest_with_right_checksums_is_refused(copy, entries, word):
    seal(copy, **entries)
    assert word in one_line(checkpoints.load, copy, verify=False)


@pytest.mark.parametrize("entry", sorted(manifests.action_layer()))
def test_another_pd_layer_is_refused(copy, entry):
    seal(copy, action=manifests.action_layer() | {entry: [1.0]})
    assert entry in one_line(checkpoints.load, copy)


@pytest.mark.parametrize(
    "name",
    ["../stolen.safetensors", "/etc/hostname", "a/b.safetensors", "..", "", "x.pkl", "a.safetensors\n"],
)
def test_no_file_outside_the_directory_is_read(copy, name, monkeypatch):
    stolen = copy.parent / "stolen.safetensors"
    stolen.write_bytes(b"secret")
    files = json.loads((copy / "manifest.json").read_bytes())["files"]
    seal(copy, files=files | {name: hashlib.sha256(b"secret").hexdigest()})
    opened = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self) or read_bytes(self))
    assert "files" in one_line(checkpoints.load, copy)
    assert opened == []


def test_stage_must_be_one_that_was_asked_for(good):
    assert checkpoints.load(good, ("pretrained", "converted")).stage == "converted"
    message = one_line(checkpoints.load, good, ("pretrained", "finetuned"))
    assert "'converted'" in message and "pretrained or finetuned" in message


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("actor.hidden.bias", np.full(HIDDEN, np.nan, np.float32), "NaN"),
        ("actor.hidden.bias", np.full(HIDDEN, np.inf, np.float32), "NaN"),
        ("critic.extra", np.zeros(2, np.float64), "float64"),
        ("critic.extra", np.zeros(2, bool), "bool"),
        ("actor.hidden.bias", np.zeros(HIDDEN + 1, np.float32), "no policy"),
        ("actor.output.weight", np.float32(1), "no policy"),
        ("actor.input.weight", np.float32(1), "no policy"),
        ("actor.output.weight", np.zeros((13, HIDDEN), np.float32), "no policy"),
    ],
)
def test_wrong_arrays_are_neither_written_nor_read(copy, tmp_path, key, value, word):
    arrays = network("converted") | {key: np.asarray(value)}
    assert word in one_line(save, tmp_path / "new", arrays=arrays)
    assert not (tmp_path / "new").exists()
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    replace_file(copy, "arrays.safetensors", safetensors.numpy.save(arrays))
    assert word in one_line(checkpoints.load, copy)


def test_another_policy_is_not_that_of_the_golden_actions(copy):
    arrays = network("converted") | {"actor.hidden.bias": np.zeros(HIDDEN, np.float32)}
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    replace_file(copy, "arrays.safetensors", safetensors.numpy.save(arrays))
    assert "differs from its golden actions" in one_line(checkpoints.load, copy)
    checkpoints.load(copy, verify=False)


def test_nan_in_extra_arrays_is_not_written(tmp_path):
    assert "NaN" in one_line(save, tmp_path / "new", extra_arrays={"optimizer": {"mu": np.array([np.nan])}})


def test_a_stage_has_its_own_arrays(copy, tmp_path):
    assert "no 'pretrained' policy" in one_line(save, tmp_path / "new", stage="pretrained", arrays=network("converted"))
    assert "no 'finetuned' policy" in one_line(save, tmp_path / "new", stage="finetuned", arrays=network("pretrained"))
    seal(copy, stage="pretrained")
    assert "no 'pretrained' policy" in one_line(checkpoints.load, copy, verify=False)


def test_a_policy_of_one_joint_is_refused(tmp_path):
    arrays = network("converted")
    arrays["actor.output.weight"] = np.zeros((1, HIDDEN), np.float32)
    arrays["actor.output.bias"] = np.zeros(1, np.float32)
    assert "no policy" in one_line(save, tmp_path, arrays=arrays)


def test_a_missing_layer_is_refused(copy):
    arrays = {name: np.asarray(array, order="C") for name, array in network("converted").items()}
    del arrays["actor.hidden.weight"]
    replace_file(copy, "arrays.safetensors", safetensors.numpy.save(arrays))
    assert "no policy" in one_line(checkpoints.load, copy)


def test_golden_pairs_hold_within_the_tolerance(copy):
    golden = safetensors.numpy.load((copy / "golden.safetensors").read_bytes())
    for difference, accepted in ((5e-6, True), (2e-5, False)):
        changed = {"obs": golden["obs"], "actions": golden["actions"] + np.float32(difference)}
        replace_file(copy, "golden.safetensors", safetensors.numpy.save(changed))
        if accepted:
            checkpoints.load(copy)
        else:
            assert "golden actions by 2.0e-05" in one_line(checkpoints.load, copy)
            checkpoints.load(copy, verify=False)


@pytest.mark.parametrize("shape", [(15, OBS_SIZE), (16, OBS_SIZE + 2), (0, OBS_SIZE)])
def test_golden_pairs_have_their_shape(copy, tmp_path, shape):
    obs, actions = np.zeros(shape, np.float32), np.zeros((shape[0], 12), np.float32)
    assert f"golden_obs is {shape}" in one_line(save, tmp_path / "new", golden_obs=obs)
    replace_file(copy, "golden.safetensors", safetensors.numpy.save({"obs": obs, "actions": actions}))
    assert "16 pairs" in one_line(checkpoints.load, copy, verify=False)


def with_header(header: str) -> bytes:
    """A safetensors file of four data bytes, with this header."""
    return len(header).to_bytes(8, "little") + header.encode() + b"\0" * 4


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        pickle.dumps(Attack()),
        (1 << 62).to_bytes(8, "little") + b"{}",  # a header of 4 exabytes
        with_header("[]"),
        with_header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}'),
        with_header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        with_header('{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'),
    ],
)
def test_what_is_no_safetensors_file_is_refused(copy, content, monkeypatch):
    monkeypatch.chdir(copy.parent)
    replace_file(copy, "arrays.safetensors", content)
    assert "arrays.safetensors" in one_line(checkpoints.load, copy)
    assert not (copy.parent / "pwned").exists()


@pytest.mark.parametrize(
    "manifest", [None, b"", b"{}", b"[]", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b"NaN"], ids=range(8)
)
def test_a_foreign_directory_is_refused(tmp_path, manifest):
    if manifest is not None:
        (tmp_path / "manifest.json").write_bytes(manifest)
    assert "manifest.json" in one_line(checkpoints.load, tmp_path)


def test_a_manifest_given_for_its_directory_is_told_so(good):
    assert one_line(checkpoints.load, good / "manifest.json").endswith(f"give its directory, {good}")


def test_a_missing_directory_or_a_file_is_refused(tmp_path):
    assert "not there" in one_line(checkpoints.load, tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "not there" in one_line(checkpoints.load, tmp_path / "file")
    assert "not there" in one_line(checkpoints.load, tmp_path / "file" / "below")


# --- fuzzing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mutant(good, tmp_path_factory) -> Path:
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("mutant") / "run"))


@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(good, mutant, data):
    name = data.draw(st.sampled_from(FILES))
    original = (good / name).read_bytes()
    start = data.draw(st.integers(0, len(original)))
    stop = data.draw(st.integers(start, min(start + 20, len(original))))
    changed = original[:start] + data.draw(st.binary(max_size=20)) + original[stop:]
    (mutant / name).write_bytes(changed)
    try:
        if changed == original:
            checkpoints.load(mutant)
        else:
            one_line(checkpoints.load, mutant)
    finally:
        (mutant / name).write_bytes(original)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["../x.safetensors", "/dev/zero", "\ud800", "pretrained", "a\nb"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, database=None)
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_harmless(good, mutant, data):
    original = json.loads((good / "manifest.json").read_bytes())
    manifest = json.loads((good / "manifest.json").read_bytes())
    node = manifest
    while True:  # walk down to some entry
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans())):
            break
        node = node[key]
    change = data.draw(st.sampled_from(["replace", "delete", "add"]))
    if change == "delete":
        del node[key]
    elif change == "add" and isinstance(node, dict):
        node[data.draw(st.text(max_size=8))] = data.draw(JSON)
    else:
        node[key] = data.draw(JSON)
    (mutant / "manifest.json").write_bytes(manifests.to_bytes(manifest))
    try:
        loaded = checkpoints.load(mutant, ("converted",))
    except UserError as error:
        assert "\n" not in str(error)
        str(error).encode()  # can be printed
        return
    for name, value in network("converted").items():
        np.testing.assert_array_equal(loaded.arrays[name], value)
    assert loaded.manifest.keys() == manifests._TYPES.keys()
    for key in ("format", "schema_version", "stage", "observation_layout"):
        assert loaded.manifest[key] == original[key]
