"""What is wrong with a machine, or with the nodes of a job, before a run finds out. Start at `examination.py`."""
