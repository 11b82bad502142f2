"""Format an Estimate for people: everything as tables, or three lines."""

from __future__ import annotations

from clipdist.estimate.estimate import GB, Estimate
from clipdist.estimate.memory import OPTIMIZER, OVERHEAD, PARTS, STATE, TEACHER
from clipdist.objectives.describe import describe


def summary(found: Estimate) -> str:
    """Return three lines."""
    counts = found.model.counts
    lines = [
        f"plan  {found.config.model.name}, {counts['all'] / 1e6:.1f} M parameters, {found.precision} on"
        f" {_ranks(found)}, ZeRO {found.layout.stage}: about {found.total / GB:.2f} GB of memory a rank,"
        f" {_room(found)}",
        f"      {_length(found)}; {_gb(sum(found.wire.values()))} sent by a rank and step",
        f"      {_time(found)}; checkpoints of {_gb(found.checkpoint_bytes)}, {_disk(found)}",
    ]
    return "\n".join(lines)


def full_table(found: Estimate) -> str:
    """Return everything, one column per ZeRO stage."""
    parts = (_parameters, _memory, _host, _wire, _run, _checkpoints)
    return "\n\n".join(part(found) for part in parts)


def _parameters(found: Estimate) -> str:
    counts, sizes = found.model.counts, found.sizes
    objectives = "".join(f"\n{describe(objective)}" for objective in found.model.objectives if found.model.viewed)
    parts = ", ".join(f"{name} {_millions(counts[name])}" for name in ("image", "text", "heads") if counts[name])
    return (
        f"{found.config.run.dir}: {found.config.model.name}, {found.precision}, {_ranks(found)}\n"
        f"parameters  {_millions(counts['all'])} ({parts}); trained {_millions(sizes.trained)},"
        f" locked {_millions(sizes.locked)}{objectives}"
    )


def _memory(found: Estimate) -> str:
    label = {OVERHEAD: f"{OVERHEAD} (assumed)"}
    if found.layout.ema:
        label[OPTIMIZER] = f"{OPTIMIZER}, average of weights"
    stages = [*found.stages.values()]
    parts = [part for part in PARTS if part not in (TEACHER, STATE) or any(memory.parts[part] for memory in stages)]
    rows = [("memory of a rank, GB", [f"ZeRO {n}{'*' if n == found.layout.stage else ''}" for n in found.stages])]
    rows += [(f"  {label.get(part, part)}", [f"{m.parts[part] / GB:.2f}" for m in stages]) for part in parts]
    rows.append(("  in all", [f"{memory.total / GB:.2f}" for memory in stages]))
    rows.append(("  fullest moment", [memory.moment for memory in stages]))
    lines = ["".join([f"{name:32}", *(f"{cell:>17}" for cell in cells)]) for name, cells in rows]
    about = "measured with shapes alone" if found.activations.measured_on == "meta" else "from two small runs"
    lines.append(f"  activations of {found.layout.micro} {found.rows}: {about}; {_room(found)}")
    return "\n".join(lines)


def _host(found: Estimate) -> str:
    rows = [f"  {name:40}{size / GB:>8.2f}" for name, size in found.host.items()]
    return "\n".join(["memory of the host for a rank, GB", *rows])


def _wire(found: Estimate) -> str:
    if not found.wire:
        return "bytes on the wire: none, there is one rank"
    rows = [f"  {name:44}{size / 1e6:>10.1f}" for name, size in found.wire.items()]
    rows.append(f"  {'in all':44}{sum(found.wire.values()) / 1e6:>10.1f}")
    return "\n".join(["sent by a rank and step, MB", *rows])


def _run(found: Estimate) -> str:
    train, layout = found.config.train, found.layout
    return (
        f"global batch  {train.global_batch} {found.rows}, {layout.share} a rank in {layout.pieces} forward passes"
        f" of {layout.micro}\nlength        {_length(found)}\ntime          {_time(found)}"
    )


def _checkpoints(found: Estimate) -> str:
    train = found.config.train
    every = f"every {found.save_every} steps" if found.save_every else "once an epoch"
    minutes = f", and after {train.save_minutes:g} minutes without one" if train.save_minutes else ""
    return f"checkpoints   {_gb(found.checkpoint_bytes)} each, {every}{minutes}; {_disk(found)}"


def _disk(found: Estimate) -> str:
    kept = found.checkpoints_kept
    if kept is None:
        return "disk not known (train.keep_every, and no number of steps)"
    return f"{_gb(kept * found.checkpoint_bytes)} of disk for {kept} of them"


def _ranks(found: Estimate) -> str:
    nodes = found.config.launch.nodes
    return f"{nodes} x {found.world // nodes} = {found.world} {found.device} ranks"


def _room(found: Estimate) -> str:
    if found.limit is None:
        return "memory of the device not known (launch.device_gb): nothing is refused"
    return f"of {found.limit / GB:.1f} GB ({found.limit_source})"


def _length(found: Estimate) -> str:
    if found.steps is None:
        return f"{found.config.train.epochs} epochs; steps not known without the data"
    epochs = f", {found.epochs:.2f} epochs" if found.epochs else ""
    return f"{found.steps} steps, {found.samples} samples{epochs}"


def _time(found: Estimate) -> str:
    if found.seconds is None:
        why = "rate not known (launch.samples_per_s)" if not found.rate else "length not known"
        return f"wall time not known: {why}"
    hours, minutes = divmod(round(found.seconds / 60), 60)
    return f"{hours} h {minutes:02d} min of training at {found.rate:g} samples/s ({found.rate_source})"


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"


def _gb(size: float) -> str:
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"
