"""Methods and codecs of the caller's own: checked, entered, and known to a configuration."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError, create_model

from fluvial.codecs import CODECS, CodecConfig
from fluvial.codecs.base import OWN_CODES, Codec, CodecSettings
from fluvial.errors import ConfigError, check_call
from fluvial.methods import METHODS, MethodConfig
from fluvial.methods.interface import Method, MethodSettings, Traits
from fluvial.runs.config import RunConfig
from fluvial.settings import Settings

_OWN_METHODS: set[str] = set()
"""Names of methods that callers entered; they may be entered again, as in a notebook's cell."""
_OWN_CODECS: set[str] = set()
"""Names of codecs that callers entered."""


def wrong_argument(name: str, value: object, expected: str) -> ConfigError:
    """Return the error about an argument that has another type than `expected`."""
    kind = "None" if value is None else f"{value!r:.80} of type {type(value).__name__}"
    return ConfigError(f"{name}: got {kind}; expected {expected}")


def listed(name: str, values: object, expected: str) -> tuple[Any, ...]:
    """Return the entries of an argument; raises `ConfigError` for what is no list of entries."""
    if isinstance(values, str | bytes | Mapping | type) or not isinstance(values, Iterable):
        raise wrong_argument(name, values, expected)

    return tuple(values)


def with_own(methods: object, codecs: object) -> type[RunConfig]:
    """Return the class of configurations that know `methods` and `codecs` too.

    Both are entered into `METHODS` and `CODECS`, so sites of this process find them. Raises
    `ConfigError` for what is no method or codec, before anything is entered.
    """
    own_methods = listed("methods", methods, "a list of fluvial.Method")
    own_codecs = listed("codecs", codecs, "a list of classes derived from fluvial.Codec")
    if not own_methods and not own_codecs:
        return RunConfig

    by_method = {_method_name(n, entry): entry for n, entry in enumerate(own_methods)}
    by_codec = {_codec_name(n, entry): entry for n, entry in enumerate(own_codecs)}
    _check_names(by_method, METHODS, _OWN_METHODS)
    _check_names(by_codec, CODECS, _OWN_CODECS)
    _check_codes(by_codec)

    METHODS.update(by_method)
    _OWN_METHODS.update(by_method)
    CODECS.update(by_codec)
    _OWN_CODECS.update(by_codec)

    method = _widened(MethodConfig, [entry.config for entry in own_methods])
    codec_tables = _widened(CodecConfig, [_settings_of(codec) for codec in own_codecs])
    fields: dict[str, Any] = {
        "method": (method, RunConfig.model_fields["method"].default),
        "codec": (codec_tables | None, None),
        "downlink": (codec_tables | None, None),
    }

    made: type[RunConfig] = create_model("RunConfig", __base__=RunConfig, **fields)
    return made


def _method_name(number: int, entry: object) -> str:
    """Return the name of a method; raises `ConfigError` for what is none."""
    where = f"methods[{number}]"
    if not isinstance(entry, Method):
        raise wrong_argument(where, entry, "a fluvial.Method")
    config: object = entry.config
    if not (isinstance(config, type) and issubclass(config, MethodSettings)):
        expected = "a class derived from fluvial.MethodSettings"
        raise wrong_argument(f"{where}.config", config, expected)

    for field, value, arguments in (
        ("server", entry.server, ("config", "context")),
        ("plan", entry.plan, ("config", "given")),
    ):
        if not callable(value):
            raise wrong_argument(f"{where}.{field}", value, "a function or class")
        check_call(f"{where}.{field}", value, *arguments)

    if not isinstance(entry.traits, Traits):
        raise wrong_argument(f"{where}.traits", entry.traits, "a fluvial.Traits")
    _check_traits(f"{where}.traits", entry.traits)

    tasks: object = entry.tasks
    if not isinstance(tasks, Mapping):
        raise wrong_argument(f"{where}.tasks", tasks, "a dict from names to functions")
    for name, task in tasks.items():
        if not callable(task):
            raise wrong_argument(f"{where}.tasks[{name!r}]", task, "a function")
        check_call(f"{where}.tasks[{name!r}]", task, "site", "message")

    return _name(f"{where}.config", config)


