"""Measurements as ratios: Weft and what it is compared with, in one process, in turns."""
