"""Build a command line from a dataclass whose comments are the help."""
import argparse
import inspect
import re
from typing import get_args, get_type_hints


def read_options(defaults, argv: list[str], description: str) -> tuple:
    """Parse argv -> a dataclass like `defaults`, and {option: value} of the changed options.

    Each field with a comment is an option, with the comment as its help. A comment on its own line
    is the title of a group; in one that ends in "without --data", options are refused with --data.
    Numbers are at least 0, or whatever the help says: "at least 1".
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds, helps, groups = get_type_hints(type(defaults)), {}, {}
    for line in inspect.getsource(type(defaults)).splitlines():
        if title := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        if found := re.fullmatch(r"    (\w+): .+  # (.+)", line):
            name, default = found[1].replace("_", "-"), getattr(defaults, found[1])
            helps[name], groups[name], kind = found[2], group.title, kinds[found[1]]
            how = dict(type=kind, metavar="X")
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            elif get_args(kind):  # of Literal
                how = dict(choices=get_args(kind))
            shown = "" if default == "" else f" (default: {default})"
            group.add_argument(f"--{name}", default=default, help=helps[name] + shown, **how)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; --help lists them all")

    changed = {}
    for name, (key, value) in zip(helps, vars(values).items(), strict=True):
        for word, sign, default in (("least", 1, "0"), ("most", -1, "inf")):
            bound = re.search(rf"at {word} ([\d.]+)", helps[name])
            bound = bound[1] if bound else default
            if not isinstance(value, str) and sign * value < sign * float(bound):
                raise ValueError(f"--{name}: got {value}, expected at {word} {bound}")
        if value != getattr(defaults, key):
            changed[name] = value
    for name in changed:
        need = re.search(r"(with|without) --(\w+)$", groups[name])
        if need and (need[1] == "with") != (need[2] in changed):
            raise ValueError(f"--{name}: is for runs {need[0]}")
    return type(defaults)(**vars(values)), changed
