"""Distil a student on its own samples: python train.py fit --config configs/quickstart.yaml

Any setting can be overridden behind the config (``--model.weighting LinearDecay --model.weighting.gamma 0.3``), further
``--config`` files are merged over the first, and ``python train.py fit --help`` lists everything.
``python train.py compare --help``: finished runs and saved rollouts side by side.
"""

from __future__ import annotations

from callbacks import default_callbacks
from lit_opd.cli.command import main

if __name__ == "__main__":
    main(default_callbacks)
