"""Run the examples with reduced settings and write their pictures into docs/gallery/.

``python docs/make_gallery.py`` runs all of them, one after the other, some minutes each;
``python docs/make_gallery.py elastic_net mixed_network`` only those named.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
# The options that each example is run with; the guide's page says which.
OPTIONS: dict[str, list[str]] = {
    "elastic_net": ["--steps", "60"],
    "mixed_network": [],
    "compare_solvers": [],
    "point_cloud_outliers": ["--clouds", "60"],
    "feature_projection": [],
    "inverse_kinematics": [],
    "robust_pose": [],
    "implicit_robustness": [],
    "implicit_digits": [],
    "implicit_features": [],
    "implicit_regression": [],
}
WIDTH = 1200  # pixels
LARGEST = 120_000  # bytes


def draw(name: str) -> Path:
    """Run an example and keep its picture."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "picture.png"
        script = ROOT / "examples" / f"{name}.py"
        subprocess.run(
            [sys.executable, str(script), "--output", str(drawn), *OPTIONS[name]], check=True
        )
        return shrink(drawn, GALLERY / f"{name}.png")


def shrink(source: Path, target: Path) -> Path:
    """Write a picture for the web: at most WIDTH wide, as many colours as LARGEST allows."""
    image = Image.open(source).convert("RGB")
    if image.width > WIDTH:
        size = (WIDTH, round(image.height * WIDTH / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    for colours in (256, 128, 64, 32, 16):
        image.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size < LARGEST:
            return target
    raise ValueError(f"{target} has {target.stat().st_size} bytes even with {colours} colours.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the gallery.")
    parser.add_argument("names", nargs="*", choices=[*OPTIONS, []], help="default: all")
    for name in parser.parse_args(arguments).names or OPTIONS:
        print(f"== {name} {' '.join(OPTIONS[name])}", flush=True)
        print(draw(name), flush=True)


if __name__ == "__main__":
    main()
