"""Distil a student on its own samples: python train.py fit --config configs/quickstart.yaml

Any setting can be overridden after the config (``--model.weighting LinearDecay --model.weighting.gamma 0.3``), further
``--config`` files are merged over the first, and ``python train.py fit --help`` lists everything. ``python train.py --help``: all
commands. Installed, the same command line is ``lit-opd``.
"""

from __future__ import annotations

from lit_opd.__main__ import main

if __name__ == "__main__":
    main()
