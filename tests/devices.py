"""Where the tests compute: on the CPU, or where `TEST_DEVICE` says (`TEST_DEVICE=cuda`)."""

import os

from tokenflow_batch.tokenflow.correspondence import faiss_available

DEVICE = os.environ.get("TEST_DEVICE", "cpu")


def place_of(backend):
    """Where a backend of the correspondence search is tested.

    Triton's kernel runs on a GPU where there is one, else on the CPU in its interpreter.
    """
    import torch

    if backend == "triton":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if backend == "faiss" and not faiss_available(DEVICE):
        return "cpu"
    return DEVICE
