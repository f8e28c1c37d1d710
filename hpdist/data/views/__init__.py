"""Views: how raw rows become what the model sees, one file per modality."""

from hpdist.data.views.base import IdentityViews, IdentityViewsConfig, Views
from hpdist.data.views.image import ImageViews, ImageViewsConfig
from hpdist.data.views.text import TextViews, TextViewsConfig

__all__ = [
    "IdentityViews",
    "IdentityViewsConfig",
    "ImageViews",
    "ImageViewsConfig",
    "TextViews",
    "TextViewsConfig",
    "Views",
]
