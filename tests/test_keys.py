"""What a stage's key depends on, and what it doesn't."""

from dataclasses import replace
from pathlib import Path

import pytest

from tokenflow_batch import keys
from tokenflow_batch.config import Job, Settings
from tokenflow_batch.files import digest_json
from tokenflow_batch.keys import Identity, stage_keys
from tokenflow_batch.stage_names import STAGES

IDENTITY = Identity(video="v" * 64, vae="a" * 64, denoiser="d" * 64)
SETTINGS = Settings(source_prompt="a wolf", prompt="a robotic wolf")
JOB = Job(
    clip="wolf",
    edit="robot",
    video=Path("wolf.mp4"),
    model="demo",
    base_config=None,
    settings=SETTINGS,
    stored_conv_steps=20,
    where="manifest.yaml:9",
)


def keys_of(job=JOB, identity=IDENTITY, dtype="auto", **settings):
    changed = replace(job, settings=job.settings.model_copy(update=settings))
    return {stage: key.key for stage, key in stage_keys(changed, identity, dtype).items()}


def changed(**options):
    before, after = keys_of(), keys_of(**options)
    return [stage for stage in STAGES if before[stage] != after[stage]]


# Recorded: whoever changes one of these makes every user compute everything again.
LITERAL = {
    "encode": "79ca856a10d75d7cd4dd26fc",
    "invert": "41a471d958428fae6b822a8f",
    "match": "87a70d22e3833b7a375a2441",
    "edit": "496094f9d701783c635d9a9d",
    "render": "1bd9dcf81a71f4f74a60daf6",
    "report": "831e8d1a377e701a2b125bd1",
}


def test_the_keys_of_a_job_are_these_for_ever():
    assert keys_of() == LITERAL


def test_a_key_is_the_digest_of_what_is_written_beside_the_data():
    for stage, key in stage_keys(JOB, IDENTITY, "auto").items():
        assert key.stage == stage == key.described["stage"]
        assert key.key == digest_json(key.described)[:24]
        assert key.described["version"] == keys.VERSIONS[stage]


FROM = {stage: list(STAGES[i:]) for i, stage in enumerate(STAGES)}
EFFECTS = [
    ({"resolution": (512, 512)}, FROM["encode"]),
    ({"fit": "pad"}, FROM["encode"]),
    ({"chunk_frames": 32}, FROM["encode"]),
    ({"vae_batch": 2}, FROM["encode"]),
    ({"dtype": "fp16"}, FROM["encode"]),
    ({"identity": replace(IDENTITY, video="w" * 64)}, FROM["encode"]),
    ({"identity": replace(IDENTITY, vae="w" * 64)}, FROM["encode"]),
    ({"identity": replace(IDENTITY, denoiser="w" * 64)}, FROM["invert"]),
    ({"source_prompt": "a dog"}, FROM["invert"]),
    ({"steps": 26}, FROM["invert"]),
    ({"inversion_steps": 50}, FROM["invert"]),
    ({"inversion_iterations": 2}, FROM["invert"]),
    ({"mode": "official"}, FROM["invert"]),
    ({"unet_batch": 4}, FROM["invert"]),
    ({"keyframe_seed": 1}, FROM["match"]),
    ({"segment_length": 4}, FROM["match"]),
    ({"cuts": (9,)}, FROM["match"]),
    ({"prompt": "a fox"}, FROM["edit"]),
    ({"negative_prompt": "blurry"}, FROM["edit"]),
    ({"guidance_scale": 7.0}, FROM["edit"]),
    ({"guidance_interval": (0.0, 0.8)}, FROM["edit"]),
    ({"guidance_focus": 0.8}, FROM["edit"]),
    ({"technique": "sdedit"}, FROM["edit"]),
    ({"sampler": "dpmsolver++"}, FROM["edit"]),
    ({"attn_t": 0.4}, FROM["edit"]),
    ({"f_t": 0.7}, FROM["edit"]),
    ({"conv_site": "up_blocks.1.resnets.2"}, FROM["match"]),
    ({"conv_features": "recompute"}, FROM["edit"]),
    ({"conv_features": "store8"}, FROM["edit"]),
    ({"window_segments": 8}, FROM["edit"]),
    ({"window_overlap": 1}, FROM["edit"]),
    ({"anchors": 2}, FROM["edit"]),
    ({"crf": 20}, FROM["render"]),
    ({"audio": False}, FROM["render"]),
    ({"restore_size": True}, FROM["render"]),
    # What is stored for other edits of the clip is no part of this one.
    ({"job": replace(JOB, stored_conv_steps=25)}, ["match"]),
    ({"job": replace(JOB, stored_conv8_steps=20)}, ["match"]),
    # Nothing at all: names, places, a preset's name, what the technique doesn't use.
    ({"preset": "quality"}, []),
    ({"strength": 0.5}, []),
    ({"job": replace(JOB, clip="other", edit="name", where="elsewhere:1")}, []),
    ({"job": replace(JOB, video=Path("/moved.mp4"), model="./copy", base_config="x")}, []),
]


@pytest.mark.parametrize(("options", "stages"), EFFECTS, ids=lambda v: str(v)[:50])
def test_a_setting_changes_the_keys_of_what_depends_on_it_and_no_other(options, stages):
    assert changed(**options) == stages


def test_every_setting_is_in_the_table():
    told = {name for options, _ in EFFECTS for name in options}
    assert set(Settings.model_fields) <= told


def test_sdedit_depends_on_its_strength_and_not_on_pnp_s_thresholds():
    sdedit = {"technique": "sdedit"}
    base = keys_of(**sdedit)
    assert keys_of(**sdedit, attn_t=0.1, f_t=0.1) == base
    weaker = keys_of(**sdedit, strength=0.5)
    assert [s for s in STAGES if weaker[s] != base[s]] == FROM["edit"]


def test_official_mode_knows_no_focus():
    assert keys_of(mode="official", guidance_focus=0.8) == keys_of(mode="official")


def test_how_features_are_kept_matters_where_stored_features_are_injected():
    for other in ({"technique": "sdedit"}, {"mode": "official"}):
        assert keys_of(**other, conv_features="recompute") == keys_of(**other)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_s_new_version_redoes_it_and_what_follows(stage, monkeypatch):
    before = keys_of()
    monkeypatch.setattr(keys, "_source_keys", keys._source_keys.__wrapped__)  # remembers nothing
    monkeypatch.setattr(keys, "VERSIONS", {**keys.VERSIONS, stage: keys.VERSIONS[stage] + 1})
    after = keys_of()
    assert [s for s in STAGES if before[s] != after[s]] == FROM[stage]


def test_the_canonical_form_does_not_depend_on_order_and_tells_values_apart():
    assert digest_json({"a": 1, "b": [1, 2]}) == digest_json({"b": [1, 2], "a": 1})
    texts = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"a": [1]}, {"a": True}, {"b": 1}, {}]
    assert len({digest_json(t) for t in texts}) == len(texts)
    assert digest_json({"ü": "木"}) == digest_json({"\u00fc": "\u6728"})
    literal = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert digest_json({"a": 1}) == literal
