"""Shot cuts, by PySceneDetect's adaptive content detector."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

import cv2
import numpy as np
from numpy.typing import NDArray
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

_SIDE = 256
"""Longer side in pixels at which frames are compared: enough to tell shots apart, and fast."""

_SHORTEST = 3
"""Frames of the shortest shot. A false cut costs a keyframe more, a missed one smears two shots."""


def find_cuts(frames: Iterable[NDArray[np.uint8]], rate: Fraction) -> tuple[int, ...]:
    """The first frames of all shots but the first.

    Args:
        frames: the video's, (H, W, 3) uint8 RGB, in order; a few are held at a time.
        rate: frames per second, for the detector's clock; the result is in frames.

    Returns:
        Ascending frame indices, each above 0.
    """
    detector = AdaptiveDetector(min_scene_len=_SHORTEST)
    fps, found = float(rate), set[int]()
    for index, frame in enumerate(frames):
        scale = _SIDE / max(frame.shape[:2])
        if scale < 1:
            frame = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        cuts = detector.process_frame(FrameTimecode(index, fps), bgr)
        found.update(cut.frame_num for cut in cuts)
    return tuple(sorted(found - {0}))
