"""Short ways to write a manifest, and the schema: what they become."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tokenflow_batch.manifest import load
from tokenflow_batch.manifest_schema import manifest_model, manifest_schema

EXAMPLES = sorted((Path(__file__).parents[1] / "manifests").glob("*.yaml"))

SHORT = """\
version: 1
model: demo
naming: "{edit}/{clip}.mp4"
clips:
  - video: a.mp4
    edits:
      - matrix: {prompt: [a red ball, a blue ball!], guidance_scale: [5, 7.5]}
        name: "{prompt}-{guidance_scale}"
      - {name: x, prompt: p, source_prompt: q}
"""


def test_a_matrix_is_every_combination_and_a_text_file_the_source_prompt(tmp_path):
    (tmp_path / "m.yaml").write_text(SHORT)
    (tmp_path / "a.txt").write_text("a wolf\n")
    jobs = load(tmp_path / "m.yaml").jobs
    assert [(j.edit, j.settings.guidance_scale, j.settings.source_prompt) for j in jobs] == [
        ("a-red-ball-5", 5.0, "a wolf"),
        ("a-red-ball-7.5", 7.5, "a wolf"),
        ("a-blue-ball-5", 5.0, "a wolf"),
        ("a-blue-ball-7.5", 7.5, "a wolf"),
        ("x", 7.5, "q"),
    ]


def test_a_table_is_a_manifest(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('video,prompt,steps,name\na.mp4,"red, round",3,\na.mp4,blue,,b\nc.mp4,x,,\n')
    jobs = load(path, model="demo").jobs
    assert [(j.name, j.settings.prompt, j.settings.steps, j.where) for j in jobs] == [
        ("a/red-round", "red, round", 3, f"{path}:2"),
        ("a/b", "blue", 25, f"{path}:3"),
        ("c/x", "x", 25, f"{path}:4"),
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid_by_the_schema_and_by_loading(example):
    manifest_model().model_validate(yaml.safe_load(example.read_text()))
    assert load(example).jobs


def test_the_schema_takes_shorthand_and_refuses_what_loading_refuses():
    model = manifest_model()
    model.model_validate(yaml.safe_load(SHORT))
    for old, new in [("video", "vdeo"), ("5, 7.5", "5, many"), ("name: x, ", ""), ("1", "2")]:
        with pytest.raises(ValidationError):
            model.model_validate(yaml.safe_load(SHORT.replace(old, new, 1)))
    assert manifest_schema()["additionalProperties"] is False
