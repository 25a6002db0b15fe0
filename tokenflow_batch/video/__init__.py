"""Video files in and out, exact to the tick: facts, frames, segments, and the joined result."""

from tokenflow_batch.video.cuts import find_cuts
from tokenflow_batch.video.facts import AudioFacts, ColourTags, VideoFacts
from tokenflow_batch.video.reader import probe, read_frames
from tokenflow_batch.video.remux import join
from tokenflow_batch.video.writer import Encoding, write_segment

__all__ = [
    "AudioFacts",
    "ColourTags",
    "Encoding",
    "VideoFacts",
    "find_cuts",
    "join",
    "probe",
    "read_frames",
    "write_segment",
]
