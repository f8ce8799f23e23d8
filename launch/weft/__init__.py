"""Weft: pretraining that decides, from the data itself, where its compute goes."""

__version__ = "0.1.0"
