"""Keyframe and propagation passes with the settings that a test doesn't care about."""

from tokenflow_batch.tokenflow.passes import KeyframePass
from tokenflow_batch.tokenflow.propagation import PropagationPass

K = 3
"""Keyframes."""


def keyframe_pass(**changes):
    settings = {
        "branches": 3,
        "inject_qk": False,
        "inject_conv": False,
        "stored_conv_KChw": None,
        "attention": "eager",
        **changes,
    }
    settings.setdefault("keep_tokens", settings["branches"] == 3)
    return KeyframePass(**settings)


def propagation_pass(joint, neighbours, **changes):
    settings = {
        "branches": joint.branches,
        "inject_conv": joint.inject_conv,
        "stored_conv_NChw": None,
        "stored_index": None,
        "matching": "torch",
        **changes,
    }
    return PropagationPass(joint, neighbours, **settings)
