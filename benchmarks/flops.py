"""Operations of FastVim, Vim and ViT against image size: the three curves of the paper's Figure 4."""

from __future__ import annotations

from benchmarks.timing import check_output, parser, write_results
from cellvim.models.flops import count_flops
from cellvim.models.registry import model_config

FAMILIES = ("fastvim", "vim", "vit")
IMAGE_SIZES = (224, 512, 768, 1024, 1280, 1536, 2048)


def run(size: str = "tiny", patch: int = 16) -> dict[str, dict[int, float]]:
    """Count the operations of one image, in 10⁹, by family and image side in pixels.

    Parameters
    ----------
    size, patch
        Of the models, as in their names.

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), Fig. 4; `cellvim.models.flops` says how operations are counted.
    """
    configs = {family: model_config(f"{family}_{size}_patch{patch}") for family in FAMILIES}
    return {
        family: {side: count_flops(config, side, side)["total"] / 1e9 for side in IMAGE_SIZES}
        for family, config in configs.items()
    }


def table(curves: dict[str, dict[int, float]]):
    """Return the curves as a rich table, an image size a row."""
    from rich.table import Table

    rows = Table(title="Operations of one image, 10⁹ (multiply-adds; 9 per state of a scan step)")
    rows.add_column("image side, px", justify="right")
    for family in curves:
        rows.add_column(family, justify="right")
    for side in IMAGE_SIZES:
        rows.add_row(str(side), *(f"{curve[side]:,.2f}" for curve in curves.values()))
    return rows


def main() -> None:
    """Print the table."""
    from rich.console import Console

    options = parser(__doc__)
    options.add_argument("--size", default="tiny", help="tiny, small, base, large or huge (default: tiny)")
    arguments = options.parse_args()
    check_output(arguments.output)
    curves = run(arguments.size)
    Console().print(table(curves))
    write_results(curves, arguments.output)


if __name__ == "__main__":
    main()
