"""Views: how raw rows become what the model sees, one file per modality."""

from hpdist.data.views.audio import AudioViews, AudioViewsConfig
from hpdist.data.views.auto import AutoViewsConfig
from hpdist.data.views.base import (
    FittedViews,
    GradedViews,
    IdentityViews,
    IdentityViewsConfig,
    MappedViews,
    ViewedRows,
    Views,
)
from hpdist.data.views.image import ImageViews, ImageViewsConfig
from hpdist.data.views.table import TableViews, TableViewsConfig
from hpdist.data.views.text import TextViews, TextViewsConfig

__all__ = [
    "AudioViews",
    "AudioViewsConfig",
    "AutoViewsConfig",
    "FittedViews",
    "GradedViews",
    "IdentityViews",
    "IdentityViewsConfig",
    "ImageViews",
    "ImageViewsConfig",
    "MappedViews",
    "TableViews",
    "TableViewsConfig",
    "TextViews",
    "TextViewsConfig",
    "ViewedRows",
    "Views",
]
