"""How a long run looks on terminals, in files, and when it is asked to be quiet; screens.py says how to renew it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from driver import Cli
from screens import Terminal, measured, same_as_kept

from obsprune.cli import console
from obsprune.cli.bars import clock
from obsprune.cli.console import Watch, show
from obsprune.cli.tables import prune_tables

BLOCKS = 8
LONG = (
    "evaluation on wikitext2 is left out: Salesforce/wikitext (test-00000-of-00001.parquet) is not in the Hugging Face "
)
NOTES = [
    "seqlen 8192 is more than the model's 4096; 4096 is used",
    f"{LONG}cache and cannot be downloaded (LocalEntryNotFoundError); give a local file instead of its name",
]
Use = Callable[[Terminal], Terminal]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Puts a terminal in the place of this process's own."""

    def put(terminal: Terminal) -> Terminal:
        monkeypatch.setattr(console, "err", terminal.console())
        return terminal

    return put


@dataclass
class Story:
    """A long run, as the library tells it, on a clock that is moved by hand."""

    quiet: bool = False
    now: float = 0.0

    def __post_init__(self) -> None:
        self.watch = Watch(self.quiet, clock=lambda: self.now)

    def moments(self) -> Iterator[str]:
        """Stops where a person might look."""
        with self.watch as watch:
            for note in [*NOTES, NOTES[0]]:
                watch.notice(note)
            watch.ahead(0.0, "pruning")
            self.stage("heldout, dense", BLOCKS, 33, until=3)
            yield "dense"
            self.steps(BLOCKS - 3, 33)
            watch.ahead(264.0, "2 more rounds")
            watch.stage("pruning", BLOCKS)
            for block in range(BLOCKS):
                watch.detail(f"model.layers.{block}.mlp.down_proj  error 0.0061, pass 2 of 5 over all of the sequences")
                self.now += 411
                if block == 5:
                    yield "pruning"
                found = f"worst error 0.0{250 + 9 * block} (v_proj), block error 0.0123, matched 0.00{45 + block}"
                watch.step(f"model.layers.{block}  410.9 s  {found}")
            watch.ahead(264.0, "more rounds")
            watch.line("round 1 of 3: held-out KL 0.0299, perplexity 7.674, agreement 0.912, 3288.1 s")
            self.stage("gradients and projections", BLOCKS, 600, until=2)
            yield "round"
            self.steps(BLOCKS - 2, 600)
            watch.line("round 2 of 3: held-out KL 0.0145, perplexity 7.630, agreement 0.916, step 0.3, rate 0.001, "
                       "0.01 % of the mask moved, 4801.0 s")  # fmt: skip
            yield "between"

    def stage(self, title: str, total: int, seconds: float, until: int) -> None:
        self.watch.stage(title, total)
        self.steps(until, seconds)

    def steps(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.now += seconds
            self.watch.step()

    def seen(self, terminal: Terminal) -> str:
        """All moments, one under the other."""
        shots = []
        for moment in self.moments():
            self.watch.bar.refresh()
            shots.append(f"--- {moment}\n{terminal.screen()}")
        show_end(self.watch)
        return "\n".join([*shots, f"--- end\n{terminal.screen()}"])


def show_end(watch: Watch) -> None:
    """What carry_out shows once a run is over."""
    rescue = "model.layers.3.mlp.down_proj: the factorisation needed damping 0.1 instead of 0.01"
    for table in [] if watch.quiet else prune_tables(report([rescue])):
        show(table)


def report(notes: list[str]) -> dict[str, Any]:
    told = {"perplexity": 7.674, "agreement": 0.912}
    first = {"round": 1, "best": False, "told": told, "heldout_kl": 0.0299, "seconds": 3288.1}
    second = first | {"round": 2, "best": True, "heldout_kl": 0.0145, "step": 0.3, "rate": 1e-3, "moved": 1e-4}
    dense = {"metric": "perplexity", "perplexity": 5.472, "sequences": 16, "seqlen": 4096}
    pair = {"dense": dense, "pruned": dense | {"perplexity": 6.012}, "paired": {"nll": {"p": 6e-5}}, "ratio": 1.099}
    return {
        "rounds": [first, second],
        "evaluation": {"heldout": pair},
        "sparsity": {"asked": 0.5, "pattern": "unstructured", "reached": 0.5, "weights": 6_476_005_376},
        "memory": {"host_bytes": 41_200_000_000, "device_bytes": 71_300_000_000},
        "matrices": [{}] * 224,
        "seconds": {"total": 13_001.0, "allocation": 0, "pruning": 3288.1, "rounds": 9602.0},
        "data": {"rounds": {"seen": 384}, "unit": "sequences"},
        "allocation": {"tried": {}},
        "coverage": [],
        "matching": [{"before": 0.0123, "after": 0.0048}],
        "warnings": notes,
    }


@pytest.mark.parametrize("columns", [80, 120])
def test_a_long_run_on_a_terminal(use: Use, columns: int) -> None:
    terminal = use(Terminal(columns))
    text = Story().seen(terminal)
    same_as_kept(f"terminal-{columns}", text)
    assert terminal.coloured and terminal.moved and max(map(len, text.splitlines())) <= columns


def test_a_terminal_without_colour(use: Use) -> None:
    terminal = use(Terminal(environment={"NO_COLOR": "1"}))
    same_as_kept("terminal-no-colour", Story().seen(terminal))
    assert not terminal.coloured and terminal.moved


def test_a_terminal_that_cannot_go_back(use: Use) -> None:
    terminal = use(Terminal(environment={"TERM": "dumb"}))
    same_as_kept("terminal-dumb", ended(Story(), terminal))
    assert not terminal.coloured and not terminal.moved


def test_a_file(use: Use) -> None:
    terminal = use(Terminal(is_terminal=False))
    text = ended(Story(), terminal)
    same_as_kept("file", text)
    assert "\x1b" not in terminal.written.getvalue()
    assert not [line for line in text.splitlines() if line != line.rstrip()]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_quiet_run_says_nothing(use: Use, is_terminal: bool) -> None:
    terminal = use(Terminal(is_terminal=is_terminal))
    ended(Story(quiet=True), terminal)
    assert terminal.written.getvalue() == ""


def ended(story: Story, terminal: Terminal) -> str:
    for _ in story.moments():
        pass
    show_end(story.watch)
    return terminal.screen()


def test_narrow_terminals_and_names_like_markup(use: Use) -> None:
    terminal = use(Terminal(40))
    with Watch(quiet=False, clock=lambda: 0.0) as watch:
        watch.stage("[red]gradients[/] and projections", 1000)
        watch.detail("model.[bold]layers[/].0 \x1b[31m")
        watch.ahead(0.0, "more")
        watch.bar.refresh()
        lines = terminal.screen().splitlines()
    assert len(lines) == 2 and all(len(line) <= 40 for line in lines)
    assert lines[0].startswith("[red]") and lines[1].startswith("model.[bold]layers[/].0")


@pytest.mark.parametrize(
    ("title", "then"), [("gradients and projections", "more rounds"), ("pruned alone", "further trials")]
)
def test_what_follows_is_readable_on_80_columns(use: Use, title: str, then: str) -> None:
    terminal, now = use(Terminal()), [0.0]
    with Watch(quiet=False, clock=lambda: now[0]) as watch:
        watch.ahead(264.0, then)
        watch.stage(title, 32)
        for _ in range(12):
            now[0] += 60.0
            watch.step()
        watch.bar.refresh()
        line = terminal.screen().rstrip()
    assert line.endswith(f"0:24:24 left, then {then}") and len(line) <= 80 and "━━━" in line


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (4e5, "111:06:40")]
)
def test_times(seconds: float, told: str) -> None:
    assert clock(seconds) == told


RUN = ("prune", "demo", "--nsamples", "4", "--eval", "heldout")


@pytest.mark.parametrize("name", ["real-terminal", "real-file"])
def test_a_real_run(cli: Cli, use: Use, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", float("inf"))
    terminal = use(Terminal(is_terminal=name == "real-terminal"))
    result = cli(*RUN)
    assert result.exit_code == 0 and result.stdout == "obsprune-out/demo-admm-stream-50\n"
    same_as_kept(name, measured(terminal.screen()))


def test_a_real_quiet_run(cli: Cli, tmp_path: Path) -> None:
    result = cli(*RUN, "-q")
    assert (result.stdout, result.stderr) == ("obsprune-out/demo-admm-stream-50\n", "")
    failed = cli("prune", tmp_path / "nowhere", "--quiet")
    assert failed.exit_code == 2 and failed.stdout == "" and failed.stderr.startswith("error: ")
