"""Build a command line from a dataclass whose fields are options with help and limits."""
import argparse
import math
from dataclasses import field, fields


def option(default, help: str, group=None, low=0.0, high=math.inf, choices=None):
    """A field of such a dataclass. group: the title of a new group of options."""
    return field(default=default, metadata=dict(help=help, group=group, low=low, high=high,
                                                choices=choices))


def read_options(defaults, argv: list[str], description: str) -> tuple:
    """Parse argv -> a dataclass like `defaults`, and {option: value} of the changed options."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    options = {f.name.replace("_", "-"): f for f in fields(defaults)}
    for name, f in options.items():
        about, default = f.metadata, getattr(defaults, f.name)
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        kind = dict(type=f.type, choices=about["choices"])
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif not about["choices"]:
            kind["metavar"] = "X"
        shown = "" if default == "" else f" (default: {default})"
        group.add_argument(f"--{name}", default=default, help=about["help"] + shown, **kind)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; --help lists them all")

    changed = {}
    for name, f in options.items():
        value, low, high = getattr(values, f.name), f.metadata["low"], f.metadata["high"]
        if not isinstance(value, str) and not low <= value <= high:
            bound = f"at least {low:g}" if value < low else f"at most {high:g}"
            raise ValueError(f"--{name}: got {value}, expected {bound}")
        if value != getattr(defaults, f.name):
            changed[name] = value
    return type(defaults)(**vars(values)), changed
