"""The table of runs: a real Delta table on disk, written by several processes at once; Spark by a stand-in."""

import datetime
import subprocess
import sys
import types
from pathlib import Path

import pytest
from deltalake import DeltaTable

from booster_soccer.tracking import runs_table

NOW = datetime.datetime(2026, 11, 26, 8, 0, tzinfo=datetime.UTC)
ROW = {"time_utc": NOW, "run": "ab12", "stage": "pretrained", "status": "finished", "seed": 3, "seconds": 1.5,
       "parents": ["a" * 16, "b" * 16], "score": -1.25}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(runs_table.VARIABLE, raising=False)


def test_rows_are_read_back_with_nulls_for_what_is_missing():
    runs_table.append(ROW)
    runs_table.append(ROW | {"run": "cd34", "parents": [], "score": None})
    table = DeltaTable("runs/experiments/runs").to_pyarrow_table().sort_by("run").to_pylist()
    whole = dict.fromkeys(runs_table.COLUMNS)
    assert table == [whole | ROW, whole | ROW | {"run": "cd34", "parents": [], "score": None}]
    assert list(DeltaTable("runs/experiments/runs").to_pandas()["run"]).count("ab12") == 1


def test_an_unknown_column_is_a_mistake_of_the_code():
    with pytest.raises(ValueError, match="no columns .*'scores'"):
        runs_table.append(ROW | {"scores": 1.0})
    assert not Path("runs").exists()


def test_processes_append_at_once_to_a_table_that_is_not_there_yet(tmp_path, monkeypatch):
    """The first to come creates it; nobody's rows are lost."""
    monkeypatch.setenv(runs_table.VARIABLE, str(tmp_path / "elsewhere"))
    program = f"""
import sys, time, datetime, pyarrow, deltalake
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from booster_soccer.tracking import runs_table
print(flush=True)
sys.stdin.readline()
for i in range(5):
    runs_table.append({{"run": f"{{sys.argv[1]}}-{{i}}", "time_utc": datetime.datetime.now(datetime.UTC)}})
"""
    processes = [subprocess.Popen([sys.executable, "-c", program, str(i)], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True) for i in range(3)]  # fmt: skip
    for process in processes:
        process.stdout.readline()  # ready
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0, 0, 0]
    runs = DeltaTable(str(tmp_path / "elsewhere")).to_pyarrow_table()["run"].to_pylist()
    assert sorted(runs) == [f"{process}-{i}" for process in range(3) for i in range(5)]


def test_a_name_of_three_levels_is_written_by_spark(monkeypatch):
    said: list[tuple] = []

    class Spark:
        builder = property(lambda self: self)
        getOrCreate = lambda self: self  # noqa: E731
        write = property(lambda self: self)

        def sql(self, text):
            said.append(("sql", text))

        def createDataFrame(self, rows, schema):
            said.append(("rows", rows, schema))
            return self

        def mode(self, how):
            said.append(("mode", how))
            return self

        def saveAsTable(self, name):
            said.append(("table", name))

    pyspark = types.ModuleType("pyspark.sql")
    pyspark.SparkSession = Spark()
    monkeypatch.setitem(sys.modules, "pyspark", types.ModuleType("pyspark"))
    monkeypatch.setitem(sys.modules, "pyspark.sql", pyspark)
    monkeypatch.setenv(runs_table.VARIABLE, "booster_soccer.experiments.runs")
    runs_table.append(ROW)
    (_, create), (_, [row], schema), mode, table = said
    assert create.startswith("CREATE TABLE IF NOT EXISTS booster_soccer.experiments.runs (time_utc TIMESTAMP COMMENT '")
    assert create.endswith(") USING DELTA") and "parents ARRAY<STRING> COMMENT" in create
    assert schema.startswith("time_utc TIMESTAMP, run STRING, stage STRING") and "parents ARRAY<STRING>" in schema
    assert dict(zip(runs_table.COLUMNS, row)) == dict.fromkeys(runs_table.COLUMNS) | ROW
    assert (mode, table) == (("mode", "append"), ("table", "booster_soccer.experiments.runs"))
    assert not Path("runs").exists()


def test_columns_are_documented():
    text = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    rows = [f"| `{name}` | {sql} | {about} |" for name, (sql, about) in runs_table.COLUMNS.items()]
    assert "\n".join(rows) in text


def test_comments_of_columns_can_stand_in_sql():
    assert not any("'" in text for _, text in runs_table.COLUMNS.values())
