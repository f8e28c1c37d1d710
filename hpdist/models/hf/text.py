"""Models of Hugging Face by name: `hf:<folder or id of the Hub>`, for text, images and audio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hpdist.config.section import nearest
from hpdist.data.decode.audio import AudioSpec
from hpdist.data.decode.spec import InputSpec
from hpdist.data.decode.text import TextSpec, Tokenizer
from hpdist.errors import ConfigError, describe
from hpdist.hub import PREFIX, checkpoint_folder, require_transformers
from hpdist.models.adapters import Lora, add_adapters
from hpdist.models.build import ModelConfig, Pixels
from hpdist.models.hf.audio import OWN_NOISE, AudioClassifier, check_audio, check_rate
from hpdist.models.outputs import on_trial
from hpdist.models.pixels import checkpoint_pixels
from hpdist.models.stored import loading_as_stored, mark_stored


class HuggingFaceConfig(ModelConfig):
    """A classifier of `transformers`: for text or audio if the inputs are, else for images.

    What a checkpoint lacks, such as the last layer for these classes, begins at random. Weights are
    only read from safetensors.
    """

    takes: ClassVar = frozenset({"image", "text", "audio"})
    prefix: ClassVar[str] = PREFIX
    prefix_hint: ClassVar[str] = f"{PREFIX}folder-or-id"
    name: str = Field(pattern=f"^{PREFIX}.")
    """`hf:` and a checkpoint folder or an id of the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub, of the weights and the tokenizer."""
    pretrained: bool = True
    """Begin with the checkpoint's weights; false begins at random with its config."""
    config: dict[str, Any] = Field({})
    """Values that replace those of the checkpoint's config, such as `num_hidden_layers: 2`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    freeze: list[str] = Field([])
    """Parameters that are not trained, by name with wildcards, such as `bert.embeddings.*`."""
    lora: Lora | None = None
    """Low-rank adapters: the checkpoint's own weights are not trained; needs peft."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """The learning rate of each block, as a share of the next one's; that of the last layer is
    `optim.lr`."""

    @property
    def path(self) -> str:
        """The folder or id."""
        return self.name.removeprefix(self.prefix)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Make the model for images; text needs `build_for`."""
        self.require_image(input_shape)
        return self._make(None, num_classes)

    def build_for(self, spec: InputSpec, num_classes: int) -> nn.Module:
        """Make the model for what the input column holds."""
        if isinstance(spec, AudioSpec):
            return self._of_audio(spec, num_classes)
        if isinstance(spec, TextSpec):
            return self._of_text(spec.tokenizer, num_classes)
        return super().build_for(spec, num_classes)

    def own_tokenizer(self, max_length: int) -> Tokenizer:
        """Give the tokenizer that comes with the checkpoint, for rows of so many tokens."""
        remote = self.trust_remote_code
        return Tokenizer(self.path, max_length, self.revision, remote, "model.name")

    def pixels(self) -> Pixels:
        """The checkpoint's image processing, at the size of `config`, if there is any."""
        found = checkpoint_pixels(self.path, self.revision, "model.name")
        side = self.config.get("image_size")
        return replace(found, size=side) if isinstance(side, int) else found

    def require_image(self, input_shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless the inputs are [channels, height, width]."""
        if len(input_shape) != 3:
            raise ConfigError(
                f"model.name: {self.name} takes text or images [channels, height, width], but the "
                f"input column holds vectors of shape {list(input_shape)}; use mlp"
            )

    def _of_text(self, tokenizer: Tokenizer, num_classes: int) -> nn.Module:
        vocabulary = tokenizer.vocabulary
        model = TextClassifier(self._make(vocabulary.pad, num_classes), vocabulary.pad)
        known = getattr(model.model.config, "vocab_size", None)
        if known is not None and known < vocabulary.size:
            raise ConfigError(
                f"model.name: {self.name} knows {known} tokens, and the tokenizer of "
                f"{tokenizer.path} has {vocabulary.size}; name the model's in views.tokenizer"
            )
        _try_length(model, tokenizer.example(1), vocabulary.pad)
        return model

    def _of_audio(self, spec: AudioSpec, num_classes: int) -> nn.Module:
        if self.pretrained:
            transformers = require_transformers(f"model.name: {self.name}")
            with checkpoint_folder(self.path, "model.name") as place:
                check_rate(transformers, place, self.name, spec.sampling)
        model = self._make(None, num_classes, "Audio", OWN_NOISE)
        check_audio(model, self.name, spec.model_input_shape)
        return AudioClassifier(model)

    def _make(
        self,
        pad: int | None,
        num_classes: int,
        kind: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> nn.Module:
        """The model of `transformers`, whole on the CPU, in fp32 unless `weights_as_stored`."""
        transformers = require_transformers(f"model.name: {self.name}")
        kind = kind or ("Image" if pad is None else "Sequence")
        auto = getattr(transformers, f"AutoModelFor{kind}Classification")
        common = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        changed = {**(defaults or {}), **self.config, "num_labels": num_classes}
        if pad is not None:
            changed["pad_token_id"] = pad
        with checkpoint_folder(self.path, "model.name") as place, _whole_weights():
            config, unknown = transformers.AutoConfig.from_pretrained(
                place, return_unused_kwargs=True, **common, **changed
            )
            for key in set(unknown) & set(self.config):
                raise ConfigError(
                    f"model.config.{key}: a {type(config).__name__} has no such value"
                    f"{nearest(key, config.to_dict())}"
                )
            if type(config) not in getattr(auto, "_model_mapping", {type(config)}) and not hasattr(
                config, "auto_map"
            ):
                kinds = {"Image": "images", "Sequence": "text", "Audio": "audio"}
                raise ConfigError(
                    f"model.name: {self.name} is a model of type {config.model_type}, for which "
                    f"transformers has no class that classifies {kinds[kind]}"
                )
            fresh: set[str] = set()
            if not self.pretrained:
                trust = self.trust_remote_code
                model = auto.from_config(config, dtype=torch.float32, trust_remote_code=trust)
            else:
                with loading_as_stored(transformers, config) as as_stored:
                    model, found = auto.from_pretrained(
                        place,
                        config=config,
                        dtype=torch.float32,
                        use_safetensors=True,
                        ignore_mismatched_sizes=True,
                        output_loading_info=True,
                        **common,
                    )
                if as_stored:
                    mark_stored(model)
                self._check_loaded(model, found, num_classes)
                fresh = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        if self.lora is not None:
            add_adapters(model, self.lora, fresh)
        self._freeze(model)
        if self.layer_decay is not None:
            scale_learning_rates(model, self.layer_decay)
        model.train()
        return ImageClassifier(model) if kind == "Image" else cast(nn.Module, model)

    def _check_loaded(self, model: nn.Module, found: dict[str, Any], num_classes: int) -> None:
        """Refuse a checkpoint that lacks more than a last layer for other classes."""
        names = [name for name, _ in model.named_parameters()]
        if not set(names) - set(found["missing_keys"]):
            raise ConfigError(f"model.name: {self.name} holds none of the model's weights")
        for name, stored, wanted in sorted(found["mismatched_keys"]):
            if tuple(wanted)[:1] != (num_classes,):
                raise ConfigError(
                    f"model.name: {self.name} holds {name} of shape {list(stored)}, and with "
                    f"model.config it must be {list(wanted)}; set model.pretrained: false"
                )

    def _freeze(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        for pattern in self.freeze:
            chosen = [p for name, p in named.items() if fnmatchcase(name, pattern)]
            if not chosen:
                raise ConfigError(
                    f"model.freeze: no parameter is called {pattern!r}{nearest(pattern, named)}"
                )
            for parameter in chosen:
                parameter.requires_grad_(False)
        if self.freeze and not any(p.requires_grad for p in named.values()):
            raise ConfigError("model.freeze: nothing is left to train")


class TextClassifier(nn.Module):
    """Token ids, int64 [rows, T] padded on the right, to logits [rows, classes].

    Columns that are padding in every row are left out.

    Args:
        model: Of `transformers`, called with ids and attention mask.
        pad: The id of padding.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__()
        self.model: Any = model
        self.pad = pad

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        rows, ids = ids.shape[0], _one_at_least(ids)
        mask = ids != self.pad
        if not torch.compiler.is_compiling():  # it would compile for every length
            length = max(int(mask.any(dim=0).sum()), 1)
            ids, mask = ids[:, :length], mask[:, :length]
        # A row of padding only, which is ignored, must not give NaN.
        mask = mask | (torch.arange(ids.shape[1], device=ids.device) == 0)
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask.long()).logits
        return logits[:rows]


