"""Where a key was given, for messages about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from megatron.config.paths import PATH_KEYS
from megatron.config.yaml_file import Setting, normalise
from megatron.errors import ConfigError, UserError, UserErrors

_KEYS = re.compile(r"([a-z][\w.]*)(?:, [a-z][\w.]*)*: ")
_NAMES = re.compile(r"(?<![\w/.])[a-z]+(?:_[a-z]+)+(?![\w/])")


def locate(error: ConfigError, settings: Mapping[str, Setting], otherwise: str = "") -> ConfigError:
    """The error with the place and the spelling of its key; `otherwise` is the place of one that is not set."""
    setting = find_setting(error.key, settings)
    error.where = otherwise if setting is None else setting.source
    if setting is None:
        return error
    if setting.key == error.key == error.spelling:
        error.spelling = setting.spelling
    if isinstance(error.value, bool) and setting.written not in (None, "true", "false"):
        error.advice = f"'{setting.written}' is read so by YAML 1.1 and as text by YAML 1.2; quote it for text"
    return error


def find_setting(key: str, settings: Mapping[str, Setting]) -> Setting | None:
    """The setting of a dotted key, else of one of its entries, else of the table that it belongs to."""
    entries = (name for name in settings if name.startswith(f"{key}."))
    tables = (key.rsplit(".", levels)[0] for levels in range(1, key.count(".") + 1))
    return next((settings[name] for name in (key, *entries, *tables) if name in settings), None)


@contextmanager
def places_named(settings: Mapping[str, Setting]) -> Iterator[None]:
    """Adds to a UserError of the block, which knows a key at most, in which file and line the key was given."""
    try:
        yield
    except ConfigError as error:
        if not error.where:
            locate(error, settings)
        raise
    except UserError as error:
        if not isinstance(error, UserErrors):
            error.args = (_placed(str(error), settings),)
        raise


def _placed(text: str, settings: Mapping[str, Setting]) -> str:
    """The message of code that knows no settings, with the place of the key or path that it names."""
    found = _KEYS.match(text)
    names = [normalise(found[1])] if found else []
    for name in (*names, *_NAMES.findall(text)):
        if name in settings:
            return f"{text} ({settings[name].source})"
    for key in sorted(PATH_KEYS & set(settings)):
        value = settings[key].value
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and len(path) > 1 and re.match(re.escape(path) + r"[:. ]", text):
                return f"{key}: {text} ({settings[key].source})"
    return text
