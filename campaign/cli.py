"""What can be asked for on the command line? The only place where arguments are read and exit codes are chosen.

0: done. 1: a campaign or a stage failed, with the reason. 2: bad input, with one line that says what. 130: interrupted,
also by smelt stop.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.exceptions import TyperException

from shards.outcome import FailureClass, Outcome
from shards.settings import SettingsError

__all__ = ["app", "main"]

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
PACKAGES = frozenset({"shards", "potential", "sampler", "labeler", "trainer", "campaign"})

app = typer.Typer(
    name="smelt",
    help="Learn an interatomic potential from a quantum code: sample, label and train until nothing is left to learn.",
    add_completion=False,
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The campaign's TOML file; see configs/reference.toml.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers.", min=0)]


def main() -> None:
    """Run the command line and end the process with the exit code that this file's first lines promise."""
    status = _run(sys.argv[1:])
    gc.freeze()  # to look through all that was imported for garbage once more takes half a second
    sys.exit(status)


def _run(arguments: list[str]) -> int:
    try:
        code = typer.main.get_command(app).main(arguments, prog_name="smelt", standalone_mode=False)
    except TyperException as error:
        return _refuse(f"{error.format_message()} (smelt --help says what there is)")
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        return _refuse(str(error))
    if code == INTERRUPTED:
        print("smelt: interrupted; the same command goes on from here", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _refuse(message: str) -> int:
    for line in message.splitlines():
        print(f"smelt: {line}", file=sys.stderr)
    return BAD_INPUT


def _is_for_the_user(error: Exception) -> bool:
    """Our own exception classes say what to do about bad input; so does the system about files. The rest are bugs."""
    return type(error).__module__.partition(".")[0] in PACKAGES or (isinstance(error, OSError) and bool(error.filename))


@app.callback(invoke_without_command=True)
def _smelt(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"smelt {importlib.metadata.version('smelt')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command("run")
def run(
    config: Config,
    run_dir: Annotated[Path | None, typer.Option(help="Where everything is kept; runs/NAME if not given.")] = None,
    site: Annotated[
        Path | None, typer.Option(help="What the machine offers; see configs/sites. This one if not given.")
    ] = None,
) -> None:
    """Run a campaign until it ends, then at its higher level. The same command again goes on with one that was stopped,
    however it was."""
    from campaign.config import at_higher_level, load_campaign
    from campaign.driver import run_campaign
    from campaign.ledger import higher_run
    from campaign.site import Site, load_site
    from campaign.summary import write_summary
    from campaign.view import LiveView, page

    settings = load_campaign(config)
    folder = run_dir or Path("runs") / settings.campaign.name
    console, machine = _console(), load_site(site) if site else Site(name="this machine")
    levels = [(settings, folder)]
    levels += [(at_higher_level(settings), higher_run(folder))] if settings.higher else []
    for each, place in levels:
        with LiveView(place, console) as view:
            state = run_campaign(each, place, machine, view)
        console.print(page(write_summary(place, state)))
        if state.failed:
            print(f"smelt: the campaign failed: {state.finished}", file=sys.stderr)
            raise typer.Exit(FAILED)


@app.command()
def status(
    run_dir: RunDir, as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False
) -> None:
    """Say where a campaign is, while it runs or after: on any host that sees its directory."""
    from campaign.ledger import levels_of, read_state
    from campaign.summary import summarise
    from campaign.view import page
    from campaign.whereabouts import whereabouts

    summaries = []
    for folder in levels_of(run_dir):
        state = read_state(folder)
        summaries.append(summarise(folder, state) | whereabouts(folder, state))
    if as_json:
        higher = {"higher": summaries[1]} if len(summaries) > 1 else {}
        print(json.dumps(summaries[0] | higher, indent=2))
        return
    for summary in summaries:
        _console().print(page(summary))


@app.command()
def simulate(
    config: Config,
    nodes: Annotated[int, typer.Option(help="Nodes of the machine.", min=3)] = 450,
    site: Annotated[
        Path | None,
        typer.Option(
            help="Slots on a node, nodes of walkers and trainings; labels have the rest. See below if not given."
        ),
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="RUN", help="A run directory whose tasks say what tasks cost.")
    ] = None,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
) -> None:
    """Say how busy a campaign would keep a machine, and what the rest would wait for.

    The decisions are the real ones, time is simulated, nothing is computed. Beside it the same campaign with barriers:
    sample, then label all, then train. Without --site: one label on a node, two nodes with four walker tasks each, a
    training over two. Without --from: labels of ten minutes, 2 % of them up to time_limit_min; trainings of one minute
    and 0.15 s per label; walker tasks of fifteen minutes, less as more walkers trigger.
    """
    from campaign.config import load_campaign
    from campaign.costs import Costs, measure
    from campaign.forecast import ASSUMED, compare, share_nodes
    from campaign.site import load_site
    from campaign.view import forecast_page

    pools = share_nodes(nodes, load_site(site) if site else ASSUMED)
    result = compare(load_campaign(config), pools, measure(source) if source else Costs(), seed)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _console().print(forecast_page(result))


@app.command()
def stop(
    run_dir: RunDir,
    now: Annotated[bool, typer.Option("--now", help="End what runs, too; the next run starts it again.")] = False,
) -> None:
    """Let a campaign start nothing more, and wait until what runs has ended. smelt run goes on from there."""
    from campaign.lease import holder_of
    from campaign.ledger import levels_of, read_state
    from campaign.stop import Request, request_stop
    from campaign.worker import work_under_way

    read_state(run_dir)
    run_dir = next(filter(holder_of, levels_of(run_dir)), run_dir)
    said = ""
    while holder := holder_of(run_dir):
        if not said:
            request_stop(run_dir, Request.NOW if now else Request.DRAIN)
        works = ", ".join(f"{work.task} on {work.host}" for work in work_under_way(run_dir))
        if (note := f"waiting for {works or f'the driver (pid {holder.pid} on {holder.host})'}") != said:
            print(note, flush=True)
            said = note
        time.sleep(1)
    print("stopped; smelt run goes on from here" if said else f"no driver is at work on {run_dir}")


@app.command()
def build(
    config: Config,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The shard of frames to write.")],
    frames: Annotated[int, typer.Option(help="How many frames.", min=1)] = 100,
    seed: Seed = 0,
    test: Annotated[bool, typer.Option("--test", help="Of molecules that the campaign never samples.")] = False,
) -> None:
    """Make random cells or molecules, as a campaign starts from."""
    from campaign.config import load_campaign
    from sampler.stage import build as stage

    settings = load_campaign(config)
    builder = settings.builder
    if test:
        if not builder.molecules.given:
            raise SettingsError("--test: only molecules are set aside by kind; builder.molecules names none")
        molecules = builder.molecules.model_copy(update={"part": "test"})
        builder = builder.model_copy(update={"molecules": molecules})
    _report(stage(settings.campaign.elements, builder, frames, seed, dest))


@app.command()
def sample(
    config: Config,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The committee that drives the walkers.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The shard of frames to write.")],
    walkers: Annotated[int, typer.Option(help="How many walkers; 0: sampler.walkers_per_task.", min=0)] = 0,
    seed: Seed = 0,
) -> None:
    """Run walkers and keep the frames that the committee disagrees on."""
    from campaign.config import load_campaign
    from sampler.stage import sample as stage

    settings = load_campaign(config)
    n_walkers = walkers or settings.sampler.walkers_per_task
    _report(stage(model, settings.builder, settings.sampler, n_walkers, seed, dest))


@app.command()
def label(
    config: Config,
    frames: Annotated[Path, typer.Argument(metavar="FRAMES", help="A shard of frames, or of labels to compute anew.")],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The folder for labels, one file each, and manifest.jsonl.")
    ],
    index: Annotated[list[int] | None, typer.Option(help="Only this frame of the shard; may be repeated.")] = None,
) -> None:
    """Compute labels with the quantum code. Those that are in DEST already are kept."""
    from campaign.config import load_campaign
    from labeler.stage import label as stage
    from shards.manifest import Manifest
    from shards.reader import open_shard

    settings = load_campaign(config)
    n_frames = len(open_shard(frames))
    indices = index or range(n_frames)
    if wrong := [i for i in indices if not 0 <= i < n_frames]:
        raise SettingsError(f"--index {wrong[0]}: {frames} has frames 0 to {n_frames - 1}")
    outcome = stage(frames, indices, settings.labeler, settings.campaign.elements, dest, dest / "scratch")
    if outcome.receipts:
        Manifest(dest / "manifest.jsonl").append_all(outcome.receipts)
    _report(outcome)


