"""The ground of the config: sections, components, overrides and YAML; it knows no component."""
