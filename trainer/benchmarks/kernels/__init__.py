"""Every op of `weft.kernels` against float64 and against its peers; `measure.py` says how, the rest is cases."""
