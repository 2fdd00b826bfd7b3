"""`fedsgcg methods [NAME]`: the training methods and their costs, and the card of one of them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fedsgcg.common.console import Screen, add_output_options, steps_of
from fedsgcg.common.errors import fail
from fedsgcg.common.files import atomic
from fedsgcg.common.files.errors import disk_advice
from fedsgcg.common.settings.hints import nearest
from fedsgcg.common.settings.training import METHOD_NAMES

if TYPE_CHECKING:
    from fedsgcg.clients.methods.cards import Card
    from fedsgcg.deploy.study.costs import Cost, Costs

ABOUT = """\
The training methods (method=NAME), each with its idea and its cost against
`source`. `fedsgcg methods NAME` shows the card of one method: formula, what
leaves a hospital, where the defaults come from, settings, citation.
"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "methods",
        help="list the training methods, or show the card of one",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a method")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the cost of every method, or of NAME, on this machine; some minutes",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument(
        "-o", dest="output", type=Path, metavar="FILE", help="write the measured costs as YAML"
    )
    add_output_options(parser, events=True)
    parser.set_defaults(run=run_methods)


def run_methods(options: argparse.Namespace, console: Screen) -> int:
    """List the methods or show one card; with `--measure` measure the costs first."""
    from fedsgcg.clients.methods.cards import card_of, cards
    from fedsgcg.deploy.study.costs import published_costs

    name: str = options.name
    if name and name not in METHOD_NAMES:
        raise fail(
            "CFG-001",
            where="methods",
            found=repr(name),
            expected=" | ".join(METHOD_NAMES),
            action=nearest(name, METHOD_NAMES),
        )
    if options.output is not None and not options.measure:
        raise fail("CFG-001", where="-o", found="no --measure", expected="--measure -o FILE")
    costs = _measured(options, console) if options.measure else published_costs()
    shown = [card_of(name)] if name else cards()
    for card in shown:
        cost = costs.methods.get(card.name)
        console.event("method", card=asdict(card), cost=asdict(cost) if cost else None)
    if name:
        _show_card(shown[0], costs.methods.get(name), console)
    else:
        console.print(_table(shown, costs))
    console.print(_protocol(costs))
    return 0


def _measured(options: argparse.Namespace, console: Screen) -> Costs:
    from fedsgcg.deploy.environment import prepare_environment, quiet_flower
    from fedsgcg.deploy.study.costs import measure_costs

    prepare_environment()
    quiet_flower()
    names = (options.name,) if options.name else METHOD_NAMES
    with steps_of(console, "measuring") as step:
        costs = measure_costs(step, names, device=options.device)
    if options.output is not None:
        try:
            atomic.write_file(options.output, costs.to_yaml().encode())
        except OSError as error:
            raise fail(
                "CFG-043",
                where=str(options.output),
                found=str(error),
                expected="a writable file",
                action=disk_advice(error, "name a file in a writable folder"),
            ) from error
        console.print(f"costs: {options.output}")
    return costs


def _table(cards: list[Card], costs: Costs) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("method", style="bold", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("idea", overflow="fold")
    for card in cards:
        cost = costs.methods.get(card.name)
        figures = (f"{cost.step:.2f}", f"{cost.share:.3f}") if cost else ("–", "–")
        table.add_row(card.name, *figures, Text(card.idea))
    return table


def _show_card(card: Card, cost: Cost | None, console: Screen) -> None:
    parts = {
        "formula": card.formula,
        "leaves": card.leaves,
        "defaults": card.defaults,
        "settings": ", ".join(card.settings) or "none of its own",
        "cost": cost_text(cost),
        "source": card.source,
    }
    console.print(Text(f"{card.name}: {card.idea}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in parts.items():
        table.add_row(name, Text(text))
    console.print(table)


def cost_text(cost: Cost | None) -> str:
    """Return the cost of a method in one sentence."""
    if cost is None:
        return "not measured"
    return (
        f"a step takes {cost.step:.2f} times that of source ({cost.low:.2f} to {cost.high:.2f}); "
        f"a hospital sends {cost.bytes / 1e6:.2f} MB a round, {cost.share:.3f} times as much"
    )


def _protocol(costs: Costs) -> Text:
    text = f"step and bytes relative to source; {costs.protocol}. {costs.machine}, {costs.date}."
    return Text(text, style="dim")
