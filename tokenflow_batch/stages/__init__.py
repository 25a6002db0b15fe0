"""The six stages, in order."""

from __future__ import annotations

from tokenflow_batch.stage_names import StageName
from tokenflow_batch.stages.base import Stage
from tokenflow_batch.stages.edit import Edit
from tokenflow_batch.stages.encode import Encode
from tokenflow_batch.stages.invert import Invert
from tokenflow_batch.stages.match import Match
from tokenflow_batch.stages.render import Render
from tokenflow_batch.stages.report import Report

IMPLEMENTATIONS: dict[StageName, Stage] = {
    stage.name: stage for stage in (Encode(), Invert(), Match(), Edit(), Render(), Report())
}
