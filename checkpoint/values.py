"""Single values of a stranger's JSON object, each checked before it is used."""


def number(config, key, default=None, low=1, high=1 << 20, kind=int):
    """A number from low to high; a missing or null one is the default.

    Raises ValueError, naming the key and its value.
    """
    value = default if config.get(key) is None else config[key]
    if (isinstance(value, bool) or not isinstance(value, (int, kind))
            or not low <= value <= high):  # NaN fails here too
        raise ValueError(f"config value {key} is {value!r}; expected {kind.__name__} from {low} "
                         f"to {high}")
    return kind(value)


def flag(config, key, default=False):
    """True or false; a missing or null one is the default. The text "false" would count as true."""
    value = default if config.get(key) is None else config[key]
    if value not in (True, False):
        raise ValueError(f"config value {key} is {value!r}; expected true or false")
    return bool(value)


def choices(config, key, length, allowed=None):
    """A list of so many values, each of them one of `allowed`."""
    values = config.get(key)
    if (not isinstance(values, list) or len(values) != length
            or allowed and any(value not in allowed for value in values)):
        kinds = " or ".join(map(str, allowed or ["numbers"]))
        raise ValueError(f"config value {key} is {str(values)[:80]}; expected a list of {length} "
                         f"values, {kinds}")
    return values
