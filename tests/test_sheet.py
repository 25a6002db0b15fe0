"""Contact sheets: what they show is where their labels say."""

import numpy as np
import pytest
from PIL import Image

from tokenflow_batch.sheet import contact_sheet, sample_times


def red(count):
    return [np.full((40, 80, 3), (255, 0, 0), np.uint8)] * count


@pytest.mark.parametrize("label", ["source", "a marble sculpture of a woman running"])
def test_no_label_reaches_into_the_frames(tmp_path, label):
    """Frames stand at the right, whole, and nothing is written over or under them."""
    contact_sheet(tmp_path / "s.png", "title", ["0", "1"], {label: red(2), "b": red(2)})
    with Image.open(tmp_path / "s.png") as image:
        sheet = np.asarray(image).astype(int)
    is_red = (sheet[..., 0] > 250) & (sheet[..., 1] < 5) & (sheet[..., 2] < 5)
    assert is_red.sum() == 4 * 160 * 80
    left = is_red.any(axis=0).argmax()
    written = (sheet[60:] < 200).all(axis=2).any(axis=0)
    assert written[:left].any()
    assert not written[left - 4 :].any()


def test_times_are_first_to_last_without_repeats():
    assert sample_times(100, 3) == [0, 50, 99]
    assert sample_times(2, 8) == [0, 1]
