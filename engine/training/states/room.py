"""The room on a disk that the files of a run take, estimated before its first step."""

from dataclasses import dataclass
from pathlib import Path

from ...disk.writing import free_bytes, in_bytes, largest_file
from ..options import Checkpointing

BYTES_PER_PARAMETER = 4  # adapters are saved in float32
MOMENTS = 2
"""Float32 copies that AdamW keeps in a state; others keep fewer."""
BEING_WRITTEN = 1
"""A checkpoint that is whole before an older one goes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoomNeeded:
    """Bytes of the files that lie on the disk at once."""

    adapter: int
    state: int
    """Of one state; 0 where none is saved."""
    shadows: int
    """Of the file of EMA shadows; 0 without."""
    checkpoints: int
    """How many are still to come and kept."""

    @property
    def total(self) -> int:
        """Of the checkpoints, the finished adapter with its state, and the shadows."""
        return (self.checkpoints + 1) * (self.adapter + self.state) + self.shadows

    @property
    def largest(self) -> int:
        """Of one file."""
        return max(self.adapter, self.state, self.shadows)


def room_needed(
    parameters: int,
    checkpointing: Checkpointing,
    steps: int,
    shadows: int,
    filed_parameters: int | None = None,
) -> RoomNeeded:
    """`parameters`: trained numbers; `steps`: those still to do; `shadows`: averages kept;
    `filed_parameters`: numbers of an adapter file, where they are not the trained ones."""
    trained = BYTES_PER_PARAMETER * parameters
    adapter = trained if filed_parameters is None else BYTES_PER_PARAMETER * filed_parameters
    checkpoints = len(checkpointing.saving_steps(steps))
    if checkpointing.save_last_n:
        checkpoints = min(checkpoints, checkpointing.save_last_n + BEING_WRITTEN)
    kept = shadows if checkpointing.ema_shadows else 0
    return RoomNeeded(
        adapter=adapter,
        state=trained * (1 + MOMENTS + kept) if checkpointing.save_state else 0,
        shadows=adapter * kept,
        checkpoints=checkpoints,
    )


def tight(needed: RoomNeeded, folder: Path) -> str:
    """The warning where the files of a run will not all fit in `folder`; "" where they will."""
    free, limit = free_bytes(folder), largest_file()
    if limit is not None and needed.largest > limit:
        return (
            f"not every file of this run will be saved: the largest takes about "
            f"{in_bytes(needed.largest)}, and a file may have {in_bytes(limit)} here"
        )
    if free is None or needed.total <= free:
        return ""
    return (
        f"the files of this run may not fit: they take up to {in_bytes(needed.total)}, and "
        f"{in_bytes(free)} are free in {folder}; a checkpoint that finds no room is left out: free "
        "some space, or set save_last_n, or raise save_every_n_steps"
    )


def refuse_without_room(parameters: int, folder: Path) -> None:
    """ValueError where not even the finished adapter fits in `folder`."""
    adapter = BYTES_PER_PARAMETER * parameters
    limits = [limit for limit in (free_bytes(folder), largest_file()) if limit is not None]
    if adapter > min(limits, default=adapter):
        raise ValueError(
            f"the finished LoRA takes {in_bytes(adapter)}, and there is room for "
            f"{in_bytes(min(limits))} in {folder}: free some space, or start ComfyUI with another "
            "--output-directory"
        )
