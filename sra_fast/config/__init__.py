"""The configuration: typed dataclasses, and YAML files and the command line that fill them."""
