"""Prints the comparison as tables in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..verification import Verification
from .results import Comparison

MB = 1e6


def print_report(comparison: Comparison, console: Console) -> None:
    console.print(loss_table(comparison), leak_table(comparison), summary_table(comparison), sep="\n\n")
    for warning in comparison.crowded():
        console.print(f"[yellow]warning:[/yellow] {warning}")


def loss_table(comparison: Comparison) -> Table:
    """Makes the table of the losses at every step."""
    table = Table(title="Loss at every step", title_justify="left")
    for heading in ("step", "real tokens", "pads", "padded", "padding-free", "difference"):
        table.add_column(heading, justify="right")
    padded, padding_free = comparison.padded, comparison.padding_free
    rows = zip(padded.real_tokens, padded.row_tokens, padded.losses, padding_free.losses, comparison.loss_differences)
    for step, (real, row, loss, other_loss, difference) in enumerate(rows, 1):
        table.add_row(
            str(step),
            f"{real:,}",
            f"{row - real:,}",
            f"{loss:.6f}",
            f"{other_loss:.6f}",
            f"{difference:.1e}",
        )
    return table


def leak_table(comparison: Comparison) -> Table:
    """Makes the table of what one example does to another in the same packed row."""
    before, after = comparison.padded.probe, comparison.padding_free.probe
    table = Table(title="Leak probe on a packed row: examples A and B", title_justify="left")
    table.add_column("")
    table.add_column("before apply(model)", justify="right")
    table.add_column("after", justify="right")
    table.add_row("change of B's logits when A changes", f"{before.logit_change:.3g}", f"{after.logit_change:.3g}")
    table.add_row("gradient of B's loss at A", f"{before.leaked_gradient:.3g}", f"{after.leaked_gradient:.3g}")
    table.add_row("packed against alone, relative", f"{before.alone_error:.2g}", f"{after.alone_error:.2g}")
    table.add_row("first module that leaks", before.first_leak or "none", after.first_leak or "none")
    table.add_row("examples are kept apart", verdict(before), verdict(after))
    return table


def verdict(probe: Verification) -> str:
    return "[green]yes[/green]" if probe.ok else "[red]no[/red]"


def summary_table(comparison: Comparison) -> Table:
    """Makes the table of speed, padding, memory and loss of both runs."""
    padded, padding_free, settings = comparison.padded, comparison.padding_free, comparison.settings
    table = Table(
        title=f"{settings['model']}: {settings['steps']} steps, batch size {settings['batch_size']}, "
        f"transformers {settings['transformers']}, float32, {settings['threads']} CPU threads",
        title_justify="left",
        caption="Real tokens are not pads; speed leaves out the first step. Peak memory is the whole process; "
        "growth is what training added to the loaded model, gradients and optimizer state (alike in both) "
        "included.",
        caption_justify="left",
    )
    for heading in ("", "padded", "padding-free", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(label: str, first: float, second: float, style: str, unit: float = 1, ratio: str = "") -> None:
        if not ratio and first and second:
            ratio = f"{second / first:.2f}x"
        table.add_row(label, format(first / unit, style), format(second / unit, style), ratio)

    speeds = padded.tokens_per_second, padding_free.tokens_per_second
    row("real tokens per second", *speeds, ",.0f", ratio="unreliable" if comparison.crowded() else "")
    row("padding share", padded.padding_share, padding_free.padding_share, ".1%")
    row("peak memory, MB", padded.peak_bytes, padding_free.peak_bytes, ",.0f", MB)
    row("growth over the loaded model, MB", padded.growth_bytes, padding_free.growth_bytes, ",.0f", MB)
    table.add_row("loss at the last step", f"{padded.losses[-1]:.6f}", f"{padding_free.losses[-1]:.6f}", "")
    table.add_row("largest loss difference", "", f"{max(comparison.loss_differences):.1e}", "")
    return table
