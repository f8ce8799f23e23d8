"""`python -m weft` is the `weft` command, for launchers that start a module (torchrun, srun)."""

from weft.launch.cli import main

main()
