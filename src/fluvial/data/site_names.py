"""Names of sites: they come from data and from peers, and are shown and stored everywhere."""

import unicodedata
from collections.abc import Collection, Iterable, Sequence

from fluvial.errors import ConfigError

LONGEST = 64
"""Most characters of a name."""
MOST_SHOWN = 20
"""Most names in a message."""
MOST_BYTES = 200
"""Most bytes of UTF-8 of a name that is also a file's name."""
LOOK_ALIKE = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "CHEROKEE", "COPTIC", "LISU")
"""Scripts whose letters look alike, so that a plain name has letters of one of them only."""
_CYRILLIC = "аеіјорсухѕһԁԛԝАВЕІЈКМНОРСТУХЅ"  # noqa: RUF001
LATIN_TWINS = {
    **str.maketrans(_CYRILLIC, "aeijopcyxshdqwABEIJKMHOPCTYXS"),
    **str.maketrans("αγικνορυχΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "ayikvopuxABEZHIKMNOPTYX"),
}
"""Letters of Cyrillic and Greek that most fonts draw as a letter of Latin, in our own list."""
INVISIBLE = frozenset(
    {
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5),
        *(*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)),
    }
)
"""Letters and marks that cannot be seen (Default_Ignorable_Code_Point of Unicode)."""
MOST_MARKS = 3
"""Most marks on one letter, such as accents."""
PLAIN = (
    "1 to 64 letters of any language, digits and _ . -, the first a letter or a digit, at most "
    f"{MOST_BYTES} bytes of UTF-8"
)
"""Form of the name of a site with a process of its own; it is also a file's name and a key."""


def fault_of(name: str) -> str | None:
    """Return why a text cannot be a site's name, None where it can."""
    shown = repr(name[:60]) + (" ..." if len(name) > 60 else "")
    if not name.strip():
        return f"{shown} is no name of a site; it needs a character that can be seen"
    if len(name) > LONGEST:
        return f"{shown} is no name of a site: {len(name)} characters, at most {LONGEST}"
    spaces = [c for c in name if c != " " and unicodedata.category(c) == "Zs"]
    if spaces:
        return (
            f"{shown} is no name of a site: character {name.index(spaces[0]) + 1} is a "
            f"{unicodedata.name(spaces[0]).lower()}, which looks like a plain space; write a plain "
            "space there"
        )
    if not name.isprintable():
        return (
            f"{shown} is no name of a site: it holds a control or format character, which could "
            "drive a terminal"
        )

    return None


def check_names(names: Iterable[str], where: str) -> None:
    """Raise `ConfigError` for the first text that cannot be a site's name."""
    for name in names:
        fault = fault_of(name)
        if fault is not None:
            raise ConfigError(f"{where}: {fault}")


def chosen(names: Sequence[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the names in `wanted`, sorted; raise `ConfigError` for one that is not in `names`."""
    for name in wanted:
        if name not in names:
            known = ", ".join(names[:MOST_SHOWN]) + (" ..." if len(names) > MOST_SHOWN else "")
            raise ConfigError(f"data.sites: there is no site {name[:60]!r}; the sites are {known}")

    return tuple(sorted(wanted))


def composed(name: str) -> str:
    """Return a name in Unicode's form NFC, in which equal names have equal bytes."""
    return unicodedata.normalize("NFC", name)


def plain_fault_of(name: str) -> str | None:
    """Return why a name cannot be that of a site with a process of its own, None where it can.

    It is `PLAIN` and composed. Letters that are others in another form, such as those of full
    width, letters that cannot be seen, and letters of several scripts that look alike are refused:
    with them two names could look like one.
    """
    kinds = [unicodedata.category(character)[0] for character in name]
    others = {c for c, kind in zip(name, kinds, strict=True) if kind not in "LMN"} - set("_.-")
    shown = f"{name[:60]!r} is no name of a site"
    if not 0 < len(name) <= LONGEST or others or kinds[0] not in "LN" or not name.isprintable():
        return f"{shown}: {PLAIN}"
    stacked = "M" * (MOST_MARKS + 1) in "".join(kinds)
    if len(name.encode()) > MOST_BYTES or stacked or not INVISIBLE.isdisjoint(map(ord, name)):
        return f"{shown}: {PLAIN}"
    if unicodedata.normalize("NFKC", name) != name:
        return f"{shown}: it has letters or digits in another form than the usual one (NFKC)"

    if mixed := _mixed_scripts(name):
        return f"{shown}: it mixes letters of scripts that look alike, {mixed}"
    return None


def _mixed_scripts(name: str) -> str:
    """Return the scripts that look alike of which a name has letters; "" for one or none."""
    scripts = _scripts(name)
    return " and ".join(script.capitalize() for script in scripts) if len(scripts) > 1 else ""


def _scripts(name: str) -> list[str]:
    """Return the scripts that look alike of which a name has letters."""
    words = (unicodedata.name(character, "").partition(" ")[0] for character in name)
    return sorted({word for word in words if word in LOOK_ALIKE})


def mixed_remarks(names: Collection[str]) -> list[str]:
    """Return a remark for each name that may look like another: it has letters of two scripts, or
    only letters that look like Latin ones in a script of which no other name has a letter."""
    mixed = [
        f"the site {name!r} mixes letters of scripts that look alike, {scripts}, and may be "
        "another one that is written wrongly; over Flower the name is refused"
        for name in names
        if (scripts := _mixed_scripts(name))
    ]
    used = {script for name in names if not _twin(name) for script in _scripts(name)}
    whole = [
        f"the site {name!r} has letters of {' and '.join(_scripts(name)).capitalize()} that look "
        f"like the Latin {twin!r}, and may be another one that is written wrongly"
        for name in names
        if (twin := _twin(name)) and (twin in names or used.isdisjoint(_scripts(name)))
    ]
    return mixed + whole


def _twin(name: str) -> str:
    """Return the Latin name that one of another script looks like, "" for none."""
    letters = [character for character in name if character.isalpha()]
    twin = name.translate(LATIN_TWINS)
    replaced = all(ord(letter) in LATIN_TWINS for letter in letters)
    return twin if replaced and len(_scripts(name)) == 1 else ""


def plain_name(name: str, where: str) -> str:
    """Return a name, composed, of a site with a process of its own; raise `ConfigError` for one
    that it cannot have."""
    name = composed(name)
    fault = plain_fault_of(name)
    if fault is not None:
        raise ConfigError(f"{where}: {fault}")
    return name