@app.command()
def train(
    config: Config,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A manifest of labels, or one shard of them.")],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The folder for model.safetensors, metrics and checkpoint.")
    ],
    seed: Seed = 0,
    site: Annotated[Path | None, typer.Option(help="How ranks are started here: its train.launcher.")] = None,
) -> None:
    """Train a committee. One that was stopped in DEST goes on."""
    from campaign.config import load_campaign
    from campaign.site import load_site
    from trainer.stage import DEFAULT_LAUNCHER
    from trainer.stage import train as stage

    settings = load_campaign(config)
    launcher = load_site(site).train.launcher if site else DEFAULT_LAUNCHER
    manifest = _as_manifest(data, dest)
    elements = settings.campaign.elements
    _report(stage(manifest, settings.potential, settings.trainer, elements, dest, seed=seed, launcher=launcher))


@app.command()
def transfer(
    config: Config,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The committee to start from, trained or imported.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A manifest of labels of the higher level, or a shard.")],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="The folder for model.safetensors, metrics and checkpoint.")
    ],
    replay: Annotated[
        Path | None, typer.Option(help="A manifest of lower labels to take forces from (transfer.forces).")
    ] = None,
    seed: Seed = 0,
    site: Annotated[Path | None, typer.Option(help="How ranks are started here: its train.launcher.")] = None,
) -> None:
    """Carry a committee to a higher level of theory, some of its layers frozen."""
    from campaign.config import load_campaign
    from campaign.site import load_site
    from trainer.stage import DEFAULT_LAUNCHER
    from trainer.stage import transfer as stage

    settings = load_campaign(config)
    launcher = load_site(site).train.launcher if site else DEFAULT_LAUNCHER
    outcome = stage(
        _as_manifest(data, dest),
        model,
        settings.trainer,
        settings.transfer,
        dest,
        seed=seed,
        replay=replay,
        launcher=launcher,
    )
    _report(outcome)


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A committee.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A manifest of labels, or one shard of them.")],
) -> None:
    """Compare a committee with labels."""
    from tempfile import TemporaryDirectory

    from trainer.stage import evaluate as stage

    with TemporaryDirectory() as folder:
        _report(stage(model, [_as_manifest(data, Path(folder))]))