class ImageClassifier(nn.Module):
    """Pixels [rows, channels, height, width] to logits [rows, classes]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(pixel_values=_one_at_least(pixels)).logits
        return logits[: pixels.shape[0]]


def _one_at_least(rows: Tensor) -> Tensor:
    """The rows, or one of zeros if there are none: models of transformers fail on those."""
    return rows if rows.shape[0] else rows.new_zeros(1, *rows.shape[1:])


def scale_learning_rates(model: nn.Module, decay: float) -> None:
    """Give each parameter a factor on the learning rate, `lr_scale`: `decay` per later block.

    The blocks are the members of the model's longest `nn.ModuleList`. What comes before them counts
    as one more; what comes after them has factor 1. Raises ConfigError if there are none.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    if not lists:
        raise ConfigError(
            f"model.layer_decay: {type(model).__name__} has no nn.ModuleList of blocks"
        )
    name = max(lists, key=lambda key: len(lists[key]))
    blocks = len(lists[name])
    depth = 0
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith(f"{name}."):
            depth = 1 + int(parameter_name.removeprefix(f"{name}.").partition(".")[0])
        elif depth:
            depth = blocks + 1
        cast(Any, parameter).lr_scale = decay ** (blocks + 1 - depth)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Keep transformers from partitioning weights while it makes them, as it does under ZeRO-3."""
    try:
        from transformers.integrations import deepspeed
    except ImportError:
        yield
        return
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _try_length(model: TextClassifier, example: Any, pad: int) -> None:
    """Raise ConfigError if rows are longer than the model supports."""
    ids = torch.from_numpy(example)
    length = ids.shape[1]
    ids[ids == pad] = ids[0, 0]
    try:
        with on_trial(model):
            model(ids)
    except Exception as error:
        raise ConfigError(
            f"views.max_length: the model fails on {length} tokens: {describe(error)}"
        ) from error
