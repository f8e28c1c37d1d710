"""Views: how raw rows become what the model sees, one file per modality."""

from hpdist.data.views.base import FittedViews, IdentityViews, IdentityViewsConfig, Views
from hpdist.data.views.image import ImageViews, ImageViewsConfig
from hpdist.data.views.table import TableViews, TableViewsConfig

__all__ = [
    "FittedViews",
    "IdentityViews",
    "IdentityViewsConfig",
    "ImageViews",
    "ImageViewsConfig",
    "TableViews",
    "TableViewsConfig",
    "Views",
]
