"""The schema of the studies: one dataclass each, which `configs/experiment/<name>.yaml` chooses.

`_target_` is the study's function `(config, folder, progress) -> summary`; `uses` names the groups
of the training loop that it reads besides (`task`, …), and every other one is refused.
"""

from __future__ import annotations

STUDIES: dict[str, type] = {}
