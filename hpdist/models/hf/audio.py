"""Inputs of Hugging Face's audio models: waveforms with a mask, or spectrograms as theirs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hpdist.data.decode.audio import Sampling
from hpdist.data.views.audio import split
from hpdist.errors import ConfigError

_LENGTHS = 9  # to which waveforms of a batch are cut: 1, 0.71, 0.5, ... 0.06 of a row's

OWN_NOISE = {
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "layerdrop": 0.0,
}
"""Set in a model's config unless `model.config` does: the views do the masking, the same on any
number of ranks, and unused parts (a dropped layer, a mask's embedding) would have no gradient."""


class AudioClassifier(nn.Module):
    """Waveforms [rows, samples] or spectrograms [rows, 1, mels, frames] to logits [rows, classes].

    Waveforms are NaN after their end. A model that takes an attention mask is told where that is,
    and gets no more than the batch's longest waveform, rounded up to one of nine lengths; what
    follows the end changes none of its logits. A model that normalises over all samples of a row
    (`feat_extract_norm: group`) was trained without a mask: it gets zeros there, the same number in
    every batch.

    Args:
        model: An audio classifier of `transformers`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        config: Any = self.model.config
        takes_mask = "attention_mask" in inspect.signature(self.model.forward).parameters
        self.masked = takes_mask and getattr(config, "feat_extract_norm", None) != "group"
        self.fewest = _one_frame(config)
        self._name = str(self.model.main_input_name)
        self._frames_first = config.model_type == "audio-spectrogram-transformer"

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits."""
        rows = inputs.shape[0]
        if not rows:  # models of transformers fail on them
            inputs = inputs.new_zeros(1, *inputs.shape[1:])
        if inputs.dim() == 4:
            given = {self._name: inputs[:, 0].mT if self._frames_first else inputs[:, 0]}
        else:
            given = self._waveforms(inputs)
        logits: Tensor = self.model(**given).logits
        return logits[:rows]

    def _waveforms(self, inputs: Tensor) -> dict[str, Tensor]:
        waveform, length = split(inputs)
        if not self.masked:
            return {self._name: waveform}
        length = length.clamp(min=self.fewest)  # without a frame, the mean is NaN
        if not torch.compiler.is_compiling():  # it would compile for every length
            waveform = waveform[:, : cut(int(length.max()), waveform.shape[1])]
        mask = torch.arange(waveform.shape[1], device=waveform.device) < length[:, None]
        return {self._name: waveform, "attention_mask": mask.long()}


def cut(longest: int, samples: int) -> int:
    """The smallest of the nine lengths that holds this many samples."""
    lengths = (int(samples * 2 ** (-step / 2)) for step in reversed(range(_LENGTHS)))
    return next((length for length in lengths if length >= longest), samples)


def check_audio(model: Any, name: str, input_shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless the views' rows have the shape that the model takes."""
    config = model.config
    if len(input_shape) == 1:
        if getattr(config, "num_mel_bins", None) and not hasattr(config, "conv_kernel"):
            raise ConfigError(
                f"model.name: {name} takes spectrograms; set views.spectrogram: true and "
                f"views.mels: {config.num_mel_bins}"
            )
        least = _one_frame(config)
        if input_shape[0] < least:
            raise ConfigError(
                f"views.seconds: rows have {input_shape[0]} samples, and {name} needs {least} for "
                "one frame; give more seconds"
            )
        return
    mels, frames = input_shape[1:]
    wanted = getattr(config, "num_mel_bins", None)
    if wanted is None:
        raise ConfigError(f"model.name: {name} takes waveforms; set views.spectrogram: false")
    if wanted != mels:
        raise ConfigError(f"views.mels: {mels}, and {name} takes {wanted}; set it to that")
    fixed = getattr(config, "max_length", None)
    if config.model_type == "whisper":
        fixed = 2 * config.max_source_positions
    if isinstance(fixed, int) and fixed != frames:
        raise ConfigError(
            f"views.seconds: its {frames} frames are not the {fixed} that {name} takes; choose "
            "views.seconds and views.hop that give that number, or, for a model that begins at "
            "random, change it in model.config"
        )


def check_rate(transformers: Any, place: str, name: str, sampling: Sampling) -> None:
    """Raise ConfigError if a checkpoint was trained at another sampling rate than the views'."""
    extractor = transformers.feature_extraction_utils.FeatureExtractionMixin
    try:
        found, _ = extractor.get_feature_extractor_dict(place)
    except OSError:
        return  # it is not known
    rate = found.get("sampling_rate")
    if rate and rate != sampling.rate:
        raise ConfigError(
            f"views.sampling_rate: {sampling.rate} Hz, and {name} was trained at {rate} Hz; set it "
            "to that"
        )


def _one_frame(config: Any) -> int:
    """The samples that a model of waveforms needs for one frame."""
    samples = 1
    kernels, strides = (getattr(config, f"conv_{key}", None) or () for key in ("kernel", "stride"))
    for kernel, stride in zip(reversed(list(kernels)), reversed(list(strides)), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples
