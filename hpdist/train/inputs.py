"""What a run's inputs are: one `InputSpec`, and of pictures one mode, that all sets are held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpdist.data.decode.categories import Categories
from hpdist.data.decode.stored_values import CHANNELS, InputSpec
from hpdist.data.decode.text import Tokenizer
from hpdist.data.sources.labeled import LabeledRows, input_spec
from hpdist.data.sources.own_files import limits_of
from hpdist.data.sources.pictures import (
    declared_mode,
    look_at_labeled,
    look_at_others,
    shown_mode,
    told,
)
from hpdist.data.sources.unlabeled import AnyUnlabeled
from hpdist.data.views import AudioViewsConfig, ImageViewsConfig, TextViewsConfig
from hpdist.errors import CheckpointError, ConfigError
from hpdist.messages.progress import working
from hpdist.models.hf.text import HuggingFaceConfig
from hpdist.train.config import RunConfig

_MODES = {channels: mode for mode, channels in CHANNELS.items()}


@dataclass(frozen=True)
class ModeChoice:
    """The mode that pictures are decoded in, and what it was chosen by."""

    mode: str
    line: str | None = None
    """For a person; None where nothing was decided."""
    open: bool = False
    """Whether pictures of other sets may still change it."""


@working("looking at the first rows")
def find_spec(
    config: RunConfig, labeled: LabeledRows, categories: Categories | None = None
) -> InputSpec:
    """Derive how inputs are decoded from the views and the first labelled row.

    `categories` are those of its columns that hold no numbers. Raises ConfigError or DataError
    where they do not fit each other.
    """
    spec = _spec(config, labeled, categories)
    views, kind = config.views, spec.kind
    if (views.name, kind) in (("image", "vector"), ("table", "image")):
        raise ConfigError(
            f"views.name: {views.name}, but column {labeled.column!r} holds {kind}s; "
            f"set views.name: {'table, or identity' if kind == 'vector' else 'image'}"
        )
    channels = getattr(views, "channels", None)
    if channels is not None and spec.stored == "array" and spec.shape[0] != channels:
        raise ConfigError(
            f"views.channels: {channels}, but column {labeled.column!r} holds arrays of "
            f"{spec.shape[0]} channels, which are taken as they are; leave views.channels out, or "
            "store pictures"
        )
    return spec


def _spec(config: RunConfig, labeled: LabeledRows, categories: Categories | None) -> InputSpec:
    views, model = config.views, config.model
    limits = limits_of(config.data.loading)
    if isinstance(views, AudioViewsConfig):
        views.sampling.require()
        return replace(InputSpec.of_audio(views.sampling, views.seen), limits=limits)
    if not isinstance(views, TextViewsConfig):
        size, missing = (getattr(views, key, None) for key in ("size", "missing"))
        return input_spec(
            labeled, size, missing=missing == "mean", categories=categories, limits=limits
        )
    tokenizer = None
    if views.tokenizer is not None:
        tokenizer = Tokenizer(views.tokenizer, views.max_length)
    elif isinstance(model, HuggingFaceConfig):
        tokenizer = Tokenizer(
            model.path, views.max_length, model.revision, model.trust_remote_code, "model.name"
        )
    if tokenizer is None:
        raise ConfigError(
            "views.tokenizer: name the folder or the Hub's id of a tokenizer; only a model "
            "hf:… has one of its own"
        )
    tokenizer.vocabulary  # noqa: B018  (loads it, for an error to come here)
    return InputSpec.of_text(tokenizer)


def choose_mode(
    config: RunConfig, labeled: LabeledRows, spec: InputSpec, recorded: Mapping[str, Any] | None
) -> ModeChoice | None:
    """Choose the mode of pictures by what the labelled set and the settings say.

    None where the inputs are no encoded pictures. `recorded` is what `record_inputs` gave when the
    run began; {} of a run that kept no record. Raises DataError, or CheckpointError where a setting
    wants another mode than the run began with.
    """
    if spec.kind != "image" or spec.stored != "encoded":
        return None
    channels = getattr(config.views, "channels", None)
    if recorded is not None:
        mode = str(recorded.get("mode") or _mode_of_first(labeled, spec))
        if channels not in (None, CHANNELS[mode]):
            raise CheckpointError(
                f"views.channels: {channels}, but the run that goes on began with pictures of "
                f"{shown_mode(mode)}; choose another run.name, or make the settings agree"
            )
        return ModeChoice(mode)
    if channels is not None:
        mode = _MODES[channels]
        line = f"pictures: {shown_mode(mode)}, by views.channels"
        return ModeChoice(mode, f"{line}; {_converted(mode)}")
    declared = declared_mode(labeled)
    if declared is not None:
        line = f"pictures: {shown_mode(declared)}, as the column of data.labeled is cast"
        return ModeChoice(declared, f"{line}; {_converted(declared)}")
    seen = look_at_labeled(labeled)
    mode = seen.mode if seen.pictures else str(spec.mode)
    return ModeChoice(mode, told(mode, seen), open=mode == "L")


def reconsider(
    choice: ModeChoice, sets: Mapping[str, LabeledRows | AnyUnlabeled | None]
) -> ModeChoice:
    """Look for colour in the other sets, where the labelled pictures are all grey.

    Raises DataError when a set's files cannot be read.
    """
    if not choice.open:
        return choice
    there = {name: rows for name, rows in sets.items() if rows is not None}
    for name, seen in look_at_others(there).items():
        if seen.colour:
            line = told("RGB", seen, f"pictures of {name}")
            return ModeChoice("RGB", f"{line}; the labelled ones are grey")
    return choice


def other_casts(mode: str, sets: Mapping[str, LabeledRows | AnyUnlabeled | None]) -> list[str]:
    """Name the sets that `datasets` is told to decode in another mode than the run does."""
    found = {name: declared_mode(rows) for name, rows in sets.items() if rows is not None}
    return [
        f"note: {name}: its column is cast to {own}, and decoded in {mode} as data.labeled is"
        for name, own in found.items()
        if own not in (None, mode)
    ]


def with_mode(spec: InputSpec, mode: str) -> InputSpec:
    """Give the spec of pictures that are decoded in a mode."""
    return replace(spec, mode=mode, shape=(CHANNELS[mode], *spec.shape[1:]))


def with_channels(config: RunConfig, mode: str) -> RunConfig:
    """Fill in `views.channels`, so that the run's own config says what it did."""
    views = config.views
    if not isinstance(views, ImageViewsConfig):
        return config
    filled = views.model_copy(update={"channels": CHANNELS[mode]})
    return config.model_copy(update={"views": filled})


def is_inputs_record(found: Any) -> bool:
    """Whether JSON is what a run keeps of its inputs."""
    if not isinstance(found, dict) or found.get("mode") not in (None, *CHANNELS):
        return False
    categories, columns = found.get("categories", {}), found.get("columns", [])
    lists = ("columns", "names", "declared") if categories else ()
    return (
        isinstance(categories, dict)
        and all(isinstance(categories.get(key), list) for key in lists)
        and isinstance(columns, list)
        and all(isinstance(column, str) for column in columns)
        and isinstance(found.get("seconds", 0.0), (int, float, type(None)))
    )


def _converted(mode: str) -> str:
    return "colour becomes grey" if mode == "L" else "every picture becomes so"


def _mode_of_first(labeled: LabeledRows, spec: InputSpec) -> str:
    """The mode of the split's first picture, which runs without a record went by."""
    try:
        first = labeled.read_split([0])[0]
        return str(InputSpec.of(first, None, limits=spec.limits).mode)
    except Exception:  # image libraries raise nearly everything on a damaged file
        return str(spec.mode)
