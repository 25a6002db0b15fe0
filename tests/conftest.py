"""What several test files share: a tiny random model, and one thread to compute in."""

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernel is tested in its interpreter; diffusers imports Triton, which reads this then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny_model import tiny_pipeline, tiny_unet

from tokenflow_batch.config import Runtime
from tokenflow_batch.models import resolve

# No deadline: a busy machine is no defect. The same examples every time.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # small tensors: threads would only wait for each other


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The tiny model as a folder that diffusers has saved; read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def unet():
    """One tiny UNet for all; a test that changes it must put it back."""
    return tiny_unet()


@pytest.fixture(scope="session")
def compute():
    return resolve(Runtime(device="cpu", dtype="fp32", threads=1))
