"""What the server of `ranks.py` imports before it forks: all that a rank would otherwise import for itself, four seconds of it."""

import gc

import weft.models.blt.task
import weft.models.transformer.task
import weft.trainer.engines.torch_engine
import weft.trainer.train  # noqa: F401

# A rank collects its own garbage, not what the imports left.
gc.collect()
gc.freeze()
