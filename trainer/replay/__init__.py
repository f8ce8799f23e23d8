"""A step of a run, done again in one process and looked at. Read `replay.py` first."""
