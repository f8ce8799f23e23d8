"""The selective scan S6 of Mamba: `op` has the public function, `reference` the definition."""

from .chunks import chunk_decay, combine_states
from .op import selective_scan
from .segments import selective_scan_segment
from .step import selective_scan_step

__all__ = [
    "chunk_decay",
    "combine_states",
    "selective_scan",
    "selective_scan_segment",
    "selective_scan_step",
]
