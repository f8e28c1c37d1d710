"""`hpdist predict MODEL DATA --out DIR`: label a dataset of any size, on any number of ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpdist.cli.commands import Commands
from hpdist.cli.evaluate import step_of
from hpdist.cli.output import begin_warnings, print_text
from hpdist.errors import ConfigError, DataError, HpdistError

if TYPE_CHECKING:
    from hpdist.data.config import Loading, Unlabeled
    from hpdist.evaluate.predict import Predicted, PredictOptions
    from hpdist.evaluate.predictor import Predictor

OWN_OPTIONS = (
    *("--help", "--out", "--probabilities", "--columns", "--threshold", "--batch"),
    *("--rows-per-file", "--which", "--checkpoint", "--precision"),
)
"""Options of the command; every other one is a setting of the data."""

_EPILOG = """\
DATA is a folder, a file, an id of the Hub, or a YAML file with the settings of a dataset. Its
settings may follow: --data.split test --data.input text --data.loading.threads 4.

On many processes: accelerate launch -m hpdist predict MODEL DATA --out DIR. Started again, it goes
on where it was stopped."""


def add_arguments(commands: Commands) -> None:
    """Describe the command's arguments."""
    parser = commands.add_parser(
        "predict",
        help="label a dataset of any size with a trained model, as Parquet",
        usage="hpdist predict MODEL DATA --out DIR [--probabilities] [--columns a,b] [...]",
        description="Write a label for every row of DATA into Parquet files in DIR.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="run folder, its model/, a checkpoint, or an exported file",
    )
    parser.add_argument("data", metavar="DATA", help="the rows to label")
    parser.add_argument("--out", metavar="DIR", required=True, help="made if it does not exist")
    parser.add_argument(
        "--probabilities", action="store_true", help="write those of all classes too"
    )
    parser.add_argument("--columns", metavar="A,B", help="columns of DATA to carry along")
    parser.add_argument(
        "--threshold", type=float, metavar="T", help="write only rows of at least this confidence"
    )
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="rows of a forward")
    parser.add_argument(
        "--rows-per-file", type=int, default=65_536, metavar="N", help="rows of a Parquet file"
    )
    parser.add_argument("--which", choices=["teacher", "student"], default="teacher")
    parser.add_argument("--checkpoint", metavar="C", help="best, last or a step")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"])


def run(known: argparse.Namespace, settings: Sequence[str]) -> int:
    """Predict, and print what was written."""
    from hpdist.distributed.joined import joined_ranks, own_place
    from hpdist.evaluate.predict import predict_to

    for name in ("batch", "rows_per_file"):
        if getattr(known, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1")
    if known.threshold is not None and not 0 <= known.threshold <= 1:
        raise ConfigError(f"--threshold: {known.threshold:g} is not within 0 and 1")
    data, loading = _data(known.data, settings)
    begin_warnings()
    with joined_ranks():
        rank, world_size = own_place()
        predictor = _load(known)
        options, out = _options(known, predictor), Path(known.out)
        try:
            found = predict_to(
                predictor, data, out, options, loading=loading, rank=rank, world_size=world_size
            )
        except HpdistError as error:
            if not error.everywhere:
                error.rank = rank
            raise
    for line in [] if found is None else _lines(found):
        print_text(line)
    return 0


def _options(known: argparse.Namespace, predictor: Predictor) -> PredictOptions:
    from hpdist.evaluate.predict import PredictOptions

    return PredictOptions(
        probabilities=known.probabilities,
        columns=tuple(filter(None, (known.columns or "").split(","))),
        threshold=known.threshold,
        batch=known.batch,
        part_rows=known.rows_per_file,
        pad=_pad(predictor),
    )


def _load(known: argparse.Namespace) -> Predictor:
    from hpdist.distributed.collectives import call_on_all_ranks
    from hpdist.evaluate.load import load

    checkpoint = step_of(known.checkpoint)
    return call_on_all_ranks(lambda: load(known.model, known.which, checkpoint, known.precision))


def _data(given: str, settings: Sequence[str]) -> tuple[Unlabeled, Loading]:
    """Read the settings of the dataset: from a YAML file, or a path, and the command line."""
    from pydantic import ValidationError

    from hpdist.config.overrides import lay_over, read_overrides
    from hpdist.config.yaml import read_yaml
    from hpdist.data.config import Loading, Unlabeled

    whole: dict[str, Any] = {"data": {"path": given}}
    if given.endswith((".yaml", ".yml")):
        if not Path(given).is_file():
            raise DataError(f"there is no file {given!r} with the settings of a dataset")
        whole = {"data": read_yaml(Path(given))}
    pairs = read_overrides(settings)
    foreign = [key for key, _ in pairs if not key.startswith("data.")]
    if foreign:
        raise ConfigError(f"--{foreign[0]}: predict takes settings of the data alone: --data.…")
    lay_over(whole, pairs)
    values = dict(whole["data"])
    loading = values.pop("loading", {})
    try:
        return Unlabeled.model_validate(values), Loading.model_validate(loading)
    except ValidationError as error:
        detail = error.errors()[0]
        path = ".".join(map(str, ("data", *detail["loc"])))
        raise ConfigError(f"{path}: {detail['msg']}") from None


def _pad(predictor: Predictor) -> int | None:
    """Give the padding token of a model that masks it, so that batches may be shorter."""
    name = str(predictor.description.model.get("name", ""))
    vocabulary = getattr(predictor.views, "vocabulary", None)
    if vocabulary is None or not name.startswith("hf:") or predictor.backend is not None:
        return None
    return int(vocabulary.pad)


def _lines(found: Predicted) -> list[str]:
    """Say what was written, for a person."""
    lines = [f"predictions: {found.written:,} rows in {found.folder}"]
    if found.predicted:
        pace = found.predicted / max(found.seconds, 1e-9)
        lines.append(f"pace:        {pace:,.0f} rows a second on the first rank")
    left_out = found.rows - found.written
    if left_out:
        lines.append(f"left out:    {left_out:,} rows, by a filter or the threshold")
    if found.bad:
        lines.append(f"bad rows:    {found.bad:,}, without a label: {'; '.join(found.named)}")
    return lines
