"""Channel names: stains and their synonyms, and matching of channels by name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cellvim.errors import ChannelError, InputError, listing

# Canonical name -> synonyms in lower case without spaces and punctuation. Filters and fluorophores that are used with
# different stains on different plates (FITC, Cy5, Alexa 488) are deliberately not listed.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "DNA": (
        *("dna", "sirdna", "dnachannel", "hoechst", "hoechst33342", "hoechst33258", "hoechst34580", "dapi"),
        *("draq", "draq5", "draq7", "nuclei", "nucleus", "nuclear", "chromatin", "h2b", "spydna"),
    ),
    "ER": ("er", "endoplasmicreticulum", "cona", "concanavalin", "concanavalina"),
    "RNA": ("rna", "syto14", "nucleoli", "nucleolus"),
    "AGP": (
        *("agp", "phalloidin", "wga", "wheatgermagglutinin", "actin", "factin", "golgi", "plasmamembrane"),
        *("phalloidinwga", "wgaphalloidin", "actingolgiplasmamembrane", "actingolgipm"),
    ),
    "Mito": ("mito", "mitochondria", "mitochondrion", "mitotracker", "mitotrackerdeepred", "mitotrackerred"),
    "Brightfield": ("brightfield", "bf", "transmittedlight"),
    "HighZBF": (
        "highzbf",
        "bfhighz",
        "bfhigh",
        "highbf",
        "brightfieldhigh",
        "highbrightfield",
        "highzbrightfield",
        "brightfieldh",
    ),
    "LowZBF": (
        "lowzbf",
        "bflowz",
        "bflow",
        "lowbf",
        "brightfieldlow",
        "lowbrightfield",
        "lowzbrightfield",
        "brightfieldl",
    ),
    "PhaseContrast": ("phasecontrast", "phase"),
    "GFP": ("gfp", "egfp", "emgfp", "acgfp", "mneongreen"),
    "RFP": ("rfp", "mcherry", "tdtomato", "dsred", "mscarlet", "mkate2"),
    "YFP": ("yfp", "eyfp", "mvenus", "venus", "citrine"),
    "CFP": ("cfp", "ecfp", "cerulean", "mturquoise2"),
    "Tubulin": ("tubulin", "microtubules", "microtubule"),
    "Lysosome": ("lysosome", "lysosomes", "lysotracker"),
}
_CANONICAL = {synonym: name for name, synonyms in _SYNONYMS.items() for synonym in synonyms}
_WORDS = re.compile(r"[A-Za-z]?[a-z]+[0-9]*|[A-Z0-9]+|[^\W_]+")
_LONGEST = 4  # number of words in a synonym, e.g. "actin golgi plasma membrane"

COLORS = {  # display colours (hex RGB) of the known stains
    "DNA": "0000FF",
    "ER": "00FF00",
    "RNA": "FFFF00",
    "AGP": "FF8000",
    "Mito": "FF0000",
    "GFP": "00FF00",
    "RFP": "FF0000",
    "YFP": "FFFF00",
    "CFP": "00FFFF",
    "Tubulin": "00FF00",
    "Lysosome": "FF00FF",
}


def canonical_name(name: str) -> str | None:
    """Return the stain that a channel name refers to, or None if it does not contain a known stain.

    Case, punctuation, CellProfiler's ``Orig``/``Corr`` prefixes and other words are ignored.

    >>> canonical_name("Hoechst 33342"), canonical_name("Alexa 488 - ConA"), canonical_name("ch5")
    ('DNA', 'ER', None)
    """
    words = [w.lower() for w in _WORDS.findall(name)]
    while words and words[0] in ("orig", "corr", "illum"):
        words = words[1:]
    found, start = set(), 0
    while start < len(words):  # longest synonym first, so that "BF high" is not "BF"
        for stop in range(min(len(words), start + _LONGEST), start, -1):
            stain = _CANONICAL.get("".join(words[start:stop]))
            if stain is not None:
                found.add(stain)
                start = stop
                break
        else:
            start += 1
    if not found:  # "ORIGDNA", "mitotrackerdeepRED": the words cannot be separated
        whole = "".join(words).removeprefix("orig").removeprefix("corr")
        return _CANONICAL.get(whole)
    return found.pop() if len(found) == 1 else None  # None for a name with two stains


def match_channels(wanted: Sequence[str], available: Sequence[str], *, where: str) -> list[int]:
    """Return the index in ``available`` of each wanted channel.

    A name is matched exactly, then ignoring case, then by the stain that it refers to.

    Parameters
    ----------
    wanted
        Channel names of a model or from the user.
    available
        Channel names of the plate, in order.
    where
        Name of the plate or model for messages, such as ``plate.zarr``.

    Raises
    ------
    ChannelError
        A name matches no channel or several, or two names match the same channel.
    """
    indices = [_match_one(name, available, where) for name in wanted]
    for position, index in enumerate(indices):
        first = indices.index(index)
        if first < position:
            raise ChannelError(
                f"Channels '{wanted[first]}' and '{wanted[position]}' are the same channel "
                f"'{available[index]}' of {where}, which has {listing(available)}. Choose with --channels."
            )
    return indices


def find_dna_channel(available: Sequence[str], *, where: str) -> int:
    """Return the index of the channel that shows the nuclei.

    Raises
    ------
    ChannelError
        No channel name, or more than one, contains a DNA stain.
    """
    try:
        return _match_one("DNA", available, where)
    except ChannelError:
        if any(canonical_name(name) == "DNA" for name in available):
            raise
        raise ChannelError(
            f"No channel name of {where} contains a DNA stain (DNA, Hoechst, DAPI, DRAQ5, ...); it has "
            f"{listing(available)}. Choose with --channels, as in DNA={available[0] if available else 'NAME'}."
        ) from None


def parse_channel_overrides(text: str) -> list[tuple[str | None, str]]:
    """Parse ``--channels``: ``"DNA=ch5,ER=ch4"`` or ``"DNA,ER"`` -> (model's name or None, plate's name) pairs.

    Raises
    ------
    ChannelError
        A part is empty, or a name is repeated.
    """
    pairs: list[tuple[str | None, str]] = []
    for part in text.split(","):
        left, equals, right = (p.strip() for p in part.partition("="))
        if not left or (equals and not right):
            raise ChannelError(f"--channels '{text}' has the part '{part}'; expected NAME or NAME=PLATE_CHANNEL.")
        pairs.append((left, right) if equals else (None, left))
    for names in ([m for m, _ in pairs if m is not None], [p for _, p in pairs]):
        twice = [n for i, n in enumerate(names) if n in names[:i]]
        if twice:
            raise ChannelError(f"--channels '{text}' repeats '{twice[0]}'; each channel can be given once.")
    return pairs


def parse_channel_names(text: str) -> dict[str, str]:
    """Parse ``--channel-names`` of the import: ``"ch5=DNA,ch4=ER"`` -> {file's channel: name}.

    Raises
    ------
    ChannelError
        A part is not of the form ``KEY=NAME``.
    """
    names: dict[str, str] = {}
    for part in text.split(","):
        key, equals, name = (p.strip() for p in part.partition("="))
        if not (key and equals and name):
            raise ChannelError(f"--channel-names '{text}' has the part '{part}'; expected KEY=NAME, as in ch5=DNA.")
        if key in names:
            raise ChannelError(f"--channel-names '{text}' repeats '{key}'; each channel can be given once.")
        names[key] = name
    return names


def display_color(name: str, position: int) -> str:
    """Return the display colour (hex RGB) of a channel: that of its stain, or one for its position on the plate."""
    stain = canonical_name(name)
    if stain in ("Brightfield", "HighZBF", "LowZBF", "PhaseContrast"):
        return "FFFFFF"
    palette = ("FFFFFF", "00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF", "FF8000")
    return COLORS.get(stain or "", palette[position % len(palette)])


def _match_one(name: str, available: Sequence[str], where: str) -> int:
    if not isinstance(name, str):
        raise InputError(f"{name!r} is not a channel name; {where} has {listing(available)}.")
    stain = canonical_name(name)
    for same in (
        lambda other: other == name,
        lambda other: other.casefold() == name.casefold(),
        lambda other: stain is not None and canonical_name(other) == stain,
    ):
        found = [i for i, other in enumerate(available) if same(other)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ChannelError(
                f"Channel '{name}' matches {len(found)} channels of {where}: "
                f"{listing(available[i] for i in found)}. Choose one with --channels, as in "
                f"{name}={available[found[-1]]}."
            )
    raise ChannelError(f"Channel '{name}' is not in {where}; it has {listing(available)}. Choose with --channels.")
