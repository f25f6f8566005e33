"""The table of runs: one row for each finished stage and evaluation, appended atomically by any number of processes.

A Delta table on disk, `runs/experiments/runs`, by default. BOOSTER_RUNS_TABLE names another directory, or, with three
levels such as `booster_soccer.experiments.runs`, a table of Unity Catalog, which Spark writes: a managed table must not
be written from outside (delta-rs 4591).
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from booster_soccer.envs import constants as c

VARIABLE = "BOOSTER_RUNS_TABLE"
DEFAULT = "runs/experiments/runs"
# name -> type in SQL, what it is
COLUMNS = {
    "time_utc": ("TIMESTAMP", "when the stage ended"),
    "run": ("STRING", "key of the run: the same for all attempts, in the group of W&B, and in the tag run of MLflow"),
    "stage": ("STRING", "pretrained, converted, gates, finetuned, evaluation, submission or chain"),
    "status": ("STRING", "finished or failed"),
    "preset": ("STRING", "null where there is none"),
    "seed": ("BIGINT", ""),
    "steps": ("BIGINT", "policy actions in one lane that the checkpoint has seen, those of its parents included"),
    "seconds": ("DOUBLE", "wall time of this call"),
    "out": ("STRING", "where its result lies"),
    "checkpoint": ("STRING", "hash of the checkpoint that was written, or judged"),
    "parents": ("ARRAY<STRING>", "hashes of the checkpoints it was made from"),
    "commit": ("STRING", "of this code; null where it is no git tree"),
    "score": ("DOUBLE", "official score, mean of the tasks"),
    **{f"score_{task}": ("DOUBLE", "") for task in c.TASKS},
    "backend": ("STRING", "what played the scored episodes: official or twin"),
    "episodes": ("BIGINT", "per task"),
    "start_noise_rad": ("DOUBLE", "standard deviation of the noise on joint positions at the start"),
    "settings": ("STRING", "the whole configuration, JSON"),
    "metrics": ("STRING", "the last numbers of the stage, JSON, by the names of docs/metrics.md"),
}
_TRIES = 8  # to create the table, which another process may be doing at this moment


def where() -> str:
    """The directory or the name of the table."""
    return os.environ.get(VARIABLE) or DEFAULT


def append(row: Mapping[str, Any]) -> None:
    """Append a row; columns that it lacks are null. Raises whatever Delta or Spark raises."""
    if unknown := row.keys() - COLUMNS.keys():
        raise ValueError(f"the table of runs has no columns {sorted(unknown)}")
    whole = {name: row.get(name) for name in COLUMNS}
    place = where()
    if "/" not in place and place.count(".") == 2:
        _append_in_spark(place, whole)
    else:
        _append_on_disk(Path(place), whole)


def _append_on_disk(path: Path, row: dict[str, Any]) -> None:
    import pyarrow as pa
    from deltalake import write_deltalake
    from deltalake.exceptions import DeltaError

    types = {
        "STRING": pa.string(),
        "BIGINT": pa.int64(),
        "DOUBLE": pa.float64(),
        "TIMESTAMP": pa.timestamp("us", "UTC"),
        "ARRAY<STRING>": pa.list_(pa.string()),
    }
    schema = pa.schema([(name, types[sql]) for name, (sql, _) in COLUMNS.items()])
    table = pa.Table.from_pylist([row], schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(_TRIES):
        try:
            write_deltalake(str(path.resolve()), table, mode="append")
            return
        except DeltaError:  # two processes created it at once
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.1 * 2**attempt)


def _append_in_spark(name: str, row: dict[str, Any]) -> None:
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.getOrCreate()
    columns = ", ".join(f"{column} {sql} COMMENT '{text}'" for column, (sql, text) in COLUMNS.items())
    spark.sql(f"CREATE TABLE IF NOT EXISTS {name} ({columns}) USING DELTA")
    schema = ", ".join(f"{column} {sql}" for column, (sql, _) in COLUMNS.items())
    spark.createDataFrame([tuple(row.values())], schema).write.mode("append").saveAsTable(name)
