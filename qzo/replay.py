"""Rebuild a run's tuned tensors from its journal and the base model alone, and compare them with its snapshots."""

from pathlib import Path

from qzo.checkpoint import newest_snapshot, state_hash
from qzo.errors import RunFailed
from qzo.model.files import Folder
from qzo.model.load import pick_device
from qzo.progress import Progress
from qzo.rebuild import tuned_state
from qzo.run import read_run, steps_to


def replay_run(run: str, to: int | None = None, verify: bool = False, device: str = "auto") -> list[str]:
    """Replay the first `to` steps (default: all) without snapshots; returns lines that say what came out.

    verify: RunFailed unless the state equals, bit for bit, that of the newest snapshot up to there.
    """
    header, records = read_run(run)
    steps = steps_to(run, records, to)
    folder, where = Folder(header["base"]["model"]), pick_device(device)
    found = newest_snapshot(Path(run), at_most=steps) if verify else None
    if verify and found is None:
        raise RunFailed(run, "no snapshot to compare with", "one up to the replayed step", "Replay without --verify.")
    with Progress("replay", steps) as progress:
        _, state = tuned_state(run, folder, where, steps, False, lambda done, total: progress.update(done))
    lines = [f"{run}: {steps} of {len(records)} steps replayed on {where.type}, state SHA-256 {state_hash(state)}"]
    if found:
        at, tensors, _ = found
        if at != steps:
            state = tuned_state(run, folder, where, at, False)[1]
        if state_hash(state) != state_hash(tensors):
            raise RunFailed(f"{run}, step {at}", "the replayed state differs from the snapshot",
                            header["noise"]["bit_exact"] + ": equal bytes", "Another device computes Gaussian noise with other last bits.")  # fmt: skip
        lines.append(f"equal to the snapshot of step {at}")
    return lines
