"""The manifest that `init` writes: what one has to say, and comments on the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tokenflow_batch.errors import ManifestError
from tokenflow_batch.files import replacing
from tokenflow_batch.manifest import load
from tokenflow_batch.manifest_rows import file_safe

_TEXT = """\
# Every key is in docs/manifest.md and `tokenflow-batch schema`.
version: 1
model: {model}  # hub id, folder, single .safetensors, or demo
output: outputs/  # relative to this file, as all paths

defaults:
  preset: balanced  # fast | balanced | quality | official
  guidance_scale: 7.5
  # resolution: [512, 512]  # width, height; the source's size otherwise
  # source_prompt: "a woman running"  # what the videos show; or in a .txt beside each

clips:
  - video: {video}  # a file, a glob or a folder
    edits:
{edits}
"""

_GLOB = frozenset("*?[")


def write_starter(path: Path, videos: Path, prompts: Sequence[str], model: str) -> int:
    """Write a manifest of some videos and edits, to be run or to be changed.

    Args:
        path: where; nothing may be there.
        videos: a file, a glob or a folder.
        prompts: one edit each, named after its words.
        model: as in a manifest.

    Returns:
        How many jobs it has.

    Raises:
        ManifestError: there is such a file already, or the manifest would be a wrong one (no such
            video, for example); nothing is written then.
    """
    if path.exists():
        raise ManifestError(f"{path}: exists already", hint="name another file with --manifest")
    if not videos.exists() and not _GLOB & set(str(videos)):
        raise ManifestError(f"{videos}: no such video or folder")
    if not all(prompt.strip() for prompt in prompts):
        raise ManifestError("a prompt is empty", hint="say what a video shall show")
    video = str(videos) if videos.is_absolute() else os.path.relpath(videos, path.parent)
    names: list[str] = []
    for prompt in prompts:
        plain = file_safe(prompt) or "edit"
        name, twins = plain, 2
        while name in names:
            name, twins = f"{plain}-{twins}", twins + 1
        names.append(name)
    edits = (
        f"      - {{name: {_quoted(name)}, prompt: {_quoted(prompt)}}}"
        for name, prompt in zip(names, prompts, strict=True)
    )
    text = _TEXT.format(model=_quoted(model), video=_quoted(video), edits="\n".join(edits))
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        try:
            return len(load(temporary).jobs)
        except ManifestError as error:
            raise ManifestError(
                error.message.replace(str(temporary), f"{path}, as it would be"), hint=error.hint
            ) from None


def _quoted(text: str) -> str:
    """As YAML, whatever is in it: JSON strings are YAML."""
    return json.dumps(text, ensure_ascii=False)
