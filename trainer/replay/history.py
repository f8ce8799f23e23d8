"""What a run folder says about a step: its samples, the ranks that shared them, its rate, what was measured then.

Records are the truth where they are; the configuration fills in, and a contradiction between the two is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models.errors import CheckpointError, ConfigError
from ..attempts import read_attempts
from ..checkpoint.layout import step_folder
from ..checkpoint.reading import CheckpointInfo, list_checkpoints, verify_checkpoint
from ..configuration.schema import TrainingConfig
from ..data.loader import next_start
from ..metrics.records import read_metrics
from ..optimization.schedule import learning_rate

__all__ = ["RunHistory", "StepPlan"]


@dataclass(frozen=True)
class StepPlan:
    """How a step of the run was made up.

    Args:
        first_sample, rows: its samples in the order of the run, over all ranks.
        ranks: that see different data; each has a contiguous share.
        micro_rows: samples of one micro-batch of a rank.
        record: what was logged of it, None where nothing was.
    """

    step: int
    first_sample: int
    rows: int
    ranks: int
    micro_rows: int
    learning_rate: float
    record: dict[str, Any] | None


class RunHistory:
    """Records, attempts and checkpoints of a run; only reads.

    Args:
        ranks: the world size where the folder does not say it, or says it wrong; None goes by the folder.

    Attributes:
        notes: what a reader of the replay has to know, in the order it was found out.
    """

    def __init__(self, run_dir: Path, config: TrainingConfig, ranks: int | None = None) -> None:
        self.run_dir, self.config = run_dir, config
        self.notes: list[str] = []
        self.records = {r["step"]: r for r in read_metrics(run_dir) if "first_sample" in r}
        self._attempts = [a for a in read_attempts(run_dir) if a.is_open]
        self._checkpoints = list_checkpoints(run_dir)
        self._ranks = ranks

    @property
    def last_recorded(self) -> int:
        """0 where no step was."""
        return max(self.records, default=0)

    def check_step(self, step: int) -> None:
        """Raises: ConfigError: the run has no such step."""
        if step < 1:
            raise ConfigError(f"there is no step {step}: the first update of a run is step 1")
        last = max(self.config.train.steps, self.last_recorded)
        if step > last:
            seen = f"; the last recorded one is {self.last_recorded}" if self.records else ""
            raise ConfigError(f"there is no step {step}: {self.run_dir} has {last} steps{seen}")

    def find_checkpoint(self, step: int) -> CheckpointInfo | None:
        """The newest sound checkpoint from before a step; damaged ones are noted."""
        for info in reversed([c for c in self._checkpoints if c.step < step]):
            problem = info.problem or next(iter(verify_checkpoint(info.path)), None)
            if problem is None:
                return info
            self.note(f"checkpoint {info.path.name} is damaged ({problem}); the one before is used")
        return None

    def checkpoint_right_before(self, step: int) -> CheckpointInfo:
        """The checkpoint a step went out from.

        Raises:
            CheckpointError: there is none, or it is damaged; the nearest step that has one is named.
        """
        found = self.find_checkpoint(step)
        if found is not None and found.step == step - 1:
            return found
        sound = [c.step + 1 for c in self._checkpoints if c.problem is None]
        nearest = sorted(sound, key=lambda s: (abs(s - step), s))[:1]
        hint = f"the nearest is --step {nearest[0]}" if nearest else "this run has none"
        raise CheckpointError(
            f"--stream replays a step right after a checkpoint, and {step_folder(self.run_dir, step - 1)} "
            f"is not a sound one; {hint}, or leave out --stream"
        )

    def plan(self, step: int, next_sample: int) -> StepPlan:
        """How a step was made up.

        Args:
            next_sample: the first not yet seen after the step before, for a step that was not recorded.

        Raises:
            ConfigError: the samples do not divide over the ranks.
        """
        record = self.records.get(step)
        rows = self.config.batch_rows
        first = next_start(next_sample, rows, self._left_out())
        if record is not None:
            first = int(record["first_sample"])
            rows = int(record.get("last_sample", first + rows - 1)) - first + 1
            self._note_contradictions(step, rows)
        # Ranks that share rows have one part of the step among them.
        ranks = max(1, self._world_size(step) // self.config.parallel.sequence_ranks)
        return StepPlan(
            step, first, rows, ranks, self._micro_rows(rows, ranks), self._rate(step), record
        )

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _left_out(self) -> list[tuple[int, int]]:
        """Samples that rollbacks took out of the order, as far as a checkpoint knows of them, and those named by hand."""
        states = [c.manifest.state["train"] for c in self._checkpoints if c.manifest]
        ranges = states[-1].get("left_out", []) if states else []
        return [*((first, stop) for first, stop in ranges), *self.config.train.leave_out]

    def _world_size(self, step: int) -> int:
        if self._ranks is not None:
            return self._ranks
        opened = [a for a in self._attempts if a.first_step < step]
        if opened:
            return opened[-1].world_size
        later = [c for c in self._checkpoints if c.manifest and c.step >= step]
        saved = later[:1] or [c for c in self._checkpoints if c.manifest][-1:]
        if saved and saved[0].manifest:
            return saved[0].manifest.world_size
        self.note("nothing says on how many ranks this run was; one is taken (set it with --ranks)")
        return 1

    def _micro_rows(self, rows: int, ranks: int) -> int:
        share, rest = divmod(rows, ranks)
        micro = self.config.train.micro_batch_tokens
        micro_rows = micro // self.config.data.sequence_length if micro else share
        if rest or not micro_rows or share % micro_rows:
            raise ConfigError(
                f"{rows} samples a step do not divide over {ranks} ranks in micro-batches of {micro_rows or micro}; "
                "give the number of ranks the run had with --ranks, or its train.micro_batch_tokens"
            )
        return micro_rows

    def _rate(self, step: int) -> float:
        config = self.config
        rate = learning_rate(
            config.schedule,
            config.optimizer.lr,
            step,
            config.train.batch_tokens,
            config.train.steps,
        )
        recorded = self.records.get(step, {}).get("lr")
        if recorded is None or recorded == rate:
            return rate
        self.note(
            "the recorded learning rates are not those of config.yaml, which was changed since; the recorded ones are used"
        )
        return float(recorded)

    def _note_contradictions(self, step: int, rows: int) -> None:
        if rows != self.config.batch_rows:
            self.note(
                f"step {step} had {rows} samples, but config.yaml says {self.config.batch_rows}: "
                "it was changed since; the recorded number is used"
            )
