"""Channel names: stains and their synonyms, and matching a model's channels to a plate's by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from cellvim.errors import ChannelError, InputError, listing

# Canonical name -> synonyms, written without case, spaces and punctuation. A filter or fluorophore that carries
# different stains on different plates (FITC, Cy5, Alexa 488) is deliberately not listed: it does not name a stain.
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
_LONGEST = 4  # words in a synonym, e.g. "actin golgi plasma membrane"

COLORS = {  # display colours, hex RGB, of the stains we know
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
    """Return the stain that a channel name means, or None if it names no stain we know.

    Case, punctuation, CellProfiler's ``Orig``/``Corr`` prefixes and words that name no stain are ignored.

    >>> canonical_name("Hoechst 33342"), canonical_name("Alexa 488 - ConA"), canonical_name("ch5")
    ('DNA', 'ER', None)
    """
    words = [w.lower() for w in _WORDS.findall(name)]
    while words and words[0] in ("orig", "corr", "illum"):
        words = words[1:]
    found, start = set(), 0
    while start < len(words):  # the longest synonym that starts here, so that "BF high" is not also "BF"
        for stop in range(min(len(words), start + _LONGEST), start, -1):
            stain = _CANONICAL.get("".join(words[start:stop]))
            if stain is not None:
                found.add(stain)
                start = stop
                break
        else:
            start += 1
    if not found:  # "ORIGDNA", "mitotrackerdeepRED": the words could not be told apart
        whole = "".join(words).removeprefix("orig").removeprefix("corr")
        return _CANONICAL.get(whole)
    return found.pop() if len(found) == 1 else None  # two stains in one name: it is neither


def match_channels(wanted: Sequence[str], available: Sequence[str], *, where: str) -> list[int]:
    """Return the index in ``available`` of each wanted channel.

    A name is looked for as it is, then without regard to case, then by the stain it means.

    Parameters
    ----------
    wanted
        Channel names, of a model or from the user.
    available
        Channel names of the plate, in its order.
    where
        What has the available channels, for the message: ``plate.zarr``.

    Raises
    ------
    ChannelError
        A name is not there, fits several channels, or two names mean the same channel.
    """
    indices = [_match_one(name, available, where) for name in wanted]
    for position, index in enumerate(indices):
        first = indices.index(index)
        if first < position:
            raise ChannelError(
                f"Channels '{wanted[first]}' and '{wanted[position]}' are the same channel "
                f"'{available[index]}' of {where}; it has {listing(available)}. Choose with --channels."
            )
    return indices


def find_dna_channel(available: Sequence[str], *, where: str) -> int:
    """Return the index of the channel that shows the nuclei.

    Raises
    ------
    ChannelError
        No channel, or more than one, is a DNA stain by its name.
    """
    try:
        return _match_one("DNA", available, where)
    except ChannelError:
        if any(canonical_name(name) == "DNA" for name in available):
            raise
        raise ChannelError(
            f"No channel of {where} is a DNA stain by its name (DNA, Hoechst, DAPI, DRAQ5, ...); it has "
            f"{listing(available)}. Choose with --channels, as in DNA={available[0] if available else 'NAME'}."
        ) from None


def parse_channel_overrides(text: str) -> list[tuple[str | None, str]]:
    """Read ``--channels``: ``"DNA=ch5,ER=ch4"`` or ``"DNA,ER"`` -> (model's name or None, plate's name) pairs.

    Raises
    ------
    ChannelError
        A part is empty, or a name comes twice.
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
            raise ChannelError(f"--channels '{text}' names '{twice[0]}' twice; each channel can be given once.")
    return pairs


def parse_channel_names(text: str) -> dict[str, str]:
    """Read ``--channel-names`` of the import: ``"ch5=DNA,ch4=ER"`` -> {file's channel: name}.

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
            raise ChannelError(f"--channel-names '{text}' names '{key}' twice; each channel can be given once.")
        names[key] = name
    return names


def display_color(name: str, position: int) -> str:
    """Return a hex RGB display colour for a channel: of its stain, or by its position on the plate."""
    stain = canonical_name(name)
    if stain in ("Brightfield", "HighZBF", "LowZBF", "PhaseContrast"):
        return "FFFFFF"
    palette = ("FFFFFF", "00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF", "FF8000")
    return COLORS.get(stain or "", palette[position % len(palette)])


def _match_one(name: str, available: Sequence[str], where: str) -> int:
    if not isinstance(name, str):
        raise InputError(f"A channel is chosen by its name, not by {name!r}; {where} has {listing(available)}.")
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
                f"Channel '{name}' fits {len(found)} channels of {where}: "
                f"{listing(available[i] for i in found)}. Choose one with --channels, as in "
                f"{name}={available[found[-1]]}."
            )
    raise ChannelError(f"Channel '{name}' is not in {where}; it has {listing(available)}. Choose with --channels.")


def map_plates(
    plates: Mapping[str, Sequence[str]], wanted: Sequence[str] | None = None, overrides: Mapping[str, str] | None = None
) -> dict[str, dict[str, str]]:
    """Match the same channels on several plates that name or order theirs differently.

    Parameters
    ----------
    plates
        Plate's name -> its channel names.
    wanted
        What to look for on each: channel names or stains. By default the stains that all plates have, in the order of
        the first one.
    overrides
        Wanted name -> the plate's channel, for plates on which the name is not enough. One plate is meant by
        ``PLATE:CHANNEL``; a channel alone is meant for every plate that has it.

    Returns
    -------
    dict
        Plate's name -> {wanted name: that plate's channel}, to be stored with the result.

    Raises
    ------
    ChannelError
        A plate lacks a channel, a name fits several of its channels, or the plates have no stain in common.

    Examples
    --------
    >>> map_plates({"phenix": ["ch5", "ER"], "scope": ["ConA", "Hoechst"]}, ["DNA", "ER"], {"DNA": "phenix:ch5"})
    {'phenix': {'DNA': 'ch5', 'ER': 'ER'}, 'scope': {'DNA': 'Hoechst', 'ER': 'ConA'}}
    """
    overrides = dict(overrides or {})
    if wanted is None:
        meanings = {name: [canonical_name(c) or c for c in channels] for name, channels in plates.items()}
        first = next(iter(meanings.values()), [])
        wanted = [m for m in dict.fromkeys(first) if all(m in others for others in meanings.values())]
        if not wanted:
            each = "; ".join(f"{name}: {listing(channels)}" for name, channels in plates.items())
            raise ChannelError(
                f"The plates have no channel in common by name ({each}). Say what each shows with --channels, as in "
                "DNA=PLATE:ch5."
            )
    unused = [name for name in overrides if name not in wanted]
    if unused:
        raise ChannelError(
            f"--channels says what '{unused[0]}' is, but it is not wanted; wanted are {listing(wanted)}."
        )
    return {
        plate: dict(
            zip(
                wanted,
                [
                    channels[i]
                    for i in match_channels(
                        [_on(plate, name, overrides, channels) for name in wanted], channels, where=plate
                    )
                ],
                strict=True,
            )
        )
        for plate, channels in plates.items()
    }


def _on(plate: str, name: str, overrides: Mapping[str, str], channels: Sequence[str]) -> str:
    """Return what to look for on one plate: the override where it is meant for this plate, else the name itself."""
    given = overrides.get(name)
    if given is None:
        return name
    head, colon, channel = given.partition(":")
    if colon and given not in channels:
        return channel if head == plate else name
    return given if given in channels else name