def _check_traits(where: str, traits: Traits) -> None:
    """Raise `ConfigError` for a value that a field of the traits does not have."""
    for name, kind in get_type_hints(Traits).items():
        try:
            TypeAdapter(kind).validate_python(getattr(traits, name), strict=True)
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join([where, name, *map(str, fault["loc"])])
            raise wrong_argument(place, fault["input"], fault["msg"]) from None


def _codec_name(number: int, entry: object) -> str:
    """Return the name of a codec; raises `ConfigError` for what is none."""
    where = f"codecs[{number}]"
    if not (isinstance(entry, type) and issubclass(entry, Codec)):
        raise wrong_argument(where, entry, "a class derived from fluvial.Codec")
    if inspect.isabstract(entry):
        lacking = ", ".join(sorted(entry.__abstractmethods__))
        raise ConfigError(f"{where}: {entry.__name__} lacks {lacking}; define it in the class")

    return _name(f"settings of {where}", _settings_of(entry))


def _name(where: str, settings: type[Settings]) -> str:
    """Return the name by which a configuration chooses `settings`; raises `ConfigError`."""
    field = settings.model_fields.get("name")
    name = None if field is None else field.default
    if field is None or not isinstance(name, str) or get_args(field.annotation) != (name,):
        raise ConfigError(
            f"{where}: {settings.__name__} has no name of its own; "
            'write it as  name: Literal["NAME"] = "NAME"'
        )

    return name


def _check_names(entries: Mapping[str, object], known: Mapping[str, object], own: set[str]) -> None:
    """Raise `ConfigError` for the name of one of the package's."""
    for name in entries:
        if name in known and name not in own:
            raise ConfigError(f"{name!r} is the name of another method or codec; choose a new one")


def _check_codes(entries: Mapping[str, type[Codec]]) -> None:
    """Raise `ConfigError` for a number that another codec has, or outside `OWN_CODES`."""
    after = {**{name: CODECS[name] for name in _OWN_CODECS}, **entries}
    for name, codec in entries.items():
        code = getattr(codec, "code", None)
        where = f"codec {name!r}: {codec.__name__}.code"
        if not isinstance(code, int) or isinstance(code, bool) or code not in OWN_CODES:
            raise ConfigError(
                f"{where} is {code!r}; codecs of your own have a whole number from "
                f"{OWN_CODES[0]} to {OWN_CODES[-1]}"
            )

        same = [other for other, entry in after.items() if other != name and entry.code == code]
        if same:
            raise ConfigError(f"{where} is {code}, as that of {same[0]!r}; choose another number")


def _settings_of(codec: type[Codec]) -> type[CodecSettings]:
    """Return the class of settings that the constructor of `codec` takes first.

    Raises `ConfigError` where the constructor does not say it.
    """
    first = next(iter(inspect.signature(codec).parameters), "")
    try:
        settings = inspect.get_annotations(codec.__init__, eval_str=True).get(first)
    except NameError as error:
        raise ConfigError(f"codec {codec.__name__}: its constructor names {error}") from None

    if not (isinstance(settings, type) and issubclass(settings, CodecSettings)):
        raise ConfigError(
            f"codec {codec.__name__}: the first argument of its constructor should have the type "
            "of its settings, a class derived from fluvial.CodecSettings"
        )

    return settings


def _widened(union: Any, settings: Sequence[type[Settings]]) -> Any:
    """Return `union` with further classes of settings, told apart by their name."""
    members = get_args(get_args(union)[0])
    known = [each for each in settings if each not in members]
    return Annotated[reduce(or_, [*members, *known]), Field(discriminator="name")]
