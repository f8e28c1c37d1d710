"""Imports every built-in component, so that `config` knows its name and options."""

import hpdist.algorithms
import hpdist.data.views
import hpdist.models  # noqa: F401
