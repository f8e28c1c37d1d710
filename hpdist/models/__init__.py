"""The models that come with hpdist, and how to name any other."""

from hpdist.models.build import ModelConfig, build_model
from hpdist.models.center_net import CenterNet
from hpdist.models.cnn import CNN
from hpdist.models.hf.text import HuggingFaceConfig, TextClassifier
from hpdist.models.ladder import LadderMLP
from hpdist.models.mlp import MLP
from hpdist.models.timm import TimmConfig
from hpdist.models.wide_resnet import WideResNet

__all__ = [
    "CNN",
    "MLP",
    "CenterNet",
    "HuggingFaceConfig",
    "LadderMLP",
    "ModelConfig",
    "TextClassifier",
    "TimmConfig",
    "WideResNet",
    "build_model",
]
