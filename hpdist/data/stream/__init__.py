"""This rank's slice of every global batch, without end, from any position."""

from hpdist.data.stream.batches import BatchStream

__all__ = ["BatchStream"]