@app.command()
def validate(
    config: Config,
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A committee.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The folder for labels, validation.json and a plot.")],
    suite: Annotated[str, typer.Option(help="What is tested: molecule.")] = "molecule",
    molecules: Annotated[int, typer.Option(help="At most so many molecules, smallest first.", min=1)] = 10,
    reactions: Annotated[
        Path | None, typer.Option(help="A file of reaction energies and barriers to test; see docs/molecules.md.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Test a committee against the quantum code: conformers, torsions, stretches, dimers, reactions, frequencies,
    barriers."""
    from campaign.config import load_campaign
    from campaign.validation import validate_molecules

    if suite != "molecule":
        raise SettingsError(f"--suite {suite}: there is molecule")
    _report(validate_molecules(load_campaign(config), model, dest, molecules, seed, reactions))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A shard, a manifest, .xyz, .extxyz, .db, or ANI's HDF5.")
    ],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="A name that ends in .h5, .ani.h5, .xyz, .extxyz or .db.")
    ],
    energy: Annotated[str, typer.Option(help="Name of the energies in SOURCE.")] = "",
    forces: Annotated[str, typer.Option(help="Name of the forces in SOURCE.")] = "",
    stress: Annotated[str, typer.Option(help="Name of the stresses in SOURCE.")] = "",
    energy_unit: Annotated[str, typer.Option(help="eV, hartree or kcal/mol; by the format if not given.")] = "",
    length_unit: Annotated[str, typer.Option(help="A or bohr.")] = "A",
    force_unit: Annotated[str, typer.Option(help="Such as hartree/bohr; made of the two if not given.")] = "",
    gradients: Annotated[
        bool, typer.Option("--gradients", help="SOURCE has gradients under the name of forces.")
    ] = False,
    frames_only: Annotated[bool, typer.Option("--frames-only", help="Leave labels out.")] = False,
    skip_unlabeled: Annotated[
        bool, typer.Option("--skip-unlabeled", help="Leave frames without an energy out.")
    ] = False,
) -> None:
    """Convert frames and labels to and from other formats."""
    from shards.convert import Fields
    from shards.convert import convert as change

    try:
        sign = -1 if gradients else 1
        fields = Fields(energy, forces, stress, energy_unit, length_unit, force_unit, sign)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    done = change(source, dest, fields, frames_only=frames_only, skip_unlabeled=skip_unlabeled)
    skipped = f", {done.n_skipped} without an energy left out" if done.n_skipped else ""
    print(f"{done.n_frames} frames to {', '.join(map(str, done.paths))}{skipped}")


@app.command("import")
def import_model(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The *.info file or folder of a NeuroChem committee.")
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The model file to write (.safetensors).")],
) -> None:
    """Import a published committee."""
    from potential.neurochem import import_neurochem

    print(f"{dest}: {import_neurochem(source, dest)}")


@app.command()
def site(
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The site file to write.")] = Path("site.toml"),
) -> None:
    """Ask the scheduler what it has and write a first site file, with the meaning of every field."""
    from campaign.survey import write_site

    for line in write_site(dest):
        print(line)
    print(f"{dest}: to be looked through; then smelt doctor --site {dest}")


@app.command()
def doctor(
    site: Annotated[
        Path | None, typer.Option(help="Check every stage where this site puts it, through its scheduler.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --site: the campaign whose quantum code and ranks are tried.")
    ] = None,
) -> None:
    """Check that every part is there and works: here, or on the nodes of a site."""
    from campaign.checkup import DEFAULT_CAMPAIGN, check_site
    from campaign.config import load_campaign
    from campaign.doctor import examine
    from campaign.site import load_site

    if site is None:
        if not examine(_console()):
            raise typer.Exit(FAILED)
    elif not check_site(load_site(site), load_campaign(config) if config else DEFAULT_CAMPAIGN, _console()):
        print(f"smelt: {site}: not every stage works there, see above", file=sys.stderr)
        raise typer.Exit(BAD_INPUT)


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=120)


def _as_manifest(data: Path, folder: Path) -> Path:
    """A manifest for `data`, which is one already or a single shard; then it is written into `folder`."""
    from shards.manifest import Manifest
    from shards.reader import open_shard

    if data.suffix == ".jsonl":
        if not data.is_file():
            raise SettingsError(f"{data}: no such file")
        return data
    manifest = Manifest(folder / "manifest.jsonl")
    receipt = open_shard(data).receipt()
    manifest.path.parent.mkdir(parents=True, exist_ok=True)
    manifest.append(receipt)
    return manifest.path


def _report(outcome: Outcome) -> None:
    """Print what a stage did, as JSON; end with the exit code of its failure, if it has one."""
    print(json.dumps({"receipts": [asdict(receipt) for receipt in outcome.receipts], "facts": outcome.facts}, indent=2))
    if outcome.failure:
        log = f" (log: {outcome.failure.log})" if outcome.failure.log else ""
        print(f"smelt: {outcome.stage} failed: {outcome.failure.kind}: {outcome.failure.message}{log}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT if outcome.failure.kind is FailureClass.MISSING else FAILED)
    if failures := outcome.facts.get("failures"):
        print(f"smelt: {len(failures)} of {len(failures) + len(outcome.receipts)} frames failed", file=sys.stderr)
        raise typer.Exit(FAILED)
