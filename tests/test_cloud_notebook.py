"""The notebook as it lies in the repository. Executed for real by tests/long/notebook.py."""

import ast
import re
from pathlib import Path

import nbformat

import finetune_ddpg
import train_mjx_sac
from tests.long import notebook as drill

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = nbformat.read(ROOT / "cloud" / "notebook.ipynb", as_version=4)
CODE = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "code")
STAGES = ["train_mjx_sac", "convert_jax2torch", "gates", "finetune_ddpg", "evaluate", "submit"]


def test_it_is_a_notebook_without_outputs():
    nbformat.validate(NOTEBOOK)
    for cell in NOTEBOOK.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_it_calls_every_stage_by_its_main_in_order_and_explains_it():
    calls = re.findall(r"\b(\w+)\.main\(", CODE)
    assert list(dict.fromkeys(calls)) == STAGES  # the last of evaluate films
    before = None
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code" and re.search(r"\.main\(", cell.source):
            assert before is not None and re.search(r"[\u4e00-\u9fff]", before.source)
        before = cell if cell.cell_type == "markdown" else before


def parameters(source: str) -> dict:
    """What a cell of parameters assigns."""
    values: dict = {}
    exec(compile(ast.parse(source), "parameters", "exec"), values)
    return values


def test_its_parameters_and_the_drills_are_settings_of_the_stages():
    [cell] = [cell for cell in NOTEBOOK.cells if "parameters" in cell.metadata.get("tags", [])]
    own, short = parameters(cell.source), parameters(drill._PARAMETERS.format(out="run", volume="", lanes=3))
    assert own.keys() == short.keys()
    base = train_mjx_sac.PRESETS[short["preset"]]
    for name, of in (("pretrain", base), ("collect", base.collect), ("records", base.records),
                     ("finetune", finetune_ddpg.PRESETS[short["preset"]])):  # fmt: skip
        assert short[name].keys() <= vars(of).keys() and own[name] == {}
