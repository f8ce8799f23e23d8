"""The parts of `trainer/plan.py`: bytes on a rank, bytes between ranks, and layouts that fit. None imports torch."""
